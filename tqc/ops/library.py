"""The functions of `planes` as ops of torch, `torch.ops.tqai.append` and so on: what torch can trace and check."""

from __future__ import annotations

import torch

from tqc.ops import planes

NAMESPACE = "tqai"
library = torch.library.Library(NAMESPACE, "DEF")

library.define(
    "append(Tensor(a!) pages, Tensor(b!) dense, Tensor(c!) state, Tensor new, Tensor? start, str spec, "
    "Tensor? score=None) -> ()"
)
library.define("read(Tensor pages, Tensor dense, Tensor state, SymInt length, str spec) -> Tensor")
library.define(
    "attend(Tensor query, Tensor k_pages, Tensor k_dense, Tensor k_state, Tensor v_pages, Tensor v_dense, "
    "Tensor v_state, Tensor? key, Tensor? value, Tensor? attn_mask, Tensor? sinks, Tensor? start, float scale, "
    "float softcap, bool is_causal, str k_spec, str v_spec) -> (Tensor, Tensor)"
)
for _function in (planes.append, planes.read, planes.attend):
    library.impl(_function.__name__, _function, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{NAMESPACE}::append", lib=library)
def _append_fake(pages, dense, state, new, start, spec, score=None):
    return None


@torch.library.register_fake(f"{NAMESPACE}::read", lib=library)
def _read_fake(pages, dense, state, length, spec):
    return dense.new_empty(*dense.shape[:2], length, dense.shape[3])


@torch.library.register_fake(f"{NAMESPACE}::attend", lib=library)
def _attend_fake(query, k_pages, k_dense, k_state, v_pages, v_dense, v_state, *rest):
    batch, heads, rows, _ = query.shape
    out = query.new_empty(batch, rows, heads, v_dense.shape[3]).transpose(1, 2)
    return out, query.new_empty(batch, heads, rows, dtype=torch.float32)


ops = getattr(torch.ops, NAMESPACE)
