"""Packed caches of a batch: each sequence has tokens, pages and a length of its own, so no padding is stored.

mlx-lm pads the prompts of a batch on the right, tells the caches their lengths by `prepare`, and has them shift all
tokens by `finalize`; or it pads on the left. Here padding is not stored in the first place, and nothing is shifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache

from tqc.mlx_trace.packed import Call, Packed, cut, packed_from, read, stacked
from tqc.mlx_trace.packed_cache import CLASSES, Formats, PackedCache, adopt, holding
from tqc.mlx_trace.placement import Placement


class PackedBatch(PackedCache):
    """A batch of caches.

    Attributes:
        left: how many tokens of padding are still to come in front of each sequence.
        lengths: how many tokens of each sequence are still to come before its padding; None where none is padded.
    """

    left: tuple[int, ...]
    lengths: tuple[int, ...] | None

    @property
    def offset(self) -> mx.array:
        """Position of the next token of each sequence, int32 [batch]."""
        return mx.array([placement.length - left for placement, left in zip(self.placements, self.left, strict=True)])

    @property
    def left_padding(self) -> mx.array:
        """As if all sequences were stored to the length of the longest."""
        most = max(placement.held for placement in self.placements)
        return mx.array([most - placement.held for placement in self.placements])

    def call(self, length: int) -> Call:
        skips = tuple(min(left, length) for left in self.left)
        counts = tuple(length - skip for skip in skips)
        if self.lengths is not None:
            counts = tuple(min(count, left) for count, left in zip(counts, self.lengths, strict=True))
        return Call(length, self.placements, skips, counts)

    def hold(self, keys: Packed, values: Packed, call: Call) -> None:
        super().hold(keys, values, call)
        self.left = tuple(left - skip for left, skip in zip(self.left, call.skips, strict=True))
        if self.lengths is not None:
            self.lengths = tuple(left - count for left, count in zip(self.lengths, call.counts, strict=True))

    def prepare(self, *, left_padding: Any = None, lengths: Any = None, right_padding: Any = None) -> None:
        if left_padding is not None:
            if self.size():
                raise ValueError("left padding can only be added to an empty cache")
            self.left = tuple(left + int(more) for left, more in zip(self.left, left_padding, strict=True))
        if right_padding is not None and max(right_padding) > 0:
            if lengths is None:
                raise ValueError("lengths must be given with right_padding, got None")
            self.lengths = tuple(map(int, lengths))

    def finalize(self) -> None:
        self.lengths = None

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Decoded, zeros in front of sequences that are shorter: [batch, heads, longest, head_dim]."""
        if any(self.left) or self.lengths is not None:
            raise ValueError("a padded batch with packed caches is for a compiled model alone")
        most = max(placement.held for placement in self.placements)
        made = []
        for part in (self.keys, self.values):
            rows = [read(part.rows(slice(at, at + 1)), held) for at, held in enumerate(self.placements)]
            made.append(mx.concatenate([mx.pad(x, [(0, 0), (0, 0), (most - x.shape[2], 0), (0, 0)]) for x in rows]))
        return made[0], made[1]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        from mlx_lm.models.base import create_causal_mask

        held = max(placement.held for placement in self.placements)
        window = window_size or getattr(self, "max_size", None)
        return create_causal_mask(N, offset=held, window_size=window, left_padding=self.left_padding)

    def filter(self, batch_indices: Any) -> None:
        chosen = batch_indices.tolist() if isinstance(batch_indices, mx.array) else list(batch_indices)
        if self.keys is not None:
            self.keys, self.values = self.keys.rows(mx.array(chosen)), self.values.rows(mx.array(chosen))
        self.placements, self.left = (tuple(held[at] for at in chosen) for held in (self.placements, self.left))
        if self.lengths is not None:
            self.lengths = tuple(self.lengths[at] for at in chosen)

    def extend(self, other: Any) -> None:
        other = adopt_batch(other, self.formats)
        parts = [cache for cache in (self, other) if cache.keys is not None]
        if parts:
            for cache in (self, other):
                if cache.keys is None:
                    cache.start(*(_like(part, len(cache.placements)) for part in (parts[0].keys, parts[0].values)))
            self.keys, self.values = stacked([self.keys, other.keys]), stacked([self.values, other.values])
        self.placements, self.left = self.placements + other.placements, self.left + other.left

    def extract(self, idx: int) -> Any:
        plain = RotatingKVCache(self.max_size) if isinstance(self, BatchRotatingKVCache) else KVCache()
        row = slice(idx, idx + 1)
        keys, values = (None if part is None else part.rows(row) for part in (self.keys, self.values))
        return holding(plain, keys, values, (self.placements[idx],), self.formats)

    def trim(self, n: int) -> int:
        n = min(n, *(placement.held for placement in self.placements))
        if n:
            rows = []
            for at, placement in enumerate(self.placements):
                parts = [part.rows(slice(at, at + 1)) for part in (self.keys, self.values)]
                rows.append([cut(part, placement, placement.length - n) for part in parts])
            self.keys, self.values = (stacked([row[part][0] for row in rows]) for part in (0, 1))
            self.placements = tuple(row[0][1] for row in rows)
        return n

    def size(self) -> int:
        return max(placement.held for placement in self.placements)

    def is_trimmable(self) -> bool:
        return all(placement.begin == 0 for placement in self.placements)

    @property
    def state(self) -> Any:
        parts = [] if self.keys is None else [self.keys, self.values]
        return [array for part in parts for array in (part.pages, part.dense)]

    @classmethod
    def merge(cls, caches: Any) -> Any:
        raise ValueError("a batch cannot be merged with others: extend it")


