"""Attention over packed pages, dense slots and new tokens: one kernel for decoding, prefill and paged storage.

A program takes a block of query rows of one key/value head (the rows of all its query heads, so that a tile is decoded
once for the group) and one share of the packed tokens. It rotates its queries, walks over its tiles, un-rotates what it
summed, and, if it is the last share, goes on over the dense slots and the new tokens. With several shares
`merge_kernel` joins them by their log-sum-exps.

No size depends on how many tokens are stored: that is read on the device, so a launch can be part of a CUDA graph.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tqc.lowering.triton.format import tile_format
from tqc.lowering.triton.page import (
    PAGE,
    centre_codes,
    centre_unit,
    column_element,
    levels_tile,
    page_base,
    power_of_two,
    scale_parts,
    token_scales,
)
from tqc.lowering.triton.tile import LOG2E, capped, dot, dot_by_parts, masked, opaque, rotated, softmax_step, unrotated


@triton.jit
def _stored(k_state, v_state, lengths, start, b, fmt: tl.constexpr):
    """(tokens stored, of which packed, position of the first new token, whether keys and values agree)."""
    if lengths is not None:
        length = tl.load(lengths + b).to(tl.int64)
        over = length - fmt.sink_tokens - fmt.residual_window
        packed = (tl.maximum(over, 0) + PAGE - 1) // PAGE * PAGE
        return length, packed, length, length == length
    else:
        length = tl.load(k_state)
        packed = tl.load(k_state + 1)
        v_length = tl.load(v_state)
        first = tl.maximum(length, v_length)
        if start is not None:
            first = tl.load(start).to(tl.int64)
        return tl.minimum(length, first), packed, first, tl.minimum(length, first) == tl.minimum(v_length, first)


@triton.jit
def _page_at(index, last, b, table, table_step, stride, BLOCK_PAGES: tl.constexpr):
    """Where pages `index` of a head begin, none behind `last`, in units of 16 bytes. stride: from page to page."""
    index = tl.minimum(index, last)
    if table is not None:
        block = tl.load(table + b * table_step + index // BLOCK_PAGES).to(tl.int64)
        index = block * BLOCK_PAGES + index % BLOCK_PAGES
    return index * stride


@triton.jit
def _rows(begin, heads, group, rows, ROWS: tl.constexpr):
    """Position and query head of each row of a block, and whether there is such a row."""
    row = begin + tl.arange(0, ROWS)
    return row // group, (tl.program_id(1) % heads) * group + row % group, row < rows * group


@triton.jit
def _q_address(query, strides, b, q_head, i):
    return query + b * strides[0] + q_head.to(tl.int64) * strides[1] + i.to(tl.int64) * strides[2]


@triton.jit
def _mask_row(mask, strides, b, q_head, i):
    """Pointers to each row's first column of the mask, and the step from column to column."""
    if mask is not None:
        return mask + b * strides[0] + q_head.to(tl.int64) * strides[1] + i.to(tl.int64) * strides[2], strides[3]
    else:
        return None, 0


