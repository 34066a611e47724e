"""A packed cache as arrays of MLX, and what is done to it: appended to, read, cut short.

Arrays are immutable, so a fork is another reference and every function gives new ones. Where tokens lie is counted by
`Placement`; a `Step` holds its indices as arrays, which a compiled program takes as inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.mlx_trace import kernels
from tqc.mlx_trace.balance import balance
from tqc.mlx_trace.codec import decode_pages, decoded
from tqc.mlx_trace.placement import Placement


@dataclass(frozen=True)
class Call:
    """Tokens on their way into caches: known on the host.

    Attributes:
        length: of the call, padding included.
        placements: before the call; one a sequence, or one for all of them.
        skips: how many tokens of padding are in front of a sequence's own.
        counts: how many are its own.
    """

    length: int
    placements: tuple[Placement, ...]
    skips: tuple[int, ...]
    counts: tuple[int, ...]

    @staticmethod
    def plain(placement: Placement, length: int) -> Call:
        return Call(length, (placement,), (0,), (length,))

    @property
    def sequences(self) -> Iterator[tuple[Placement, int, int]]:
        return zip(self.placements, self.counts, self.skips, strict=True)

    @property
    def flags(self) -> tuple[bool, bool, bool]:
        """Whether there are tokens before the call, whether it brings a first page, whether there is padding."""
        begun = any(placement.length for placement in self.placements)
        opens = any(placement.opens(count) for placement, count, _ in self.sequences)
        return begun, opens, any(self.skips) or any(count < self.length for count in self.counts)

    def step(self, num_pages: int) -> Step:
        numbers = [(p.length, p.packed, p.begin, count, skip) for p, count, skip in self.sequences]
        packs = [placement.packs(count, skip) for placement, count, skip in self.sequences]
        most = max(map(len, packs))
        arrays = (
            np.array(numbers, np.int32),
            np.stack([placement.positions(num_pages) for placement in self.placements]),
            np.stack([placement.rows_behind(count, skip) for placement, count, skip in self.sequences]),
            np.stack([np.pad(found, (0, most - len(found))) for found in packs]),
        )
        return Step(*self.flags, *map(mx.array, arrays))


@dataclass(frozen=True)
class Step:
    """The same as arrays, for a program: where tokens are, and where those of the call go.

    Attributes:
        begun, opens, padded: see `Call.flags`.
        numbers: int32 [sequences, 5]: length, packed, begin, tokens of the call, padding in front of them.
        position: int32 [sequences, places], see `Placement.positions`.
        rows: int32 [sequences, token_rows], see `Placement.rows_behind`.
        packs: int32 [sequences, a multiple of 32], see `Placement.packs`; longer than that for some sequences.
    """

    begun: bool
    opens: bool
    padded: bool
    numbers: mx.array
    position: mx.array
    rows: mx.array
    packs: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        return [self.numbers, self.position, self.rows, self.packs]

    def own(self, length: int) -> mx.array:
        """Positions of the tokens of the call, [sequences, length]; those of padding are outside of what is stored."""
        return (self.numbers[:, 0] - self.numbers[:, 4])[:, None] + mx.arange(length)


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
    if needed <= present or count >= PAGE_TOKENS:
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
    dense = mx.concatenate([_taken(both, step.rows), cache.head], axis=2)
    fresh = _taken(both, step.packs) if step.packs.shape[1] else None
    opening: tuple[mx.array, ...] = ()
    if step.opens and fmt.centred and query is not None:
        own, first = step.own(new.shape[2]), step.numbers[:, :1]
        real = (own >= first) & (own < first + step.numbers[:, 3:4])
        shown = mx.concatenate([step.position[:, : fmt.token_rows] >= 0, real], axis=1)
        opening = mx.where(shown[:, None, :, None], both, 0), mx.where(real[:, None, :, None], query, 0)
    return replace(cache, dense=dense, fresh=fresh, opening=opening)


def _taken(x: mx.array, index: mx.array) -> mx.array:
    """Rows of `x` [batch, heads, n, head_dim] at `index`, [1, m] for all sequences or [batch, m]."""
    if index.shape[0] == 1:
        return mx.take(x, index[0], axis=2)
    shape = (*x.shape[:2], index.shape[1], x.shape[3])
    return mx.take_along_axis(x, mx.broadcast_to(index[:, None, :, None], shape), axis=2)


def settle(cache: Packed, call: Call) -> Packed:
    """Pack what `append` has left of a call; there must be pages for it."""
    fmt, fresh = cache.fmt, cache.fresh
    if fresh is None:
        return Packed(fmt, cache.pages, cache.dense)
    if len(call.placements) == 1:
        return _settled(cache, call.placements[0], call.counts[0])
    pages, heads = cache.pages, []
    for at, (placement, count, _) in enumerate(call.sequences):
        row = cache.rows(slice(at, at + 1))
        part = replace(row, fresh=fresh[at : at + 1], opening=tuple(held[at : at + 1] for held in cache.opening))
        settled = _settled(part, placement, count)
        heads.append(settled.head)
        if settled.pages is not part.pages:
            pages = mx.slice_update(pages, settled.pages, mx.array([at]), axes=(0,))
    dense = mx.concatenate([cache.dense[:, :, : fmt.token_rows], mx.concatenate(heads)], axis=2)
    return Packed(fmt, pages, dense)


def _settled(cache: Packed, placement: Placement, count: int) -> Packed:
    fmt, head, pages = cache.fmt, cache.head, cache.pages
    chosen, slots = placement.slots(count, cache.num_pages)
    if not len(chosen) or cache.fresh is None:
        return Packed(fmt, pages, cache.dense)
    if placement.opens(count) and fmt.centred:
        scales = mx.expand_dims(balance(*cache.opening), 2) if cache.opening else head[:, :, 1:]
        head = kernels.head_rows(cache.fresh[:, :, :PAGE_TOKENS], scales, fmt)
    run = cache.fresh[:, :, chosen[0] * PAGE_TOKENS : (chosen[-1] + 1) * PAGE_TOKENS]
    pages = _placed(pages, kernels.encode_pages(run, head, fmt), mx.array(slots), fmt)
    return Packed(fmt, pages, mx.concatenate([cache.dense[:, :, : fmt.token_rows], head], axis=2))


def _placed(pages: mx.array, coded: mx.array, slots: mx.array, fmt: PackedFormat) -> mx.array:
    if fmt.keep is None:
        return mx.slice_update(pages, coded, slots[:1], axes=(2,))
    for at in range(coded.shape[2]):
        pages = mx.slice_update(pages, coded[:, :, at : at + 1], slots[at : at + 1], axes=(2,))
    return pages


def read(cache: Packed, placement: Placement) -> mx.array:
    """The tokens that are held, decoded: [batch, heads, held, head_dim]."""
    fmt, dense = cache.fmt, cache.dense
    made = kernels.read(cache.pages, dense, (placement.length, placement.packed, placement.begin), fmt)
    if made is not None:
        return made
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
    keys: mx.array, values: mx.array, formats: tuple[PackedFormat, PackedFormat], start: int = 0
) -> tuple[Packed, Packed, Placement]:
    """Dense tokens [batch, heads, n, head_dim] from position `start` on, packed; those before it have been dropped."""
    empty = Placement.empty(formats[0])
    call = Call.plain(replace(empty, length=start, packed=empty.fmt.packed_tokens(start), begin=start), keys.shape[2])
    after, made = call.placements[0].behind(call.length), []
    for dense, fmt in zip((keys, values), formats, strict=True):
        cache = Packed.empty(dense.shape[0], dense.shape[1], fmt, dense.dtype).with_pages(after.pages())
        made.append(settle(append(replace(cache, step=call.step(cache.num_pages)), dense), call))
    return made[0], made[1], after


def stacked(parts: Sequence[Packed]) -> Packed:
    """One batch of several."""
    most = max(part.num_pages for part in parts)
    parts = [part.with_pages(most) for part in parts]
    pages, dense = (mx.concatenate([getattr(part, name) for part in parts]) for name in ("pages", "dense"))
    return Packed(parts[0].fmt, pages, dense)
