"""Quantize and append, `tqc.ops.append` on the device: lengths are read there, so a captured graph can replay it.

One program takes one head and does three things in order:

    prepare     a rewind into a packed page brings that page's tokens back to the ring; the head's centre, if the first
                page is packed now
    encode      the pages that leave the recent window and hold a token that is kept
    store       new tokens into the rows of sinks and ring, then `state`
"""

from __future__ import annotations

import triton
import triton.language as tl

from tqc.lowering.triton.decode import decode_page
from tqc.lowering.triton.encode import all_finite, encode_page, finite_mean
from tqc.lowering.triton.format import PAGE, tile_format
from tqc.lowering.triton.placement import head_balance, head_centre, oldest_page, ring_row, slot_of

# While a launch runs, state[1] counts, in units of this, the programs that are done. The last one writes the
# new state: no other program can still want the old one.
DONE = tl.constexpr(1 << 40)


@triton.jit
def _load_tokens(dense, new, new_row, new_column, length, first, position, element, fmt: tl.constexpr):
    """Tokens at `position` [T], elements `element` [E]: the ring's before `length`, zeros before `first`, then new."""
    row = ring_row(position, fmt)
    inside = (element < fmt.head_dim)[None, :]
    old = (position < length)[:, None]
    ring = tl.load(dense + row[:, None] * fmt.head_dim + element[None, :], mask=old & inside, other=0.0)
    fresh = new + (position - first)[:, None] * new_row + element[None, :] * new_column
    return tl.where(old, ring, tl.load(fresh, mask=(position >= first)[:, None] & inside, other=0.0))


@triton.jit
def _rotated(dense, new, new_row, new_column, length, first, page, matrix, gain, fmt: tl.constexpr):
    """The tokens of a page that is not packed yet, balanced and rotated, float32 [32, D]."""
    D: tl.constexpr = triton.next_power_of_2(fmt.head_dim)
    # float32 takes twice the registers.
    STEP: tl.constexpr = 16 if D > 128 and matrix.dtype.element_ty == tl.float32 else min(D, 32)
    position = fmt.sink_tokens + page * PAGE + tl.arange(0, PAGE)
    column = tl.arange(0, D)
    y = tl.zeros([PAGE, D], tl.float32)
    for e in range(0, D, STEP):
        element = e + tl.arange(0, STEP)
        x = _load_tokens(dense, new, new_row, new_column, length, first, position, element, fmt)
        inside = (element < fmt.head_dim)[:, None] & (column < fmt.head_dim)[None, :]
        m = tl.load(matrix + element[:, None] * fmt.head_dim + column[None, :], mask=inside, other=0.0)
        if fmt.centred:
            y = _balanced_product(x, head_balance(dense, element, fmt), m, y)
        else:
            y = tl.dot(x.to(m.dtype), m, y, input_precision="tf32x3")
    return y * gain


@triton.jit
def _balanced_product(x, balance, m, y):
    """y + (x / balance) @ m, the quotient in float32, or as two bfloat16 numbers where `m` is exact in that."""
    quotient = tl.div_rn(x.to(tl.float32), tl.broadcast_to(balance[None, :], x.shape))
    if m.dtype == tl.float32:
        return tl.dot(quotient, m, y, input_precision="tf32x3")
    else:
        upper = quotient.to(m.dtype)
        y = tl.dot(upper, m, y)
        return tl.dot((quotient - upper.to(tl.float32)).to(m.dtype), m, y)


@triton.jit
def _restore_page(page, dense, row, levels, matrix, gain, fmt: tl.constexpr):
    """Decode a page into the rows of `dense` from `row` on."""
    column = tl.arange(0, triton.next_power_of_2(fmt.head_dim))
    rows = (row + tl.arange(0, PAGE))[:, None] * fmt.head_dim
    x = decode_page(page, dense, levels, matrix, gain, fmt).to(dense.dtype.element_ty)
    tl.store(dense + rows + column[None, :], x, mask=(column < fmt.head_dim)[None, :])


@triton.jit
def _store_tokens(
    dense, dense_head, new, new_row, new_column, begin, end, first, ring: tl.constexpr, fmt: tl.constexpr
):
    """Write the tokens at positions begin .. end, none of them stored before, to the ring or to the sinks."""
    D: tl.constexpr = triton.next_power_of_2(fmt.head_dim)
    ROWS: tl.constexpr = 16
    element = tl.arange(0, D)
    for at in range(begin, end, ROWS):
        position = at + tl.arange(0, ROWS)
        row = position
        if ring:
            row = ring_row(position, fmt)
        known = tl.minimum(position, end - 1)
        x = _load_tokens(dense, new, new_row, new_column, 0, first, known, element, fmt)
        fits = (position < end) & (row * fmt.head_dim < dense_head)
        mask = fits[:, None] & (element < fmt.head_dim)[None, :]
        tl.store(dense + row[:, None] * fmt.head_dim + element[None, :], x, mask=mask)


