"""Packed caches and calls of ops, drawn by hypothesis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import tqc.ops
from tests.lowering.common import DTYPES
from tqc.format import PackedFormat
from tqc.ops import Op, Planes

OPS = [op for op in vars(tqc.ops).values() if isinstance(op, Op)]


def formats(**given: Any) -> st.SearchStrategy[PackedFormat]:
    drawn = {
        "head_dim": st.sampled_from([8, 16, 24]),
        "bits": st.integers(1, 8),
        "centred": st.booleans(),
        "sink_tokens": st.sampled_from([0, 4]),
        "residual_window": st.sampled_from([32, 96]),
        "folded": st.just(False),
        "keep": st.just(None),
    }
    return st.builds(PackedFormat, **(drawn | given))


def tokens(batch: int, heads: int, n: int, fmt: PackedFormat, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """With a mean, so that centres matter."""
    generator = torch.Generator().manual_seed(1000 * n + seed)
    return (torch.randn(batch, heads, n, fmt.head_dim, generator=generator) + 0.5).to(dtype)


def with_room(cache: Planes, capacity: int) -> Planes:
    """`cache` with pages for `capacity` tokens, those that hold nothing full of NaNs."""
    pages = max(cache.fmt.pages_for(capacity), cache.pages.shape[2])
    more = cache.pages.new_full((*cache.pages.shape[:2], pages, cache.fmt.page_bytes), 255)
    more[:, :, : cache.pages.shape[2]] = cache.pages
    return replace(cache.copy(capacity), pages=more)


def draw_calls(data: st.DataObject, head_dims: list[int], longest: int = 100) -> list[tuple[Op, dict[str, Any]]]:
    """A call of each op, whose traceable form takes it too: pages have room, writes are appends."""
    dims = st.sampled_from(head_dims)
    centred, folded = data.draw(st.booleans()), data.draw(st.booleans())
    k_fmt = data.draw(formats(head_dim=dims, centred=st.just(centred)))
    v_fmt = data.draw(formats(head_dim=dims, centred=st.just(False), folded=st.just(folded)))
    batch, heads, group = (data.draw(st.integers(1, 2)) for _ in range(3))
    dtype = data.draw(st.sampled_from(DTYPES))
    stored, n, rows = data.draw(st.integers(0, 170)), data.draw(st.integers(0, longest)), data.draw(st.integers(1, 3))
    capacity = stored + n + data.draw(st.integers(0, 40))

    def new(count: int, fmt: PackedFormat) -> Tensor:
        return tokens(batch, heads, count, fmt, dtype)

    def cache(fmt: PackedFormat, length: int) -> Planes:
        return with_room(replace(tqc.ops.pack(new(stored, fmt), fmt.spec), length=length), capacity)

    start = data.draw(st.sampled_from([None, 3, torch.tensor([0])]))
    positions = data.draw(st.sampled_from([stored, stored // 2, torch.arange(stored, stored + n)]))
    query = tokens(batch, heads * group, rows, k_fmt, dtype)
    attention = {"query": query, "keys": cache(k_fmt, stored), "values": cache(v_fmt, stored)}
    key, value = new(n, k_fmt), new(n, v_fmt)
    mask = torch.ones(rows, stored + n, dtype=torch.bool)
    written = {"positions": positions, "count": n, "attn_mask": None}
    specs = {"k_spec": k_fmt.spec, "v_spec": v_fmt.spec}
    calls: list[tuple[Op, dict[str, Any]]] = [
        (tqc.ops.pack, {"new": key, "spec": k_fmt.spec, "start": start, "capacity": capacity + 3}),
        (tqc.ops.pack, {"new": value, "spec": v_fmt.spec, "start": data.draw(st.sampled_from([None, 0, 40]))}),
        (tqc.ops.extend, {"cache": cache(k_fmt, stored), "new": key}),
        (tqc.ops.write, {"cache": cache(v_fmt, capacity), "new": value, "positions": positions}),
        (tqc.ops.rewind, {"cache": cache(k_fmt, stored), "length": data.draw(st.integers(0, stored))}),
        (tqc.ops.window, {"cache": cache(k_fmt, stored), "begin": stored // 3, "end": stored, "keep": stored + 1}),
        (tqc.ops.attend, {**attention, "return_lse": True, "sinks": torch.zeros(heads * group)}),
        (tqc.ops.attend, {**attention, "key": key, "value": value, "attn_mask": mask, "scale": 0.2}),
        (tqc.ops.read, {"cache": cache(v_fmt, capacity)}),
        (tqc.ops.fold, {"x": key.flatten(2), "spec": k_fmt.spec, "start": k_fmt.head_dim if n > 1 else 0}),
        (tqc.ops.fold, {"x": value, "spec": v_fmt.spec, "dim": 3}),
        (tqc.ops.unfold, {"output": key, "spec": k_fmt.spec}),
        (tqc.ops.update, {"cache": cache(v_fmt, capacity), "new": cache(v_fmt, capacity)}),
    ]
    if n:
        dense = {"keys": new(capacity, k_fmt), "values": new(capacity, v_fmt)}
        calls.append((tqc.ops.adopt, {**dense, **written, **specs}))
    return calls
