"""Attention over packed pages, dense slots and new tokens: one kernel for decoding, prefill and paged storage.

A program takes a block of query rows of one key/value head (the rows of all its query heads, so that a tile is decoded
once for the group) and one share of the packed tokens. It rotates its queries, walks over its tiles, un-rotates what it
summed, and, if it is the last share, goes on over the dense slots and the new tokens. With several shares
`merge_kernel` joins them by their log-sum-exps.

Columns count from the first token that is held. No size depends on how many tokens are stored: that is read on the device, so a launch can be part of a CUDA graph.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tqc.lowering.triton.decode import (
    centre_codes,
    centre_unit,
    column_element,
    levels_tile,
    page_base,
    power_of_two,
    scale_parts,
    token_scales,
)
from tqc.lowering.triton.format import PAGE, tile_format
from tqc.lowering.triton.placement import head_balance, head_centre, oldest_page, page_at, slot_of, stored_tokens
from tqc.lowering.triton.tile import (
    LOG2E,
    capped,
    dot,
    dot_by_parts,
    opaque,
    rotated,
    softmax_add,
    softmax_step,
    unrotated,
    visible,
)


@triton.jit
def _tile_scale_parts(pages, first_page, step, paging, TILE: tl.constexpr):
    """`scale_parts` of the tile whose first page is `first_page`."""
    place = tl.arange(0, TILE)
    return scale_parts(pages, page_at(first_page + place // PAGE, step, paging), place % PAGE)


@triton.jit
def _packed_scores(
    pages, first_page, step, paging, levels, scales, q, bias, deducted, fmt: tl.constexpr, TILE: tl.constexpr
):
    """Products of a tile of packed keys with queries `q` of `rotated`, corrected for coding errors, [TILE, rows].

    Args:
        scales: of `token_scales`, [TILE]; bias: products of the head's centre with the queries, [rows].
        deducted: |q| times the format's `score_stretch`, [rows].
    """
    place = tl.arange(0, TILE)
    EXACT: tl.constexpr = q.dtype == tl.float32
    # In float32 an operand takes up to four times the registers.
    PARTS: tl.constexpr = max(fmt.columns // 32, 1) if EXACT else 1
    at = page_at(first_page + place // PAGE, step, paging)
    scores = dot_by_parts(levels_tile(pages, at, place % PAGE, levels, fmt, EXACT), q, PARTS)
    scores = tl.maximum(scores, scores * (1.0 + fmt.score_stretch) - deducted[None, :]) * scales[:, None]
    if fmt.centred:
        at = page_at(first_page + tl.arange(0, TILE // PAGE), step, paging)
        of_page = dot_by_parts(centre_codes(pages, at, fmt).to(q.dtype), q, PARTS)
        of_page = of_page * centre_unit(pages, at)[:, None] + bias[None, :]
        of_page = tl.broadcast_to(of_page[:, None, :], (TILE // PAGE, PAGE, q.shape[1]))
        scores += of_page.reshape(TILE, q.shape[1])
    return scores


@triton.jit
def _row_address(base, strides, b, q_head, i):
    return base + b * strides[0] + q_head.to(tl.int64) * strides[1] + i.to(tl.int64) * strides[2]


@triton.jit
def _rows(begin, heads, group, rows, ROWS: tl.constexpr):
    """Position and query head of each row of a block, and whether there is such a row, [ROWS]."""
    row = begin + tl.arange(0, ROWS)
    return row // group, (tl.program_id(1) % heads) * group + row % group, row < rows * group


@triton.jit
def _sight(mask, mask_strides, b, q_head, i, row_valid, first, last):
    """As `visible` takes it. Apart from `_rows`, since torch takes a call's results to point to all that it is given:
    `first` would make the states, from which it is loaded, tensors that the kernel writes."""
    if mask is not None:
        mask = _row_address(mask, mask_strides, b, q_head, i)
    return row_valid, mask, mask_strides[3], first, last


@triton.jit
def _dense_step(
    q, keys_at, values_at, column, inside, hidden, sight, m, total, acc,
    k_dim: tl.constexpr, v_dim: tl.constexpr, scale: tl.constexpr, softcap: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """`m`, `total` and `acc` with a tile of tokens that are not packed.

    Args:
        q: queries, [width of keys, rows].
        keys_at, values_at: pointers to the first elements of the tokens, [n]; column, inside, sight: as of `visible`.
        hidden: how many first columns are padding.
    """
    d_k = tl.arange(0, q.shape[0])
    d_v = tl.arange(0, acc.shape[0])
    # In float32 an operand takes up to four times the registers.
    PARTS: tl.constexpr = max(q.shape[0] // 32, 1) if q.dtype == tl.float32 else 1
    keys = tl.load(keys_at[:, None] + d_k[None, :], mask=inside[:, None] & (d_k < k_dim)[None, :], other=0)
    scores = capped(dot_by_parts(keys, q, PARTS) * (scale * LOG2E), softcap)
    shown = inside & (column >= hidden)
    weights, m, total, acc = softmax_add(visible(scores, column, shown, sight, CAUSAL), m, total, acc)
    values = tl.load(values_at[:, None] + d_v[None, :], mask=inside[:, None] & (d_v < v_dim)[None, :], other=0)
    return m, total, acc + dot(values.T, weights.to(values.dtype))


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
    k_num_pages,
    v_pages,
    v_page_batch,
    v_page_head,
    v_page_step,
    v_num_pages,
    table,
    table_step,
    k_dense,
    k_dense_head,
    v_dense,
    v_dense_head,
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
        k_num_pages, v_num_pages: for how many pages there is room in formats that drop tokens, so that pages wrap;
            else None.
        k_dense_head, v_dense_head: strides of the heads in `dense`, contiguous.
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
    mask_strides = (mask_batch, mask_head, mask_row_step, mask_step)
    EXACT: tl.constexpr = query.dtype.element_ty == tl.float32
    V_WIDTH: tl.constexpr = triton.next_power_of_2(v_fmt.head_dim)
    V_COLUMNS: tl.constexpr = v_fmt.columns
    PAGES: tl.constexpr = TILE // PAGE
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    share = tl.program_id(2)
    stored, packed, begin, first, agree = stored_tokens(k_state, v_state, lengths, start, b, k_fmt)
    # From here on these two are columns.
    coded = (tl.minimum(packed, stored - k_fmt.sink_tokens)).to(tl.int32)
    stored -= begin
    first -= begin
    hidden = 0
    if padding is not None:
        hidden = tl.load(padding + b)
    row_first = tl.program_id(0) * ROWS
    i, q_head, row_valid = _rows(row_first, heads, group, rows, ROWS)
    sight = _sight(mask, mask_strides, b, q_head, i, row_valid, first, i + (new - rows))
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((V_WIDTH, ROWS), tl.float32)

    # The packed tokens, in tiles that begin at the oldest page.
    origin = k_fmt.sink_tokens  # its column
    oldest = 0
    if k_num_pages is not None:
        oldest = oldest_page(begin, k_fmt)
        coded -= (oldest * PAGE).to(tl.int32)
        origin = (k_fmt.sink_tokens + oldest * PAGE - begin).to(tl.int32)
    tiles = tl.cdiv(tl.maximum(coded, 0), TILE)
    each = tl.cdiv(tiles, tl.maximum(SHARES - 1, 1))
    tile_first = share * each
    tile_end = tl.minimum(tile_first + each, tiles)
    if tile_first < tile_end:
        k_own = k_dense + (b * heads + h) * k_dense_head
        v_own = v_dense + (b * heads + h) * v_dense_head
        at_query = _row_address(query, q_strides, b, q_head, i)
        q, factor, energy = rotated(at_query, row_valid, k_rotation, k_own, k_fmt, EXACT)
        deducted = tl.where(factor > 0, tl.sqrt(energy) / factor, 0.0) * k_fmt.score_stretch
        if scale < 0:
            q = -q
            factor = -factor
        factor *= scale * LOG2E
        k_element, k_exists = column_element(k_fmt)
        v_element, v_exists = column_element(v_fmt)
        bias = tl.zeros((ROWS,), tl.float32)
        if k_fmt.centred:
            centre = tl.load(head_centre(k_own, k_fmt) + k_element, mask=k_exists, other=0).to(tl.float32)
            bias = tl.sum(q.to(tl.float32) * centre[:, None], axis=0)
        summed = tl.zeros((V_COLUMNS, ROWS), tl.float32)
        # Sums of weights over the places in a tile that one lane holds: lanes are added up once, behind the loop.
        PLACES: tl.constexpr = min(TILE, 64)
        sums = tl.zeros((PLACES, ROWS), tl.float32)
        place = tl.arange(0, TILE)
        in_page = place % PAGE
        of_token = place // PAGE
        of_tile = tl.arange(0, PAGES)
        k_of_head = k_pages + b * k_page_batch + h * k_page_head
        v_of_head = v_pages + b * v_page_batch + h * v_page_head
        last = (coded - 1) // PAGE
        k_paging = (table, b * table_step, BLOCK_PAGES, last, k_num_pages, slot_of(oldest, k_num_pages))
        v_paging = (table, b * table_step, BLOCK_PAGES, last, v_num_pages, slot_of(oldest, v_num_pages))
        # Scales are fetched a tile ahead by hand: single bytes are no part of Triton's pipeline.
        page = tile_first * PAGES
        k_code, k_base = _tile_scale_parts(k_of_head, page, k_page_step, k_paging, TILE)
        v_code, v_base = _tile_scale_parts(v_of_head, page, v_page_step, v_paging, TILE)
        v_bases = page_base(v_of_head, page_at(page + of_tile, v_page_step, v_paging))
        for tile in range(tile_first, tile_end):
            page = tile * PAGES
            inside = place < coded - tile * TILE
            scales = token_scales(k_code, k_base)
            k_code, k_base = _tile_scale_parts(k_of_head, page + PAGES, k_page_step, k_paging, TILE)
            scores = _packed_scores(
                k_of_head, page, k_page_step, k_paging, k_levels, scales, q, bias, deducted, k_fmt, TILE
            )
            scores = scores * factor[None, :]
            column = (place + (origin + tile * TILE)).to(tl.int64)
            shown = inside
            if k_num_pages is not None:
                shown = inside & (column >= 0)
            if padding is not None:
                shown = shown & (column >= hidden)
            scores = visible(capped(scores, softcap), column, shown, sight, CAUSAL == 2)
            weights, before, m = softmax_step(scores, m)
            sums = sums * before[None, :] + tl.sum(weights.reshape(TILE // PLACES, PLACES, ROWS), axis=0)

            unit = 1.0
            if not EXACT:  # scales of at most 2, so that the weights fit float16
                unit, inverse = power_of_two(tl.max(v_bases, axis=0))
                v_base *= inverse
            scales = tl.where(inside, token_scales(v_code, v_base), 0.0)
            v_code, v_base = _tile_scale_parts(v_of_head, page + PAGES, v_page_step, v_paging, TILE)
            v_bases = page_base(v_of_head, page_at(page + PAGES + of_tile, v_page_step, v_paging))
            at = page_at(page + of_token, v_page_step, v_paging)
            levels = levels_tile(v_of_head, at, in_page, v_levels, v_fmt, EXACT)
            if SAVE_REGISTERS and not EXACT:
                levels = opaque(levels)
            # A sum of its own for each tile: the long one is kept by additions in float32 alone.
            part = dot(levels.T, (weights * scales[:, None]).to(levels.dtype)) * unit
            if v_fmt.centred:
                codes = centre_codes(v_of_head, at, v_fmt).to(tl.float32) * centre_unit(v_of_head, at)[:, None]
                centre = tl.load(head_centre(v_own, v_fmt) + v_element, mask=v_exists, other=0).to(tl.float32)
                centres = tl.where(inside[:, None], codes + centre[None, :], 0.0).to(query.dtype.element_ty)
                part += dot(centres.T, weights.to(query.dtype.element_ty))
            summed = summed * before[None, :] + part
        total = tl.sum(sums, axis=0)
        acc = unrotated(tl.where(v_exists[:, None], summed, 0.0), v_rotation, v_fmt, V_WIDTH, EXACT)
        if v_fmt.centred:
            acc *= head_balance(v_own, tl.arange(0, V_WIDTH), v_fmt)[:, None]

    # Computed anew, by way of a zero that compilers do not see: what is kept over the loop costs registers.
    if SAVE_REGISTERS:
        row_first += tl.minimum(tile_end, 0)
    i, q_head, row_valid = _rows(row_first, heads, group, rows, ROWS)
    sight = _sight(mask, mask_strides, b, q_head, i, row_valid, first, i + (new - rows))

    # Columns that stand for keys and values of zeros: a gap before the new tokens, and what the mask has behind them.
    for part in tl.static_range(2):
        zero_first = stored if part == 0 else first + new
        zero_end = first if part == 0 else tl.maximum(columns, first + new)
        each_zero = tl.cdiv(tl.cdiv(zero_end - zero_first, TILE), SHARES) * TILE
        zero_first += share * each_zero
        zero_end = tl.minimum(zero_first + each_zero, zero_end)
        for zero in range(zero_first, zero_end, TILE):
            column = (zero + tl.arange(0, TILE)).to(tl.int64)
            scores = visible(tl.zeros((TILE, ROWS), tl.float32), column, column < zero_end, sight, CAUSAL > 0)
            _, m, total, acc = softmax_add(scores, m, total, acc)

    if share == SHARES - 1:
        d = tl.arange(0, triton.next_power_of_2(k_fmt.head_dim))
        q_address = _row_address(query, q_strides, b, q_head, i)
        exists = row_valid[None, :] & (d < k_fmt.head_dim)[:, None]
        q = tl.load(q_address[None, :] + d[:, None], mask=exists, other=0)
        # The slots: first tokens and the ring of recent ones, in the order in which they lie.
        WINDOW: tl.constexpr = k_fmt.residual_window
        k_slots = k_dense + (b * heads + h) * k_dense_head
        v_slots = v_dense + (b * heads + h) * v_dense_head
        for at in range(0, k_fmt.sink_tokens + WINDOW, DENSE_TILE):
            slot = at + tl.arange(0, DENSE_TILE)
            behind = slot - k_fmt.sink_tokens - packed.to(tl.int32) % WINDOW
            recent = k_fmt.sink_tokens + packed + tl.where(behind < 0, behind + WINDOW, behind)
            column = tl.where(slot < k_fmt.sink_tokens, slot, recent).to(tl.int64) - begin
            inside = (column < stored) & (slot < k_fmt.sink_tokens + WINDOW)
            if k_num_pages is not None:
                inside = inside & (column >= 0)
            m, total, acc = _dense_step(
                q, k_slots + slot * k_fmt.head_dim, v_slots + slot * v_fmt.head_dim, column, inside, hidden, sight,
                m, total, acc, k_fmt.head_dim, v_fmt.head_dim, scale, softcap, CAUSAL == 2,
            )  # fmt: skip
        if key is not None:
            keys_of = key + b * key_batch + h * key_head
            values_of = value + b * value_batch + h * value_head
            end = new
            if CAUSAL:  # the last row of the block sees no further
                end = tl.minimum(new, (tl.program_id(0) * ROWS + ROWS - 1) // group + 1 + new - rows)
            for at in range(0, end, DENSE_TILE):
                j = (at + tl.arange(0, DENSE_TILE)).to(tl.int64)
                m, total, acc = _dense_step(
                    q, keys_of + j * key_row, values_of + j * value_row, first + j, j < new, hidden, sight,
                    m, total, acc, k_fmt.head_dim, v_fmt.head_dim, scale, softcap, CAUSAL > 0,
                )  # fmt: skip
        if sinks is not None:
            sink = tl.load(sinks + q_head, mask=row_valid, other=0).to(tl.float32) * LOG2E
            _, m, total, acc = softmax_add(sink[None, :], m, total, acc)

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