class PackedBatchKVCache(PackedBatch, BatchKVCache):
    """A BatchKVCache."""


class PackedBatchRotatingKVCache(PackedBatch, BatchRotatingKVCache):
    """A BatchRotatingKVCache."""


CLASSES |= {BatchKVCache: PackedBatchKVCache, BatchRotatingKVCache: PackedBatchRotatingKVCache}
for _plain, _packed in CLASSES.items():
    _packed.__name__ = _plain.__name__


def _like(part: Packed, batch: int) -> mx.array:
    return mx.zeros((batch, part.dense.shape[1], 0, part.dense.shape[3]), part.dense.dtype)


def is_waiting(cache: Any) -> bool:
    """Whether a plain cache holds, or is about to get, a prompt that is padded on the right. It does not tell how long
    the prompt is, and so stays as it is until the padding is gone."""
    return getattr(cache, "_right_padding", None) is not None or getattr(cache, "_lengths", None) is not None


def adopt_batch(cache: Any, formats: Formats) -> Any:
    """Turn any plain cache into a packed one, in place, with the tokens that it holds; see `adopt`."""
    if isinstance(cache, PackedCache) or not isinstance(cache, (BatchKVCache, BatchRotatingKVCache)):
        return adopt(cache, formats)
    if is_waiting(cache):
        raise ValueError("a batch that is padded on the right cannot be packed before `finalize`")
    left, offsets = cache.left_padding.tolist(), cache.offset.tolist()
    empty = Placement.empty(formats[0])
    keys = values = None
    placements = (empty,) * len(left)
    if cache.keys is not None:
        if isinstance(cache, BatchRotatingKVCache):
            cache._temporal_order()
        rows = []
        for at, padding in enumerate(left):
            k, v = (held[at : at + 1, :, max(0, padding) : cache._idx] for held in (cache.keys, cache.values))
            rows.append(packed_from(k, v, formats, offsets[at] - k.shape[2]))
        keys, values = stacked([row[0] for row in rows]), stacked([row[1] for row in rows])
        placements, left = tuple(row[2] for row in rows), [0] * len(left)
    made = holding(cache, keys, values, placements, formats)
    vars(made).pop("left_padding", None)
    made.left, made.lengths = tuple(left), None
    return made


def merge(caches: Sequence[Any]) -> Any:
    """One batch of caches of one sequence, some of which are packed."""
    formats = next(cache.formats for cache in caches if isinstance(cache, PackedCache))
    rows = [adopt(cache, formats) for cache in caches]
    filled = next((row for row in rows if row.keys is not None), None)
    windowed = isinstance(rows[0], RotatingKVCache)
    batch = [0] * len(rows)
    plain = BatchRotatingKVCache(rows[0].max_size, batch) if windowed else BatchKVCache(batch)
    made = adopt_batch(plain, formats)
    if filled is not None:
        for row in rows:
            if row.keys is None:
                row.start(_like(filled.keys, 1), _like(filled.values, 1))
        made.keys, made.values = stacked([row.keys for row in rows]), stacked([row.values for row in rows])
        made.placements = tuple(row.placement for row in rows)
    return made


for _single in (CLASSES[KVCache], CLASSES[RotatingKVCache]):
    _single.merge = staticmethod(merge)  # type: ignore[attr-defined]
