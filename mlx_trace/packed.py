"""A packed cache as arrays of MLX, and what is done to it: appended to, read, cut short.

Arrays are immutable, so a fork is another reference and every function gives new ones. Where tokens lie is counted by
`Placement`; a `Step` holds its indices as arrays, which a compiled program takes as inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.mlx_trace.balance import balance
from tqc.mlx_trace.codec import decode_pages, decoded, encode_pages, head_rows
from tqc.mlx_trace.placement import Placement


@dataclass(frozen=True)
class Step:
    """Where the tokens before a call are, and where those of the call go.

    Attributes:
        begun: whether there are tokens before the call.
        opens: whether the call brings the first page.
        numbers: int32 [3], the state before the call.
        position: int32 [places], see `Placement.positions`.
        rows, packs, slots: see `Placement.rows_behind`, `packs` and `slots`.
    """

    begun: bool
    opens: bool
    numbers: mx.array
    position: mx.array
    rows: mx.array
    packs: mx.array
    slots: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        return [self.numbers, self.position, self.rows, self.packs, self.slots]

    @staticmethod
    def at(placement: Placement, count: int, num_pages: int) -> Step:
        indices = (
            np.array([placement.length, placement.packed, placement.begin], np.int32),
            placement.positions(num_pages),
            placement.rows_behind(count),
            placement.packs(count),
            placement.slots(count, num_pages),
        )
        return Step(placement.length > 0, placement.opens(count), *map(mx.array, indices))


@dataclass(frozen=True)
class Packed:
    """Keys or values of one layer.

    Attributes:
        pages: uint8 [batch, heads, num_pages, page_bytes].
        dense: [batch, heads, dense_rows, head_dim].
        step: of the call that this takes part in.
        fresh: tokens that the call leaves to be packed, see `settle`.
        opening: where the call brings the first page, keys and queries to balance its heads by.
    """

    fmt: PackedFormat
    pages: mx.array
    dense: mx.array
    step: Any = None
    fresh: mx.array | None = None
    opening: tuple[mx.array, ...] = ()

    @staticmethod
    def empty(batch: int, heads: int, fmt: PackedFormat, dtype: mx.Dtype) -> Packed:
        dense = mx.zeros((batch, heads, fmt.dense_rows, fmt.head_dim), dtype)
        if fmt.centred:
            dense[:, :, -1] = 1
        return Packed(fmt, mx.zeros((batch, heads, 0, fmt.page_bytes), mx.uint8), dense)

    @property
    def num_pages(self) -> int:
        return self.pages.shape[2]

    @property
    def head(self) -> mx.array:
        """Centre and balance of each head, [batch, heads, head_rows, head_dim]."""
        return self.dense[:, :, self.fmt.token_rows :]

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + self.dense.nbytes

    def __deepcopy__(self, memo: Any) -> Packed:
        return self

    def with_pages(self, count: int) -> Packed:
        """With room for `count` pages at least."""
        batch, heads, present, page_bytes = self.pages.shape
        if count <= present:
            return self
        more = mx.zeros((batch, heads, count - present, page_bytes), mx.uint8)
        return replace(self, pages=mx.concatenate([self.pages, more], axis=2))

    def rows(self, chosen: Any) -> Packed:
        """The sequences of a batch at these indices."""
        return replace(self, pages=self.pages[chosen], dense=self.dense[chosen])


def roomy(placement: Placement, count: int, present: int) -> int:
    """How many pages a cache of `present` pages shall have for `count` more tokens.

    A call of many tokens gets what it needs. Token by token, room grows by steps that double with the cache: between
    128 tokens and 1/32 of it.
    """
    after = placement.behind(count)
    needed, most = after.pages(), after.fmt.ring_pages
    if needed <= present or count > PAGE_TOKENS:
        return max(needed, present)
    step = max(4, 1 << (max(1, needed // 32).bit_length() - 1))
    made = -(-needed // step) * step
    return made if most is None else min(made, most)


def append(cache: Packed, new: mx.array, query: mx.array | None = None) -> Packed:
    """`tqc.ops.extend`: tokens behind the stored ones. What leaves the window is not packed yet: that is `settle`'s.

    A captured program calls this, and it does what every call needs. Packing comes once in 32 tokens and takes many
    ops, which a compiled program would hold in two forms.

    Args:
        new: [batch, heads, n, head_dim].
        query: by which keys are balanced, [batch, query_heads, n, head_dim].
    """
    fmt, step = cache.fmt, cache.step
    new = new.astype(cache.dense.dtype)
    both = mx.concatenate([cache.dense[:, :, : fmt.token_rows], new], axis=2)
    dense = mx.concatenate([mx.take(both, step.rows, axis=2), cache.head], axis=2)
    fresh = mx.take(both, step.packs, axis=2) if step.packs.shape[0] else None
    opening: tuple[mx.array, ...] = ()
    if step.opens and fmt.centred and query is not None:
        shown = (step.position[: fmt.token_rows] >= 0)[:, None]
        opening = mx.concatenate([mx.where(shown, both[:, :, : fmt.token_rows], 0), new], axis=2), query
    return replace(cache, dense=dense, fresh=fresh, opening=opening)


def settle(cache: Packed, step: Step) -> Packed:
    """Pack what `append` has left, of the call that `step` was made for; there must be pages for it."""
    fmt, fresh, pages, dense = cache.fmt, cache.fresh, cache.pages, cache.dense
    if fresh is not None:
        if step.opens and fmt.centred:
            scales = mx.expand_dims(balance(*cache.opening), 2) if cache.opening else cache.head[:, :, 1:]
            head = head_rows(fresh[:, :, :PAGE_TOKENS], scales, fmt)
            dense = mx.concatenate([dense[:, :, : fmt.token_rows], head], axis=2)
        kept = step.slots.shape[1] * PAGE_TOKENS
        coded = encode_pages(fresh[:, :, -kept:], dense[:, :, fmt.token_rows :], fmt)
        pages = _placed(pages, coded, step.slots[1], fmt)
    return Packed(fmt, pages, dense)


def _placed(pages: mx.array, coded: mx.array, slots: mx.array, fmt: PackedFormat) -> mx.array:
    if fmt.keep is None:
        return mx.slice_update(pages, coded, slots[:1], axes=(2,))
    for at in range(coded.shape[2]):
        pages = mx.slice_update(pages, coded[:, :, at : at + 1], slots[at : at + 1], axes=(2,))
    return pages


def read(cache: Packed, placement: Placement) -> mx.array:
    """The tokens that are held, decoded: [batch, heads, held, head_dim]."""
    fmt, dense = cache.fmt, cache.dense
    places = dense[:, :, : fmt.token_rows]
    if cache.num_pages:
        coded = decoded(decode_pages(cache.pages, cache.head, fmt), cache.head, fmt)
        places = mx.concatenate([places, coded.astype(dense.dtype)], axis=2)
    position = placement.positions(cache.num_pages)
    taken = np.flatnonzero(position >= 0)
    return mx.take(places, mx.array(taken[np.argsort(position[taken])].astype(np.int32)), axis=2)


def cut(cache: Packed, placement: Placement, length: int) -> tuple[Packed, Placement]:
    """The tokens before position `length`, which is not below the first that is held: `tqc.ops.rewind`."""
    fmt, dense = cache.fmt, cache.dense
    kept = max(0, length - fmt.sink_tokens)
    packed = min(placement.packed, kept // PAGE_TOKENS * PAGE_TOKENS)
    if packed < kept and packed < placement.packed:
        slot = packed // PAGE_TOKENS % cache.num_pages
        tokens = decoded(decode_pages(cache.pages[:, :, slot : slot + 1], cache.head, fmt), cache.head, fmt)
        row = fmt.sink_tokens + packed % fmt.residual_window
        dense = mx.slice_update(dense, tokens.astype(dense.dtype), mx.array([row]), axes=(2,))
    after = replace(placement, length=length, packed=packed)
    return replace(cache, dense=dense), after


def packed_from(
    keys: mx.array, values: mx.array, formats: tuple[PackedFormat, PackedFormat], query: mx.array | None = None
) -> tuple[Packed, Packed, Placement]:
    """Dense tokens [batch, heads, n, head_dim], packed."""
    count, start = keys.shape[2], Placement.empty(formats[0])
    made = []
    for dense, fmt, by in ((keys, formats[0], query), (values, formats[1], None)):
        cache = Packed.empty(dense.shape[0], dense.shape[1], fmt, dense.dtype).with_pages(start.behind(count).pages())
        step = Step.at(start, count, cache.num_pages)
        made.append(settle(append(replace(cache, step=step), dense, by), step))
    return made[0], made[1], start.behind(count)
