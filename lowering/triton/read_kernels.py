"""Dense copy of stored tokens: `tqc.ops.read` on the device, for uses that no fused kernel takes."""

from __future__ import annotations

import triton
import triton.language as tl

from tqc.lowering.triton.decode import decode_page
from tqc.lowering.triton.format import PAGE, tile_format
from tqc.lowering.triton.placement import oldest_page, ring_row, slot_of


@triton.jit
def read_kernel(pages, dense, dense_head, state, matrix, levels, out, length, num_pages, spec: tl.constexpr):
    """Grid: (1 + how many pages hold tokens at most, batch * heads); program 0 copies the sinks.

    Args:
        pages, dense, state: contiguous, as in `tqc.format`. dense_head: stride of the heads in `dense`.
        matrix: of `tables.transposed_rotation`, float32, whose gain is 1. levels: the format's, float32.
        out: [batch * heads, length, head_dim].
    """
    fmt: tl.constexpr = tile_format(spec)
    head = tl.program_id(1).to(tl.int64)
    WIDTH: tl.constexpr = triton.next_power_of_2(fmt.head_dim)
    SINKS: tl.constexpr = fmt.sink_tokens
    d = tl.arange(0, WIDTH)
    inside = (d < fmt.head_dim)[None, :]
    rows = dense + head * dense_head
    target = out + head * length * fmt.head_dim + d[None, :]
    begin = 0
    slots = None
    if fmt.keep is not None:
        begin = tl.load(state + 2)
        slots = num_pages
    end = begin + length
    stored = tl.minimum(tl.load(state), end)
    place = tl.arange(0, PAGE)
    if tl.program_id(0) == 0:
        for first in range(0, SINKS, PAGE):
            token = place + first
            source = rows + token[:, None] * fmt.head_dim + d[None, :]
            value = tl.load(source, mask=(token < tl.minimum(stored, SINKS))[:, None] & inside, other=0)
            wanted = (token >= begin) & (token < tl.minimum(end, SINKS))
            tl.store(target + (token - begin)[:, None] * fmt.head_dim, value, wanted[:, None] & inside)
    else:
        page_index = tl.program_id(0) - 1 + oldest_page(begin, fmt)
        behind = place + page_index * PAGE
        coded = tl.minimum(tl.load(state + 1), stored - SINKS)
        ring = (behind >= coded) & (behind < stored - SINKS)
        source = rows + ring_row(behind + SINKS, fmt)[:, None] * fmt.head_dim + d[None, :]
        result = tl.load(source, mask=ring[:, None] & inside, other=0).to(tl.float32)
        if page_index * PAGE < coded:
            page = pages + (head * num_pages + slot_of(page_index, slots)) * fmt.page_bytes
            decoded = decode_page(page, rows, levels, matrix, 1.0, fmt)
            result = tl.where((behind < coded)[:, None], decoded, result)
        token = (behind + SINKS)[:, None]
        wanted = (token >= begin) & (token < end)
        tl.store(target + (token - begin) * fmt.head_dim, result.to(out.dtype.element_ty), mask=wanted & inside)
