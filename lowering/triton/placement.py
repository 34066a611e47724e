"""Where the tokens of a cache lie, as `tqc.format` has it: sinks and ring in rows of `dense`, the head's own rows behind
them, pages in slots. `dense` and `pages` are pointers to those of one head; `fmt` is a `TileFormat`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tqc.lowering.triton.format import PAGE


@triton.jit
def ring_row(position, fmt: tl.constexpr):
    """Row of `dense` of each token at `position`, behind the sinks."""
    return fmt.sink_tokens + (position - fmt.sink_tokens) % fmt.residual_window


@triton.jit
def head_centre(dense, fmt: tl.constexpr):
    """Pointer to the centre of the head, which centred formats have, in a `dense` of full size."""
    return dense + fmt.token_rows * fmt.head_dim


@triton.jit
def head_balance(dense, element, fmt: tl.constexpr):
    """The head's balance at `element` [n], float32, ones behind the last element; the head is one as above."""
    row = dense + (fmt.token_rows + 1) * fmt.head_dim
    return tl.load(row + element, mask=element < fmt.head_dim, other=1.0).to(tl.float32)


@triton.jit
def oldest_page(begin, fmt: tl.constexpr):
    """The first page of which a token is held, where `begin` is the first token that is."""
    return tl.maximum(begin - fmt.sink_tokens, 0) // PAGE


@triton.jit
def slot_of(page, num_pages):
    """The slot of `pages` that a page lies in; `num_pages`: how many there are, None where pages do not wrap."""
    if num_pages is None:
        return page
    else:
        return (page % num_pages).to(tl.int32)


@triton.jit
def stored_tokens(k_state, v_state, lengths, start, b, fmt: tl.constexpr):
    """What a cache holds of sequence `b`, in absolute counts.

    Returns:
        (tokens stored, of which packed, first token that is held, position of the first new token, whether keys and
        values agree).
    """
    if lengths is not None:
        length = tl.load(lengths + b).to(tl.int64)
        over = length - fmt.sink_tokens - fmt.residual_window
        packed = (tl.maximum(over, 0) + PAGE - 1) // PAGE * PAGE
        return length, packed, 0, length, length == length
    else:
        length = tl.load(k_state)
        packed = tl.load(k_state + 1)
        v_length = tl.load(v_state)
        first = tl.maximum(length, v_length)
        if start is not None:
            first = tl.load(start).to(tl.int64)
        agree = tl.minimum(length, first) == tl.minimum(v_length, first)
        if fmt.keep is None:
            return tl.minimum(length, first), packed, 0, first, agree
        else:
            begin = tl.load(k_state + 2)
            return tl.minimum(length, first), packed, begin, first, agree & (begin == tl.load(v_state + 2))


@triton.jit
def page_at(index, step, paging):
    """Where pages begin, in units of 16 bytes.

    Args:
        index: counted from the oldest page that is held; behind the last one, that one is taken.
        step: from slot to slot.
        paging: (table of blocks or None, where the sequence's part of it begins, pages of a block, index of the last
            page, number of slots as `slot_of` takes it, slot of the oldest page).
    """
    table, of_sequence, block_pages, last, num_pages, oldest = paging
    index = tl.minimum(index, last)
    if table is not None:
        block = tl.load(table + of_sequence + index // block_pages).to(tl.int64)
        index = block * block_pages + index % block_pages
    if num_pages is not None:
        index += oldest
        index = tl.where(index < num_pages, index, index - num_pages)
    return index * step
