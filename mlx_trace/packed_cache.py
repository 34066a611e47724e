"""Caches of mlx-lm that hold packed tokens. A compiled model turns the plain caches that it is given into these.

They are what they were to mlx-lm: `trim`, `copy.deepcopy`, `nbytes`, `state` and prompt-cache files work. The classes
carry the names of mlx-lm's own, by which `load_prompt_cache` makes an object anew; what it makes is a plain cache whose
keys and values are lists, which `adopt` turns back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache

from tqc.format import PackedFormat
from tqc.mlx_trace.packed import Call, Packed, append, cut, packed_from, read, roomy, settle
from tqc.mlx_trace.placement import Placement

Formats = tuple[PackedFormat, PackedFormat]


class PackedCache:
    """What packed caches have in common. `keys` and `values` are `Packed`, or None before the first token.

    Attributes:
        formats: of keys and values.
        placements: where the tokens are, the same for keys and values: one for all sequences, or one for each.
    """

    formats: Formats
    placements: tuple[Placement, ...]
    keys: Any
    values: Any

    def start(self, keys: mx.array, values: mx.array) -> None:
        """Hold no token of these shapes and dtypes yet."""
        self.keys, self.values = (
            Packed.empty(held.shape[0], held.shape[1], fmt, held.dtype)
            for held, fmt in zip((keys, values), self.formats, strict=True)
        )

    def call(self, length: int) -> Call:
        """What a call of `length` tokens brings to this cache."""
        return Call(length, self.placements, (0,) * len(self.placements), (length,) * len(self.placements))

    def reserve(self, call: Call) -> None:
        """Make room for the tokens of a call."""
        present = self.keys.num_pages
        pages = max(roomy(placement, count, present) for placement, count, _ in call.sequences)
        self.keys, self.values = self.keys.with_pages(pages), self.values.with_pages(pages)

    def hold(self, keys: Packed, values: Packed, call: Call) -> None:
        """Take what has become of the parts once the tokens of a call are stored."""
        self.keys, self.values = keys, values
        self.placements = tuple(placement.behind(count) for placement, count, _ in call.sequences)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """For calls that no captured program serves: new tokens are stored, and all of them decoded."""
        if self.keys is None:
            self.start(keys, values)
        before, call = self.keys_and_values(), self.call(keys.shape[2])
        self.reserve(call)
        step = call.step(self.keys.num_pages)
        k, v = append(replace(self.keys, step=step), keys), append(replace(self.values, step=step), values)
        self.hold(settle(k, call), settle(v, call), call)
        return mx.concatenate([before[0], keys], axis=2), mx.concatenate([before[1], values], axis=2)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """The tokens that are held, decoded: [batch, heads, held, head_dim]."""
        return read(self.keys, self.placements[0]), read(self.values, self.placements[0])

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> Any:
        raise ValueError("the cache is packed already: give no kv_bits to a model of tqc.compile_mlx")


class PackedSingle(PackedCache):
    """Caches whose sequences, mostly one, have the same tokens. Their `merge` is in `packed_batch.py`."""

    @property
    def placement(self) -> Placement:
        return self.placements[0]

    @property
    def offset(self) -> int:
        """How many tokens came."""
        return self.placement.length

    def trim(self, n: int) -> int:
        """Drop the last `n` tokens, or all that are held; returns how many."""
        n = min(self.placement.held, n)
        if n:
            length = self.placement.length - n
            self.keys, after = cut(self.keys, self.placement, length)
            self.values, _ = cut(self.values, self.placement, length)
            self.placements = (after,)
        return n

    @property
    def _trees(self) -> list[Any]:
        """Keys and values as lists of what a prompt-cache file can hold."""
        if self.keys is None:
            return [None, None]
        numbers = [self.placement.length, self.placement.packed, self.placement.begin]
        return [[part.pages, part.dense, str(part.fmt), *numbers] for part in (self.keys, self.values)]


class PackedKVCache(PackedSingle, KVCache):
    """A KVCache."""

    @property
    def state(self) -> Any:
        return (*self._trees, self.offset)


class PackedRotatingKVCache(PackedSingle, RotatingKVCache):
    """A RotatingKVCache that keeps no first tokens: a sliding window."""

    @property
    def state(self) -> Any:
        return (*self._trees, self.offset, self.keep, self.max_size, self.offset)

    def size(self) -> int:
        return min(self.offset, self.max_size)

    def is_trimmable(self) -> bool:
        return self.placement.begin == 0


CLASSES: dict[type, type] = {KVCache: PackedKVCache, RotatingKVCache: PackedRotatingKVCache}
for _plain, _packed in CLASSES.items():
    _packed.__name__ = _plain.__name__


def adopt(cache: Any, formats: Formats) -> Any:
    """Turn a plain KVCache or RotatingKVCache into a packed one, in place, with the tokens that it holds.

    Raises:
        ValueError: for a cache that was packed or saved in other formats.
    """
    if isinstance(cache, PackedCache):
        if cache.formats != formats:
            raise ValueError(f"the cache is packed as {_said(cache.formats)}, and the model takes {_said(formats)}")
        return cache
    keys, values, placement = cache.keys, cache.values, Placement.empty(formats[0])
    if isinstance(keys, (list, tuple)):
        given = (PackedFormat.parse(keys[2]), PackedFormat.parse(values[2]))
        if given != formats:
            raise ValueError(f"the cache was saved as {_said(given)}, and the model takes {_said(formats)}")
        placement = Placement(placement.fmt, *(int(number) for number in keys[3:]))
        keys, values = (
            Packed(fmt, held[0].reshape(*held[1].shape[:2], -1, fmt.page_bytes), held[1])
            for fmt, held in zip(formats, (keys, values), strict=True)
        )
    elif keys is not None:
        if isinstance(cache, RotatingKVCache):
            keys, values = cache._temporal_order(keys), cache._temporal_order(values)
        keys, values = keys[:, :, : cache.offset], values[:, :, : cache.offset]
        keys, values, placement = packed_from(keys, values, formats, cache.offset - keys.shape[2])
    return holding(cache, keys, values, (placement,), formats)


def holding(plain: Any, keys: Any, values: Any, placements: tuple[Placement, ...], formats: Formats) -> Any:
    """A plain cache, turned into a packed one with these parts."""
    vars(plain).pop("offset", None)
    plain.__class__ = CLASSES[type(plain)]
    plain.keys, plain.values, plain.placements, plain.formats = keys, values, placements, formats
    return plain


def _said(formats: Formats) -> str:
    return " and ".join(map(str, formats))
