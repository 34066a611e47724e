"""Where the tokens of a packed cache are: arithmetic on its state, and its tokens in order."""

from __future__ import annotations

import numpy as np

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.lowering.onnx.builder import Body, Value


class Places:
    """Sizes and positions of a cache, int64 of one element each.

    Attributes:
        length, packed, begin: the parts of `state`.
        first: packed index of the first packed token that is held.
        coded: how many packed tokens are held.
        sinks: how many of the sinks.
    """

    def __init__(self, body: Body, state: Value, fmt: PackedFormat) -> None:
        self.body, self.fmt, zero = body, fmt, body.ints(0)
        self.length, self.packed, self.begin = (body.slice(state, at, at + 1, 0) for at in range(3))
        stored_sinks = body.min(self.length, body.ints(fmt.sink_tokens))
        if fmt.keep is None:
            self.first, self.coded, self.sinks = zero, self.packed, stored_sinks
        else:
            self.first = body.max(zero, self.begin - body.ints(fmt.sink_tokens))
            self.coded = body.max(zero, self.packed - self.first)
            self.sinks = body.max(zero, stored_sinks - self.begin)

    def dense_rows(self, sinks: Value, window: Value) -> tuple[Value, Value]:
        """The sinks and the recent tokens that are held, in order."""
        body, fmt = self.body, self.fmt
        start = body.min(self.begin, body.ints(fmt.sink_tokens))
        old = body.slice(sinks, start, start + self.sinks, 2)
        recent = body.arange(body.max(self.packed, self.first), self.length - body.ints(fmt.sink_tokens))
        return old, body.gather(window, recent % fmt.residual_window, 2)

    def pages(self, part: Value) -> Value:
        """The pages that hold packed tokens, in order, of one of a cache's tensors."""
        body = self.body
        last = body.floor_div(self.packed, PAGE_TOKENS)
        if self.fmt.keep is None:
            return body.slice(part, 0, last, 2)
        slots = body.arange(body.floor_div(self.first, PAGE_TOKENS), last) % body.size(part, 2)
        return body.gather(part, slots, 2)

    def held(self, tokens: Value, axis: int) -> Value:
        """Of what belongs to the tokens of `pages`, what belongs to tokens that are held."""
        if self.fmt.keep is None:
            return tokens
        body = self.body
        return body.slice(tokens, self.first % PAGE_TOKENS, np.iinfo(np.int64).max, axis)


def later_state(body: Body, state: Value, count: Value, fmt: PackedFormat) -> Value:
    """`state` when `count` more tokens have come."""
    places = Places(body, state, fmt)
    end = places.length + count
    return body.concat(end, packed_at(body, places.packed, end, fmt), begin_at(body, places.begin, end, fmt), axis=0)


def packed_at(body: Body, packed: Value, end: Value, fmt: PackedFormat) -> Value:
    over = body.max(body.ints(0), end - body.ints(fmt.token_rows - PAGE_TOKENS + 1))
    return body.max(packed, body.floor_div(over, PAGE_TOKENS) * PAGE_TOKENS)


def begin_at(body: Body, begin: Value, end: Value, fmt: PackedFormat) -> Value:
    return begin if fmt.keep is None else body.max(begin, end - body.ints(fmt.keep))
