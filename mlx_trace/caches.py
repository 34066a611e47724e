"""mlx-lm's caches in a captured program: what a graph takes of each, what stands for it in a trace, what it gets back.

A graph has fixed shapes but for the lengths of caches, so each cache hands over a whole buffer, and masks say which
part of it counts. Positions are arrays: one `offset` for all caches, and where a full window goes round, an `index`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, BatchKVCache, BatchRotatingKVCache, CacheList, KVCache, RotatingKVCache

from tqc.mlx_trace.graph import CaptureError
from tqc.mlx_trace.markers import Trace


def leaves(caches: Any) -> Iterator[Any]:
    """Caches that hold arrays, those within a CacheList one by one; None where a layer has none."""
    for cache in caches:
        if type(cache) is CacheList:
            yield from leaves(cache.caches)
        else:
            yield cache


def rebuilt(caches: Any, made: Iterator[Any]) -> list[Any]:
    """The same structure with other leaves."""
    return [CacheList(*rebuilt(cache.caches, made)) if type(cache) is CacheList else next(made) for cache in caches]


def may_pack(cache: Any) -> bool:
    """Whether a cache holds keys and values in a way that the packed format has too."""
    if type(cache) is RotatingKVCache:
        return cache.keep == 0
    return type(cache) in (KVCache, BatchKVCache, BatchRotatingKVCache) or hasattr(cache, "placements")


def kind_of(cache: Any, length: int) -> Kind:
    """How a cache takes part in calls of `length` tokens.

    Raises:
        CaptureError: for a class that is not known, or a state that it cannot be captured in.
    """
    if hasattr(cache, "placements"):
        raise CaptureError("the cache is packed, and the model was compiled to leave it dense")
    if type(cache) is KVCache:
        return Whole()
    if type(cache) is RotatingKVCache:
        return (Ring if length == 1 else Window)(cache.max_size, cache.keep)
    if type(cache) is ArraysCache and cache.lengths is None and cache.left_padding is None:
        return Arrays([held is None for held in cache.cache])
    if cache is None:
        return Kind()
    padded = " for a padded batch" if type(cache) is ArraysCache else ""
    raise CaptureError(f"a cache of class {type(cache).__name__}{padded} is not known")


class Kind:
    """A layer without a cache, and what the other kinds have in common.

    Attributes:
        size: length of buffers in a trace, a number that no other size is.
        shapes: of what the graph takes, with dtypes; known once `learn` has seen a cache that the model has filled.
    """

    name = "none"
    size = 0
    max_size: int | None = None
    goes_round = False

    def __init__(self) -> None:
        self.shapes: list[tuple[tuple[int, ...], mx.Dtype]] = []

    @property
    def signature(self) -> Any:
        """What calls must have in common for one graph to serve them."""
        return self.name

    @property
    def results(self) -> int:
        """How many arrays the graph gives back."""
        return len(self.shapes)

    def fresh(self) -> Any:
        """An empty cache of mlx-lm's own."""
        return None

    def learn(self, cache: Any) -> None:
        self.shapes = []

    def traced(self, trace: Trace, arrays: list[mx.array], offset: mx.array, index: Any) -> Any:
        """What the model is given in a trace; `made` reads from it what has become of the arrays.

        Args:
            index: where the next token goes, if the buffer goes round.
        """
        return None

    def made(self, traced: Any) -> list[mx.array]:
        return [traced.keys, traced.values]

    def prepare(self, cache: Any, length: int) -> list[mx.array]:
        """What the graph takes, with room for `length` new tokens."""
        return []

    def store(self, cache: Any, arrays: list[mx.array], length: int) -> None:
        """Give a cache what the graph has made."""

    def _zeros(self, length: int) -> list[mx.array]:
        return [mx.zeros((*shape[:2], length, shape[3]), dtype) for shape, dtype in self.shapes]


