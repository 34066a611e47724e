"""Quantize and append, `tqc.ops.append` on the device: lengths are read there, so a captured graph can replay it.

One program takes one head and does three things in order:

    prepare     a rewind into a packed page brings that page's tokens back to the ring; the head's centre, if the first
                page is packed now
    encode      the pages that leave the recent window
    store       new tokens into the rows of sinks and ring, then `state`

A few tokens, as in decoding, take one launch for keys and values together. Many take one launch for each step, so that
all pages are encoded at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from tqc.format import PackedFormat
from tqc.lowering.triton.encode import (
    PAGE_TOKENS,
    all_finite,
    decode_page,
    encode_page,
    finite_mean,
    gain,
    packed_format,
    rotation,
    search_factors,
)

# While a launch runs, state[1] counts, in units of this, the programs that are done. The last one writes the
# new state: no other program can still want the old one.
DONE = tl.constexpr(1 << 40)
# Up to so many new tokens a head's pages are encoded one after the other by the program that does the rest.
ONE_LAUNCH_TOKENS = 64
# Programs that share the pages of one head when there are many: at least so many pages each.
PAGES_PER_PROGRAM = 4


def append(
    pages: Tensor,
    dense: Tensor,
    state: Tensor,
    new: Tensor,
    start: Tensor | None,
    spec: str,
    tables: Sequence[Tensor] | None = None,
) -> None:
    """As `tqc.ops.append`.

    Args:
        tables: those of `append_tables`, given where torch shall see the launch (see `traced_ops`); as below.

    Raises:
        ValueError: if shapes or dtypes do not fit each other and `spec`. Whether `pages` has room is known to the
            device alone: what does not fit is not written (TRITON_DEBUG=1 makes it an assertion).
    """
    _launch([_checked(pages, dense, state, new, spec)], start, tables)


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
    tables: Sequence[Tensor] | None = None,
) -> None:
    """`append` of keys and of values by the same launches.

    Raises:
        ValueError: as `append`, or if keys and values differ in batch, heads or number.
    """
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key and value must hold the same tokens, got shapes {tuple(key.shape)} and {tuple(value.shape)}"
        )
    keys = _checked(k_pages, k_dense, k_state, key, k_spec)
    _launch([keys, _checked(v_pages, v_dense, v_state, value, v_spec)], start, tables)


def _checked(pages: Tensor, dense: Tensor, state: Tensor, new: Tensor, spec: str):
    fmt = PackedFormat.parse(spec)
    batch, heads, _, head_dim = new.shape
    if head_dim != fmt.head_dim or pages.shape[3] != fmt.page_bytes:
        raise ValueError(f"spec {spec!r} does not fit new {tuple(new.shape)} and pages {tuple(pages.shape)}")
    if pages.shape[:2] != (batch, heads) or dense.shape != (batch, heads, fmt.dense_rows, head_dim):
        raise ValueError(
            f"new {tuple(new.shape)} does not fit pages {tuple(pages.shape)} and dense {tuple(dense.shape)}"
        )
    if new.dtype != dense.dtype:
        raise ValueError(f"new must have dense's dtype {dense.dtype}, got {new.dtype}")
    if not (pages.is_contiguous() and dense.is_contiguous()):
        raise ValueError("pages and dense must be contiguous")
    return pages, dense, state, new, fmt


# Arguments of `_append` for keys, and for values.
_ARGUMENTS = (
    *("pages", "num_pages", "dense", "state", "new", "batch", "head", "row", "column"),
    *("levels", "boundaries", "search", "matrix", "gain", "spec"),
)
_NAMES = tuple(tuple(f"{side}_{name}" for name in _ARGUMENTS) for side in "kv")


def _launch(tensors: list, start: Tensor | None, tables: Sequence[Tensor] | None) -> None:
    kernel = _append if tables is None else wrap_triton(_append)
    arguments: dict[str, Any] = dict.fromkeys(_NAMES[1])
    for index, (pages, dense, state, new, fmt) in enumerate(tensors):
        of_format = append_tables(fmt.spec, new.dtype, new.device) if tables is None else tables[4 * index :][:4]
        values = (pages, pages.shape[2], dense, state, new, *new.stride(), *of_format, gain(fmt, new.dtype), fmt.spec)
        arguments.update(zip(_NAMES[index], values, strict=True))
    batch, heads, count, _ = tensors[0][3].shape
    programs = batch * heads
    # float32 takes twice the registers.
    exact = tensors[0][3].dtype == torch.float32
    warps = min(8, max(4, max(fmt.head_dim for *_, fmt in tensors) // (16 if exact else 32)))

    def launch(chunks: int, prepare: bool, encode: bool, store: bool) -> None:
        kernel[(programs, chunks, len(tensors))](
            **arguments,
            start=start,
            count=count,
            heads=heads,
            PREPARE=prepare,
            ENCODE=encode,
            STORE=store,
            num_warps=warps,
        )

    if count <= ONE_LAUNCH_TOKENS:
        launch(1, True, True, True)
    else:
        chunks = triton.cdiv(count, PAGE_TOKENS.value * PAGES_PER_PROGRAM)
        launch(1, True, False, False)
        launch(chunks, False, True, False)
        launch(1, False, False, True)


@cache
def append_tables(spec: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """What the kernel reads besides its arguments: levels, boundaries between them, scales to try, the rotation."""
    fmt = PackedFormat.parse(spec)
    return fmt.levels(device), fmt.boundaries(device), search_factors(device), rotation(fmt, dtype, device)


@triton.jit
def _load_tokens(dense, new, new_row, new_column, length, first, position, element, fmt: tl.constexpr):
    """Tokens at `position` [T], elements `element` [E]: the ring's before `length`, zeros before `first`, then new."""
    row = 1 + fmt.sink_tokens + (position - fmt.sink_tokens) % fmt.residual_window
    inside = (element < fmt.head_dim)[None, :]
    old = (position < length)[:, None]
    ring = tl.load(dense + row[:, None] * fmt.head_dim + element[None, :], mask=old & inside, other=0.0)
    fresh = new + (position - first)[:, None] * new_row + element[None, :] * new_column
    return tl.where(old, ring, tl.load(fresh, mask=(position >= first)[:, None] & inside, other=0.0))