@triton.jit
def _append_head(
    store, tokens, tables, fmt: tl.constexpr, start, count, heads,
    PREPARE: tl.constexpr, ENCODE: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """This program's head of one tensor; the tuples are those of `append_kernel`."""
    pages, num_pages, dense, dense_head, state = store
    new, new_batch, new_head, new_row, new_column = tokens
    levels, boundaries, search, matrix, gain = tables
    SINKS: tl.constexpr = fmt.sink_tokens
    WINDOW: tl.constexpr = fmt.residual_window
    D: tl.constexpr = triton.next_power_of_2(fmt.head_dim)
    head = tl.program_id(0).to(tl.int64)
    pages += head * num_pages * fmt.page_bytes
    dense += head * dense_head
    new += head // heads * new_batch + head % heads * new_head

    stored = tl.load(state)
    packed = tl.load(state + 1) % DONE
    first = stored
    if start is not None:
        first = tl.load(start).to(tl.int64)
    length = tl.minimum(stored, first)
    kept = tl.maximum(length - SINKS, 0)
    torn = (kept < packed) & (kept % PAGE > 0)
    packed = tl.where(kept < packed, kept // PAGE * PAGE, packed)
    end = first + count
    packed_after = tl.maximum(end - SINKS - WINDOW + PAGE - 1, 0) // PAGE * PAGE
    packed_after = tl.maximum(packed, packed_after)
    full = dense_head >= fmt.dense_rows * fmt.head_dim
    tl.device_assert((packed_after == 0) | full, "dense is too small")
    packed_after = tl.where(full, packed_after, 0)
    oldest = 0
    slots = None
    if fmt.keep is not None:
        begin = tl.maximum(tl.load(state + 2), end - fmt.keep)
        oldest = oldest_page(begin, fmt)
        slots = num_pages
    tl.device_assert(packed_after // PAGE - oldest <= num_pages, "pages are full")

    if PREPARE:
        if torn:
            page = pages + slot_of(packed // PAGE, slots) * fmt.page_bytes
            _restore_page(page, dense, SINKS + packed % WINDOW, levels, matrix, gain, fmt)
            tl.debug_barrier()
        if fmt.centred:
            if (packed == 0) & (packed_after > 0):
                y = _rotated(dense, new, new_row, new_column, length, first, packed, matrix, gain, fmt)
                centre = finite_mean(y, all_finite(y))
                # A rotated mean can exceed float16 where no coordinate did; the page's centre makes up for the clamp.
                if dense.dtype.element_ty == tl.float16:
                    centre = tl.minimum(tl.maximum(centre, -65504.0), 65504.0)
                elif dense.dtype.element_ty == tl.bfloat16:
                    centre = tl.minimum(tl.maximum(centre, -3.3895313892515355e38), 3.3895313892515355e38)
                column = tl.arange(0, D)
                row = head_centre(dense, fmt) + column
                tl.store(row, centre.to(dense.dtype.element_ty), mask=column < fmt.head_dim)
                tl.debug_barrier()
    if ENCODE:
        centre = tl.zeros([D], tl.float32)
        if fmt.centred:
            column = tl.arange(0, D)
            inside = full & (column < fmt.head_dim)
            centre = tl.load(head_centre(dense, fmt) + column, mask=inside, other=0.0).to(tl.float32)
        page_first = tl.maximum(packed // PAGE, oldest) + tl.program_id(1)
        page_end = tl.minimum(packed_after // PAGE, oldest + num_pages)
        for page in range(page_first, page_end, tl.num_programs(1)):
            y = _rotated(dense, new, new_row, new_column, length, first, page, matrix, gain, fmt)
            out = pages + slot_of(page, slots) * fmt.page_bytes
            encode_page(out, y, centre, levels, boundaries, search, fmt)
    if STORE:
        tl.debug_barrier()
        sink_end = tl.minimum(end, SINKS)
        _store_tokens(dense, dense_head, new, new_row, new_column, length, sink_end, first, False, fmt)
        ring_first = tl.maximum(length, SINKS + packed_after)
        _store_tokens(dense, dense_head, new, new_row, new_column, ring_first, end, first, True, fmt)
        done = tl.atomic_add(state + 1, DONE) // DONE
        if done == tl.num_programs(0) - 1:
            tl.store(state, end)
            tl.store(state + 1, packed_after)
            if fmt.keep is not None:
                tl.store(state + 2, begin)


@triton.jit
def append_kernel(
    k_pages,
    k_num_pages,
    k_dense,
    k_dense_head,
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
    v_dense_head,
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
        *_dense_head: stride of the heads in `dense`.
        *_batch, *_head, *_row, *_column: strides of the new tokens. The tables are those of `append_tables`.
    """
    if tl.program_id(2) == 0:
        k_fmt: tl.constexpr = tile_format(k_spec)
        k_store = (k_pages, k_num_pages, k_dense, k_dense_head, k_state)
        k_tokens = (k_new, k_batch, k_head, k_row, k_column)
        k_tables = (k_levels, k_boundaries, k_search, k_matrix, k_gain)
        _append_head(k_store, k_tokens, k_tables, k_fmt, start, count, heads, PREPARE, ENCODE, STORE)
    if v_spec is not None:
        if tl.program_id(2) == 1:
            v_fmt: tl.constexpr = tile_format(v_spec)
            v_store = (v_pages, v_num_pages, v_dense, v_dense_head, v_state)
            v_tokens = (v_new, v_batch, v_head, v_row, v_column)
            v_tables = (v_levels, v_boundaries, v_search, v_matrix, v_gain)
            _append_head(v_store, v_tokens, v_tables, v_fmt, start, count, heads, PREPARE, ENCODE, STORE)