class Whole(Kind):
    """KVCache: buffers that are written behind the tokens before."""

    name = "whole"

    def fresh(self) -> Any:
        return KVCache()

    def learn(self, cache: Any) -> None:
        held = [] if cache.keys is None else [cache.keys, cache.values]
        self.shapes = [((*array.shape[:2], self.size, array.shape[3]), array.dtype) for array in held]

    def traced(self, trace: Trace, arrays: list[mx.array], offset: mx.array, index: Any) -> Any:
        return Traced(self, trace, arrays, offset, offset)

    def prepare(self, cache: Any, length: int) -> list[mx.array]:
        if not self.shapes:
            return []
        if cache.keys is None:
            cache.keys, cache.values = self._zeros(0)
        missing = cache.offset + length - cache.keys.shape[2]
        if missing > 0:
            more = self._zeros(-(-missing // cache.step) * cache.step)
            cache.keys, cache.values = (
                mx.concatenate([held, zeros], 2) for held, zeros in zip((cache.keys, cache.values), more, strict=True)
            )
        return [cache.keys, cache.values]

    def store(self, cache: Any, arrays: list[mx.array], length: int) -> None:
        if arrays:
            cache.keys, cache.values = arrays
            cache.offset += length


class Ring(Whole):
    """RotatingKVCache for one token, which replaces the oldest where the window is full."""

    name, goes_round = "ring", True

    def __init__(self, max_size: int, keep: int) -> None:
        super().__init__()
        self.max_size, self.keep = max_size, keep

    @property
    def signature(self) -> Any:
        return (self.name, self.max_size, self.keep)

    def fresh(self) -> Any:
        return RotatingKVCache(self.max_size, self.keep)

    def traced(self, trace: Trace, arrays: list[mx.array], offset: mx.array, index: Any) -> Any:
        return Traced(self, trace, arrays, offset, index)

    def prepare(self, cache: Any, length: int) -> list[mx.array]:
        if not self.shapes:
            return []
        if cache.keys is None:
            cache.keys, cache.values = self._zeros(0)
        held, size = cache.keys.shape[2], self.max_size
        assert size is not None
        if cache.offset >= held and held < size:
            more = self._zeros(min(cache.step, size - cache.offset))
            cache.keys = mx.concatenate([cache.keys, more[0]], 2)
            cache.values = mx.concatenate([cache.values, more[1]], 2)
            cache._idx = cache.offset
        elif held > size:
            cache.keys = cache._trim(held - size, cache.keys)
            cache.values = cache._trim(held - size, cache.values)
            cache._idx = size
        if cache._idx == size:
            cache._idx = self.keep
        return [cache.keys, cache.values]

    def store(self, cache: Any, arrays: list[mx.array], length: int) -> None:
        super().store(cache, arrays, length)
        if arrays:
            cache._idx += length


class Window(Ring):
    """RotatingKVCache for several tokens: they come behind those that the window still shows."""

    name, goes_round = "window", False

    def traced(self, trace: Trace, arrays: list[mx.array], offset: mx.array, index: Any) -> Any:
        return Traced(self, trace, arrays, offset, None)

    def prepare(self, cache: Any, length: int) -> list[mx.array]:
        if not self.shapes:
            return []
        if cache.keys is None:
            return self._zeros(0)
        past = [cache._temporal_order(held) for held in (cache.keys, cache.values)]
        assert self.max_size is not None
        trim = past[0].shape[2] - self.max_size + 1
        return [cache._trim(trim, held) for held in past] if trim > 0 else past

    def store(self, cache: Any, arrays: list[mx.array], length: int) -> None:
        if arrays:
            cache.keys, cache.values = arrays
            cache.offset += length
            cache._idx = arrays[0].shape[2]


class Arrays(Kind):
    """ArraysCache: states of layers that are no attention."""

    name = "arrays"

    def __init__(self, empty: list[bool]) -> None:
        super().__init__()
        self.empty = empty

    @property
    def signature(self) -> Any:
        return ("arrays", *self.empty, *(tuple(shape) for shape, _ in self.shapes))

    @property
    def results(self) -> int:
        return len(self.empty)

    def fresh(self) -> Any:
        return ArraysCache(len(self.empty))

    def learn(self, cache: Any) -> None:
        held = [array for array, empty in zip(cache.cache, self.empty, strict=True) if not empty]
        self.shapes = [(tuple(array.shape), array.dtype) for array in held]

    def traced(self, trace: Trace, arrays: list[mx.array], offset: mx.array, index: Any) -> Any:
        cache, given = self.fresh(), iter(arrays)
        cache.cache = [None if empty else next(given) for empty in self.empty]
        return cache

    def made(self, traced: Any) -> list[mx.array]:
        if any(array is None for array in traced.cache):
            raise CaptureError("a state stays empty behind a call")
        return list(traced.cache)

    def prepare(self, cache: Any, length: int) -> list[mx.array]:
        return [array for array in cache.cache if array is not None]

    def store(self, cache: Any, arrays: list[mx.array], length: int) -> None:
        cache.cache = list(arrays)


class Traced:
    """What a model sees of a KVCache or a RotatingKVCache in a trace."""

    def __init__(self, kind: Kind, trace: Trace, arrays: list[mx.array], offset: mx.array, at: mx.array | None) -> None:
        self.keys: Any = arrays[0] if arrays else None
        self.values: Any = arrays[1] if arrays else None
        self.kind, self.trace, self.offset, self._at = kind, trace, offset, at
        self.max_size = kind.max_size
        self._first = offset
        if arrays:
            trace.masks.setdefault(kind.size, self.make_mask)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is None or self.values is None:
            raise CaptureError("a cache is filled that stayed empty when its shapes were asked for")
        self.keys, self.values = self._stored(self.keys, keys), self._stored(self.values, values)
        self.offset = self.offset + keys.shape[2]
        return self.keys, self.values

    def _stored(self, held: mx.array, new: mx.array) -> mx.array:
        new = new.astype(held.dtype)
        if self._at is None:
            longer = (*held.shape[:2], held.shape[2] + new.shape[2], held.shape[3])
            self.trace.masks.setdefault(longer[2], self.make_mask)
            return self.trace.mark("window_append", [held, new], longer, held.dtype)
        name = "cache_write" if self.kind.name == "whole" else "ring_write"
        return self.trace.mark(name, [held, new, self._at], held.shape, held.dtype)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """The mask of new tokens, [length, columns]: always an array, since buffers are longer than what counts."""
        held = self.keys
        if held is None:
            raise CaptureError("a mask is asked of a cache that stays empty")
        if self._at is None:
            shape = (length, self.kind.size + length)
            return self.trace.mask_of("window_mask", [held], shape, length, window_size or self.max_size)
        if self.max_size is not None:
            if window_size is not None and window_size < self.max_size:
                raise CaptureError(f"a window of {window_size} in a cache for {self.max_size} tokens")
            window_size = None  # the buffer holds no more
        shape = (length, self.kind.size)
        return self.trace.mask_of("causal_mask", [held, self._first], shape, length, window_size)
