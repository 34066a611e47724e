"""The provider's functions as ops that torch can look into: `torch.ops.tqai_triton_1.attend` and so on.

For graphs that `torch.compile`, `make_fx` or `torch.export` makes of CUDA tensors: the ops unfold to the kernels, so
that Inductor plans memory and writes launches around them. Eager code calls the plain functions, which cost less (an op
goes through the dispatcher and `torch.library`'s wrappers to the same launch).

Arguments are those of the functions of the same names, and `tables`: constants that a kernel reads are inputs here,
since tensors made while tracing would be fake. `attend_tables`, `append_tables` (those of keys, then those of values)
and `read_tables` give them.

The namespace's number goes up whenever a schema or what an op writes changes: torch's caches know an op by its name.
"""

from __future__ import annotations

from torch import Tensor
from torch.library import triton_op

from tqc.lowering.triton import append as _append
from tqc.lowering.triton import append_pair as _append_pair
from tqc.lowering.triton import attend as _attend
from tqc.lowering.triton import attend_paged as _attend_paged
from tqc.lowering.triton import read as _read

NAMESPACE = "tqai_triton_1"


@triton_op(f"{NAMESPACE}::append", mutates_args=("pages", "dense", "state"))
def append(
    pages: Tensor, dense: Tensor, state: Tensor, new: Tensor, start: Tensor | None, spec: str, tables: list[Tensor]
) -> None:
    _append(pages, dense, state, new, start, spec, tables)


@triton_op(f"{NAMESPACE}::append_pair", mutates_args=("k_pages", "k_dense", "k_state", "v_pages", "v_dense", "v_state"))
def append_pair(
    k_pages: Tensor,
    k_dense: Tensor,
    k_state: Tensor,
    key: Tensor,
    v_pages: Tensor,
    v_dense: Tensor,
    v_state: Tensor,
    value: Tensor,
    start: Tensor | None,
    k_spec: str,
    v_spec: str,
    tables: list[Tensor],
) -> None:
    k, v = (k_pages, k_dense, k_state), (v_pages, v_dense, v_state)
    _append_pair(*k, key, *v, value, start, k_spec, v_spec, tables)


@triton_op(f"{NAMESPACE}::read", mutates_args=())
def read(pages: Tensor, dense: Tensor, state: Tensor, length: int, spec: str, tables: list[Tensor]) -> Tensor:
    return _read(pages, dense, state, length, spec, tables)


@triton_op(f"{NAMESPACE}::attend", mutates_args=())
def attend(
    query: Tensor,
    k_pages: Tensor,
    k_dense: Tensor,
    k_state: Tensor,
    v_pages: Tensor,
    v_dense: Tensor,
    v_state: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    start: Tensor | None,
    scale: float,
    softcap: float,
    is_causal: bool,
    k_spec: str,
    v_spec: str,
    tables: list[Tensor],
) -> tuple[Tensor, Tensor]:
    return _attend(
        query, k_pages, k_dense, k_state, v_pages, v_dense, v_state, key, value, attn_mask, sinks, start, scale,
        softcap, is_causal, k_spec, v_spec, tables,
    )  # fmt: skip


@triton_op(f"{NAMESPACE}::attend_paged", mutates_args=())
def attend_paged(
    query: Tensor,
    k_pool: Tensor,
    k_dense: Tensor,
    v_pool: Tensor,
    v_dense: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    k_spec: str,
    v_spec: str,
    scale: float,
    block_pages: int,
    padding: Tensor | None,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    softcap: float,
    is_causal: bool,
    tables: list[Tensor],
) -> tuple[Tensor, Tensor]:
    stored = (k_pool, k_dense, v_pool, v_dense, page_table, lengths)
    return _attend_paged(
        query, *stored, key, value, k_spec, v_spec, scale=scale, block_pages=block_pages, padding=padding,
        attn_mask=attn_mask, sinks=sinks, softcap=softcap, is_causal=is_causal, tables=tables,
    )  # fmt: skip