@triton.jit
def _rotated(dense, new, new_row, new_column, length, first, page, matrix, gain, fmt: tl.constexpr):
    """The tokens of a page that is not packed yet, rotated, float32 [32, D]."""
    D: tl.constexpr = triton.next_power_of_2(fmt.head_dim)
    # float32 takes twice the registers.
    STEP: tl.constexpr = 16 if D > 128 and matrix.dtype.element_ty == tl.float32 else min(D, 32)
    position = fmt.sink_tokens + page * PAGE_TOKENS + tl.arange(0, PAGE_TOKENS)
    column = tl.arange(0, D)
    y = tl.zeros([PAGE_TOKENS, D], tl.float32)
    for e in range(0, D, STEP):
        element = e + tl.arange(0, STEP)
        x = _load_tokens(dense, new, new_row, new_column, length, first, position, element, fmt)
        inside = (element < fmt.head_dim)[:, None] & (column < fmt.head_dim)[None, :]
        m = tl.load(matrix + element[:, None] * fmt.head_dim + column[None, :], mask=inside, other=0.0)
        y = tl.dot(x.to(m.dtype), m, y, input_precision="tf32x3")
    return y * gain


@triton.jit
def _restore_page(page, dense, row, levels, matrix, gain, fmt: tl.constexpr):
    """Decode a page into the rows of `dense` from `row` on."""
    column = tl.arange(0, triton.next_power_of_2(fmt.head_dim))
    rows = (row + tl.arange(0, PAGE_TOKENS))[:, None] * fmt.head_dim
    x = decode_page(page, dense, levels, matrix, gain, fmt).to(dense.dtype.element_ty)
    tl.store(dense + rows + column[None, :], x, mask=(column < fmt.head_dim)[None, :])


@triton.jit
def _store_tokens(dense, new, new_row, new_column, begin, end, first, ring: tl.constexpr, fmt: tl.constexpr):
    """Write the tokens at positions begin .. end, none of them stored before, to the ring or to the sinks."""
    D: tl.constexpr = triton.next_power_of_2(fmt.head_dim)
    ROWS: tl.constexpr = 16
    element = tl.arange(0, D)
    for at in range(begin, end, ROWS):
        position = at + tl.arange(0, ROWS)
        row = 1 + position
        if ring:
            row = 1 + fmt.sink_tokens + (position - fmt.sink_tokens) % fmt.residual_window
        known = tl.minimum(position, end - 1)
        x = _load_tokens(dense, new, new_row, new_column, 0, first, known, element, fmt)
        mask = (position < end)[:, None] & (element < fmt.head_dim)[None, :]
        tl.store(dense + row[:, None] * fmt.head_dim + element[None, :], x, mask=mask)


