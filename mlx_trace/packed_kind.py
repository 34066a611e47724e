"""How packed caches take part in a captured program: they grow, as the passes know it from torch.

In a trace a cache is an array of unknown length; new tokens are concatenated to it, and the whole, or the last tokens
of a sliding window, leaves the graph. The passes turn this into the ops of the dialect.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache

from tqc.mlx_trace.caches import Kind
from tqc.mlx_trace.graph import CaptureError
from tqc.mlx_trace.markers import Trace


class Growing(Kind):
    """A cache that is packed, or may be: KVCache, or RotatingKVCache without first tokens to keep.

    Args:
        cache: one of mlx-lm's, packed or plain.
    """

    name = "growing"

    def __init__(self, cache: Any) -> None:
        super().__init__()
        self.max_size = getattr(cache, "max_size", None)
        self.batched = isinstance(cache, (BatchKVCache, BatchRotatingKVCache))

    @property
    def signature(self) -> Any:
        return (self.name, self.max_size, self.batched)

    @property
    def keep(self) -> int | None:
        """How many tokens the next call may still look at; None for all."""
        return None if self.max_size is None else self.max_size - 1

    def fresh(self) -> Any:
        return KVCache() if self.max_size is None else RotatingKVCache(self.max_size)

    def learn(self, cache: Any) -> None:
        held = [] if cache.keys is None else [dense_of(cache.keys), dense_of(cache.values)]
        self.shapes = [((*part.shape[:2], self.size, part.shape[3]), part.dtype) for part in held]

    def traced(self, trace: Trace, arrays: list[mx.array], offset: mx.array, index: Any) -> Any:
        return TracedGrowing(self, trace, arrays, offset)

    def prepare(self, cache: Any, length: int) -> list[Any]:
        if cache.keys is None:
            cache.start(*(mx.zeros((*shape[:2], 0, shape[3]), dtype) for shape, dtype in self.shapes))
        for part, (shape, dtype) in zip((cache.keys, cache.values), self.shapes, strict=True):
            if (part.dense.shape[1], part.dense.shape[3], part.dense.dtype) != (shape[1], shape[3], dtype):
                held, wanted = _said(part.dense.shape, part.dense.dtype), _said(shape, dtype)
                raise ValueError(f"the cache holds {held}, and the model makes {wanted}: it is of another model")
        cache.reserve(cache.call(length))
        return [cache.keys, cache.values]

    def store(self, cache: Any, arrays: list[Any], length: int) -> None:
        cache.hold(*arrays, cache.call(length))


def _said(shape: Any, dtype: mx.Dtype) -> str:
    return f"{shape[1]} heads of {shape[3]} {str(dtype).rpartition('.')[2]} numbers"


def dense_of(part: Any) -> mx.array:
    """An array of the batch, heads and head_dim that a cache's keys or values have, plain, packed or just loaded."""
    return part[1] if isinstance(part, (list, tuple)) else getattr(part, "dense", part)


class TracedGrowing:
    """What a model sees of such a cache in a trace."""

    def __init__(self, kind: Growing, trace: Trace, arrays: list[mx.array], offset: mx.array) -> None:
        self.keys: Any = arrays[0] if arrays else None
        self.values: Any = arrays[1] if arrays else None
        self.kind, self.trace, self.offset = kind, trace, offset
        self.max_size = kind.max_size
        self._held = self.keys

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is None or self.keys is not self._held:
            raise CaptureError("a cache is filled twice, or stayed empty when its shapes were asked for")
        longer = self._grown(self.keys, keys), self._grown(self.values, values)
        self.keys, self.values = (self._last(held) for held in longer)
        self.offset = self.offset + keys.shape[2]
        return longer

    def _grown(self, held: mx.array, new: mx.array) -> mx.array:
        new = new.astype(held.dtype)
        shape = (*held.shape[:2], held.shape[2] + new.shape[2], held.shape[3])
        self.trace.masks.setdefault(shape[2], self.make_mask)
        return self.trace.mark("grown", [held, new], shape, held.dtype)

    def _last(self, longer: mx.array) -> mx.array:
        if self.kind.keep is None:
            return longer
        shape = (*longer.shape[:2], self.kind.size, longer.shape[3])
        return self.trace.mark("last_tokens", [longer], shape, longer.dtype, keep=self.kind.keep)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """The mask of new tokens, [length, columns]."""
        if self._held is None:
            raise CaptureError("a mask is asked of a cache that stays empty")
        window = window_size or self.max_size
        shape = (length, self.kind.size + length)
        return self.trace.mask_of("window_mask", [self._held], shape, length, window)