@triton.jit
def attend_kernel(
    query,
    q_batch,
    q_head_step,
    q_row,
    k_pages,
    k_page_batch,
    k_page_head,
    k_page_step,
    v_pages,
    v_page_batch,
    v_page_head,
    v_page_step,
    table,
    table_step,
    k_dense,
    v_dense,
    k_state,
    v_state,
    lengths,
    padding,
    start,
    key,
    key_batch,
    key_head,
    key_row,
    value,
    value_batch,
    value_head,
    value_row,
    mask,
    mask_batch,
    mask_head,
    mask_row_step,
    mask_step,
    sinks,
    k_rotation,
    v_rotation,
    k_levels,
    v_levels,
    out,
    lse,
    heads,
    group,
    rows,
    new,
    columns,
    k_spec: tl.constexpr,
    v_spec: tl.constexpr,
    scale: tl.constexpr,
    softcap: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK_PAGES: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    DENSE_TILE: tl.constexpr,
    SAVE_REGISTERS: tl.constexpr,
):
    """See `tqc.ops.attend`. Grid: (blocks of rows, batch * heads, SHARES).

    Args:
        table: int32 [batch, ...], the block of BLOCK_PAGES pages that holds each part of a sequence, or None.
        lengths: int32 [batch], tokens stored, in place of the states, or None.
        padding: int32 [batch], columns at the left that nothing attends to, or None.
        CAUSAL: 0 without; 1 where each query sees all stored tokens; 2 where new tokens are fewer than queries.
        new, columns: how many new tokens there are, and columns of the mask (0 without one).
        out: with one share [batch, rows, query_heads, head_dim]; else float32, [SHARES, ...] of that.
        lse: float32 [batch, query_heads, rows]; with several shares [SHARES, batch, query_heads, rows], in log2.
        SAVE_REGISTERS: whether to do so in ways in which torch's search for the tensors that a kernel writes gets lost.
        The rest are tensors with their strides in front of the last axis, sizes, and specs of the formats.
    """
    k_fmt: tl.constexpr = tile_format(k_spec)
    v_fmt: tl.constexpr = tile_format(v_spec)
    q_strides = (q_batch, q_head_step, q_row)
    k_page_strides = (k_page_batch, k_page_head, k_page_step)
    v_page_strides = (v_page_batch, v_page_head, v_page_step)
    key_strides = (key_batch, key_head, key_row)
    value_strides = (value_batch, value_head, value_row)
    mask_strides = (mask_batch, mask_head, mask_row_step, mask_step)
    EXACT: tl.constexpr = query.dtype.element_ty == tl.float32
    K_WIDTH: tl.constexpr = triton.next_power_of_2(k_fmt.head_dim)
    V_WIDTH: tl.constexpr = triton.next_power_of_2(v_fmt.head_dim)
    V_COLUMNS: tl.constexpr = v_fmt.columns
    PAGES: tl.constexpr = TILE // PAGE
    # In float32 an operand takes up to four times the registers.
    PARTS: tl.constexpr = max(k_fmt.columns // 32, 1) if EXACT else 1
    DENSE_PARTS: tl.constexpr = max(K_WIDTH // 32, 1) if EXACT else 1
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    share = tl.program_id(2)
    i, q_head, row_valid = _rows(tl.program_id(0) * ROWS, heads, group, rows, ROWS)
    mask_row, mask_step = _mask_row(mask, mask_strides, b, q_head, i)

    stored, packed, first, agree = _stored(k_state, v_state, lengths, start, b, k_fmt)
    hidden = 0
    if padding is not None:
        hidden = tl.load(padding + b)
    last = i + (new - rows)  # the last column that a causal row sees, counted from `first`
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((V_WIDTH, ROWS), tl.float32)

    # The packed tokens.
    coded = tl.maximum(tl.minimum(packed, stored - k_fmt.sink_tokens), 0).to(tl.int32)
    tiles = tl.cdiv(coded, TILE)
    each = tl.cdiv(tiles, tl.maximum(SHARES - 1, 1))
    tile_first = share * each
    tile_end = tl.minimum(tile_first + each, tiles)
    if tile_first < tile_end:
        q_address = _q_address(query, q_strides, b, q_head, i)
        q, factor, energy = rotated(q_address, row_valid, k_rotation, k_fmt, EXACT)
        factor *= scale * LOG2E
        half_variance = energy * (0.5 * k_fmt.score_variance * LOG2E * scale * scale)
        k_element, k_exists = column_element(k_fmt)
        v_element, v_exists = column_element(v_fmt)
        k_head = k_dense + (b * heads + h) * (k_fmt.dense_rows * k_fmt.head_dim)
        v_head = v_dense + (b * heads + h) * (v_fmt.dense_rows * v_fmt.head_dim)
        bias = tl.zeros((ROWS,), tl.float32)
        if k_fmt.centred:
            centre = tl.load(k_head + k_element, mask=k_exists, other=0).to(tl.float32)
            bias = tl.sum(q.to(tl.float32) * centre[:, None], axis=0)
        summed = tl.zeros((V_COLUMNS, ROWS), tl.float32)
        # Sums of weights over the places in a tile that one lane holds: lanes are added up once, behind the loop.
        PLACES: tl.constexpr = min(TILE, 64)
        sums = tl.zeros((PLACES, ROWS), tl.float32)
        last_page = (coded - 1) // PAGE
        place = tl.arange(0, TILE)
        in_page = place % PAGE
        of_token = place // PAGE
        of_tile = tl.arange(0, PAGES)
        k_of_head = k_pages + b * k_page_strides[0] + h * k_page_strides[1]
        v_of_head = v_pages + b * v_page_strides[0] + h * v_page_strides[1]
        k_step = k_page_strides[2]
        v_step = v_page_strides[2]
        # Scales are fetched a tile ahead by hand: single bytes are no part of Triton's pipeline.
        page = tile_first * PAGES
        at = _page_at(page + of_token, last_page, b, table, table_step, k_step, BLOCK_PAGES)
        k_code, k_base = scale_parts(k_of_head, at, in_page)
        at = _page_at(page + of_token, last_page, b, table, table_step, v_step, BLOCK_PAGES)
        v_code, v_base = scale_parts(v_of_head, at, in_page)
        v_bases = page_base(v_of_head, _page_at(page + of_tile, last_page, b, table, table_step, v_step, BLOCK_PAGES))
        for tile in range(tile_first, tile_end):
            page = tile * PAGES
            inside = place < coded - tile * TILE
            scales = token_scales(k_code, k_base)
            at = _page_at(page + PAGES + of_token, last_page, b, table, table_step, k_step, BLOCK_PAGES)
            k_code, k_base = scale_parts(k_of_head, at, in_page)
            at = _page_at(page + of_token, last_page, b, table, table_step, k_step, BLOCK_PAGES)
            levels = levels_tile(k_of_head, at, in_page, k_levels, k_fmt, EXACT)
            scores = dot_by_parts(levels, q, PARTS) * scales[:, None]
            if k_fmt.centred:
                pages_at = _page_at(page + of_tile, last_page, b, table, table_step, k_step, BLOCK_PAGES)
                of_page = dot_by_parts(centre_codes(k_of_head, pages_at, k_fmt).to(q.dtype), q, PARTS)
                of_page = of_page * centre_unit(k_of_head, pages_at)[:, None] + bias[None, :]
                of_page = tl.broadcast_to(of_page[:, None, :], (PAGES, PAGE, ROWS))
                scores += of_page.reshape(TILE, ROWS)
            scores = scores * factor[None, :] + half_variance[None, :] * (scales * scales)[:, None]
            column = (place + (k_fmt.sink_tokens + tile * TILE)).to(tl.int64)
            valid = inside[:, None]
            if padding is not None:
                valid = valid & (column >= hidden)[:, None]
            if CAUSAL == 2:
                valid = valid & ((column - first).to(tl.int32)[:, None] <= last[None, :])
            scores = masked(capped(scores, softcap), mask_row, row_valid, column, valid, mask_step)
            weights, before, m = softmax_step(scores, m)
            sums = sums * before[None, :] + tl.sum(weights.reshape(TILE // PLACES, PLACES, ROWS), axis=0)

            unit = 1.0
            if not EXACT:  # scales of at most 2, so that the weights fit float16
                unit, inverse = power_of_two(tl.max(v_bases, axis=0))
                v_base *= inverse
            scales = tl.where(inside, token_scales(v_code, v_base), 0.0)
            at = _page_at(page + PAGES + of_token, last_page, b, table, table_step, v_step, BLOCK_PAGES)
            v_code, v_base = scale_parts(v_of_head, at, in_page)
            pages_at = _page_at(page + PAGES + of_tile, last_page, b, table, table_step, v_step, BLOCK_PAGES)
            v_bases = page_base(v_of_head, pages_at)
            at = _page_at(page + of_token, last_page, b, table, table_step, v_step, BLOCK_PAGES)
            levels = levels_tile(v_of_head, at, in_page, v_levels, v_fmt, EXACT)
            if SAVE_REGISTERS and not EXACT:
                levels = opaque(levels)
            # A sum of its own for each tile: the long one is kept by additions in float32 alone.
            part = dot(levels.T, (weights * scales[:, None]).to(levels.dtype)) * unit
            if v_fmt.centred:
                codes = centre_codes(v_of_head, at, v_fmt).to(tl.float32) * centre_unit(v_of_head, at)[:, None]
                centre = tl.load(v_head + v_element, mask=v_exists, other=0).to(tl.float32)
                centres = tl.where(inside[:, None], codes + centre[None, :], 0.0).to(query.dtype.element_ty)
                part += dot(centres.T, weights.to(query.dtype.element_ty))
            summed = summed * before[None, :] + part
        total = tl.sum(sums, axis=0)
        acc = unrotated(tl.where(v_exists[:, None], summed, 0.0), v_rotation, v_fmt, V_WIDTH, EXACT)

    # Computed anew, by way of a zero that compilers do not see: what is kept over the loop costs registers.
    row_first = tl.program_id(0) * ROWS
    if SAVE_REGISTERS:
        row_first += tl.minimum(tile_end, 0)
    i, q_head, row_valid = _rows(row_first, heads, group, rows, ROWS)
    mask_row, mask_step = _mask_row(mask, mask_strides, b, q_head, i)
    last = i + (new - rows)

    # Columns that stand for keys and values of zeros: a gap before the new tokens, and what the mask has behind them.
    for part in tl.static_range(2):
        zero_first = stored if part == 0 else first + new
        zero_end = first if part == 0 else tl.maximum(columns, first + new)
        each_zero = tl.cdiv(tl.cdiv(zero_end - zero_first, TILE), SHARES) * TILE
        zero_first += share * each_zero
        zero_end = tl.minimum(zero_first + each_zero, zero_end)
        for zero in range(zero_first, zero_end, TILE):
            column = (zero + tl.arange(0, TILE)).to(tl.int64)
            valid = (column < zero_end)[:, None]
            if CAUSAL:
                valid = valid & ((column - first).to(tl.int32)[:, None] <= last[None, :])
            scores = masked(tl.zeros((TILE, ROWS), tl.float32), mask_row, row_valid, column, valid, mask_step)
            weights, before, m = softmax_step(scores, m)
            total = total * before + tl.sum(weights, axis=0)
            acc *= before[None, :]

    if share == SHARES - 1:
        d_k = tl.arange(0, K_WIDTH)
        d_v = tl.arange(0, V_WIDTH)
        k_inside = d_k < k_fmt.head_dim
        v_inside = d_v < v_fmt.head_dim
        q_address = _q_address(query, q_strides, b, q_head, i)
        q = tl.load(q_address[None, :] + d_k[:, None], mask=row_valid[None, :] & k_inside[:, None], other=0)
        # The slots: first tokens and the ring of recent ones, in the order in which they lie.
        k_slots = k_dense + (b * heads + h) * (k_fmt.dense_rows * k_fmt.head_dim) + k_fmt.head_dim
        v_slots = v_dense + (b * heads + h) * (v_fmt.dense_rows * v_fmt.head_dim) + v_fmt.head_dim
        WINDOW: tl.constexpr = k_fmt.residual_window
        for at in range(0, k_fmt.sink_tokens + WINDOW, DENSE_TILE):
            slot = at + tl.arange(0, DENSE_TILE)
            behind = slot - k_fmt.sink_tokens - packed.to(tl.int32) % WINDOW
            recent = k_fmt.sink_tokens + packed + tl.where(behind < 0, behind + WINDOW, behind)
            column = tl.where(slot < k_fmt.sink_tokens, slot, recent).to(tl.int64)
            inside = (column < stored) & (slot < k_fmt.sink_tokens + WINDOW)
            keys = tl.load(
                k_slots + slot[:, None] * k_fmt.head_dim + d_k[None, :], inside[:, None] & k_inside[None, :], other=0
            )
            valid = (inside & (column >= hidden))[:, None]
            if CAUSAL == 2:
                valid = valid & ((column - first).to(tl.int32)[:, None] <= last[None, :])
            scores = capped(dot_by_parts(keys, q, DENSE_PARTS) * (scale * LOG2E), softcap)
            weights, before, m = softmax_step(masked(scores, mask_row, row_valid, column, valid, mask_step), m)
            total = total * before + tl.sum(weights, axis=0)
            values = tl.load(
                v_slots + slot[:, None] * v_fmt.head_dim + d_v[None, :], inside[:, None] & v_inside[None, :], other=0
            )
            acc = acc * before[None, :] + dot(values.T, weights.to(values.dtype))

        if key is not None:
            keys_of = key + b * key_strides[0] + h * key_strides[1]
            values_of = value + b * value_strides[0] + h * value_strides[1]
            end = new
            if CAUSAL:  # the last row of the block sees no further
                end = tl.minimum(new, (tl.program_id(0) * ROWS + ROWS - 1) // group + 1 + new - rows)
            for at in range(0, end, DENSE_TILE):
                j = at + tl.arange(0, DENSE_TILE)
                inside = j < new
                address = j.to(tl.int64)[:, None]
                keys = tl.load(
                    keys_of + address * key_strides[2] + d_k[None, :], inside[:, None] & k_inside[None, :], other=0
                )
                column = first + j
                valid = (inside & (column >= hidden))[:, None]
                if CAUSAL:
                    valid = valid & ((column - first).to(tl.int32)[:, None] <= last[None, :])
                scores = capped(dot_by_parts(keys, q, DENSE_PARTS) * (scale * LOG2E), softcap)
                weights, before, m = softmax_step(masked(scores, mask_row, row_valid, column, valid, mask_step), m)
                total = total * before + tl.sum(weights, axis=0)
                values = tl.load(
                    values_of + address * value_strides[2] + d_v[None, :], inside[:, None] & v_inside[None, :], other=0
                )
                acc = acc * before[None, :] + dot(values.T, weights.to(values.dtype))

        if sinks is not None:
            sink = tl.load(sinks + q_head, mask=row_valid, other=0).to(tl.float32) * LOG2E
            weights, before, m = softmax_step(sink[None, :], m)
            total = total * before + tl.sum(weights, axis=0)
            acc *= before[None, :]

    total = tl.where(agree, total, float("nan"))
    acc = tl.where(total > 0, 1.0 / total, tl.where(total == 0, 0.0, total))[None, :] * acc
    batch = tl.num_programs(1) // heads
    q_heads = heads * group
    target = ((share * batch + b) * rows + i) * q_heads + q_head
    d = tl.arange(0, V_WIDTH)
    tl.store(
        out + target[None, :] * v_fmt.head_dim + d[:, None],
        acc.to(out.dtype.element_ty),
        mask=row_valid[None, :] & (d < v_fmt.head_dim)[:, None],
    )
    log = m + tl.log2(total)
    if SHARES == 1:
        log /= LOG2E
    tl.store(
        lse + ((share * batch + b) * q_heads + q_head) * rows + i, tl.where(total == 0, float("-inf"), log), row_valid
    )


@triton.jit
def merge_kernel(
    parts, part_lse, out, lse, q_heads, rows, batch, HEAD_DIM: tl.constexpr, SHARES: tl.constexpr, WIDTH: tl.constexpr
):
    """Join the shares of one query row: parts float32 [SHARES, batch, rows, q_heads, HEAD_DIM], part_lse in log2
    [SHARES, batch, q_heads, rows]; out and lse as in `attend_kernel` with one share. Grid: batch * rows * q_heads."""
    at = tl.program_id(0).to(tl.int64)
    head = at % q_heads
    row = at // q_heads % rows
    b = at // q_heads // rows
    lse_at = (b * q_heads + head) * rows + row
    share = tl.arange(0, WIDTH)
    count = (batch * rows * q_heads).to(tl.int64)
    logs = tl.load(part_lse + share * count + lse_at, mask=share < SHARES, other=float("-inf"))
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    top = tl.max(logs, axis=0)
    weights = tl.exp2(logs - tl.where(top == float("-inf"), 0.0, top))
    address = parts + (share[:, None] * count + at) * HEAD_DIM + d[None, :]
    values = tl.load(address, mask=(share < SHARES)[:, None] & (d < HEAD_DIM)[None, :], other=0)
    total = tl.sum(weights, axis=0)
    result = tl.sum(values * weights[:, None], axis=0) / tl.where(total == 0, 1.0, total)
    tl.store(out + at * HEAD_DIM + d, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(lse + lse_at, tl.where(total == 0, float("-inf"), (top + tl.log2(total)) / LOG2E))