@triton.jit
def _append_tensor(
    tensor, fmt: tl.constexpr, start, count, heads, PREPARE: tl.constexpr, ENCODE: tl.constexpr, STORE: tl.constexpr
):
    pages, num_pages, dense, state, new, strides, levels, boundaries, search, matrix, gain = tensor
    new_batch, new_head, new_row, new_column = strides
    SINKS: tl.constexpr = fmt.sink_tokens
    WINDOW: tl.constexpr = fmt.residual_window
    D: tl.constexpr = triton.next_power_of_2(fmt.head_dim)
    head = tl.program_id(0).to(tl.int64)
    pages += head * num_pages * fmt.page_bytes
    dense += head * fmt.dense_rows * fmt.head_dim
    new += head // heads * new_batch + head % heads * new_head

    stored = tl.load(state)
    packed = tl.load(state + 1) % DONE
    first = stored
    if start is not None:
        first = tl.load(start).to(tl.int64)
    length = tl.minimum(stored, first)
    kept = tl.maximum(length - SINKS, 0)
    torn = (kept < packed) & (kept % PAGE_TOKENS > 0)
    packed = tl.where(kept < packed, kept // PAGE_TOKENS * PAGE_TOKENS, packed)
    end = first + count
    packed_after = tl.maximum(end - SINKS - WINDOW + PAGE_TOKENS - 1, 0) // PAGE_TOKENS * PAGE_TOKENS
    packed_after = tl.maximum(packed, packed_after)
    tl.device_assert(packed_after // PAGE_TOKENS <= num_pages, "pages are full")

    if PREPARE:
        if torn:
            page = packed // PAGE_TOKENS
            row = 1 + SINKS + packed % WINDOW
            _restore_page(pages + page * fmt.page_bytes, dense, row, levels, matrix, gain, fmt)
            tl.debug_barrier()
        if (packed == 0) & (packed_after > 0):
            column = tl.arange(0, D)
            centre = tl.zeros([D], tl.float32)
            if fmt.centred:
                y = _rotated(dense, new, new_row, new_column, length, first, packed, matrix, gain, fmt)
                centre = finite_mean(y, all_finite(y))
                # A rotated mean can exceed float16 where no coordinate did; the page's centre makes up for the clamp.
                if dense.dtype.element_ty == tl.float16:
                    centre = tl.minimum(tl.maximum(centre, -65504.0), 65504.0)
                elif dense.dtype.element_ty == tl.bfloat16:
                    centre = tl.minimum(tl.maximum(centre, -3.3895313892515355e38), 3.3895313892515355e38)
            tl.store(dense + column, centre.to(dense.dtype.element_ty), mask=column < fmt.head_dim)
            tl.debug_barrier()
    if ENCODE:
        column = tl.arange(0, D)
        centre = tl.load(dense + column, mask=column < fmt.head_dim, other=0.0).to(tl.float32)
        begin = packed // PAGE_TOKENS + tl.program_id(1)
        for page in range(begin, tl.minimum(packed_after // PAGE_TOKENS, num_pages), tl.num_programs(1)):
            y = _rotated(dense, new, new_row, new_column, length, first, page, matrix, gain, fmt)
            encode_page(pages + page * fmt.page_bytes, y, centre, levels, boundaries, search, fmt)
    if STORE:
        tl.debug_barrier()
        _store_tokens(dense, new, new_row, new_column, length, tl.minimum(end, SINKS), first, False, fmt)
        begin = tl.maximum(length, SINKS + packed_after)
        _store_tokens(dense, new, new_row, new_column, begin, end, first, True, fmt)
        done = tl.atomic_add(state + 1, DONE) // DONE
        if done == tl.num_programs(0) - 1:
            tl.store(state, end)
            tl.store(state + 1, packed_after)


@triton.jit
def _append(
    k_pages,
    k_num_pages,
    k_dense,
    k_state,
    k_new,
    k_batch,
    k_head,
    k_row,
    k_column,
    k_levels,
    k_boundaries,
    k_search,
    k_matrix,
    k_gain: tl.constexpr,
    v_pages,
    v_num_pages,
    v_dense,
    v_state,
    v_new,
    v_batch,
    v_head,
    v_row,
    v_column,
    v_levels,
    v_boundaries,
    v_search,
    v_matrix,
    v_gain: tl.constexpr,
    start,
    count,
    heads,
    k_spec: tl.constexpr,
    v_spec: tl.constexpr,
    PREPARE: tl.constexpr,
    ENCODE: tl.constexpr,
    STORE: tl.constexpr,
):
    """One head of keys, or of values where the third program index is 1; without values, all of v_* is None.

    Args:
        *_batch, *_head, *_row, *_column: strides of the new tokens. The tables are those of `append_tables`.
    """
    if tl.program_id(2) == 0:
        k_fmt: tl.constexpr = packed_format(k_spec)
        keys = (
            k_pages,
            k_num_pages,
            k_dense,
            k_state,
            k_new,
            (k_batch, k_head, k_row, k_column),
            k_levels,
            k_boundaries,
            k_search,
            k_matrix,
            k_gain,
        )
        _append_tensor(keys, k_fmt, start, count, heads, PREPARE, ENCODE, STORE)
    if v_spec is not None:
        if tl.program_id(2) == 1:
            v_fmt: tl.constexpr = packed_format(v_spec)
            values = (
                v_pages,
                v_num_pages,
                v_dense,
                v_state,
                v_new,
                (v_batch, v_head, v_row, v_column),
                v_levels,
                v_boundaries,
                v_search,
                v_matrix,
                v_gain,
            )
            _append_tensor(values, v_fmt, start, count, heads, PREPARE, ENCODE, STORE)
