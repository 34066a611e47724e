"""Caches of mlx-lm as those of transformers, and back: by way of these they are written to files and read from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import torch
from mlx_lm.models.cache import KVCache, RotatingKVCache

from tqc.cache.packed_tensor import PackedTensor
from tqc.cache.storage import Storage
from tqc.cache.stored import stored
from tqc.mlx_trace.arrays import array_of, tensor_of
from tqc.mlx_trace.caches import leaves
from tqc.mlx_trace.packed import Packed
from tqc.mlx_trace.packed_cache import holding
from tqc.mlx_trace.placement import Placement
from tqc.torch_private import fill_layer, new_layer


def bytes_of(caches: Sequence[Any]) -> int:
    """Bytes of all arrays that caches of mlx-lm hold, spare room included."""
    return sum(cache.nbytes for cache in leaves(caches) if cache is not None and not cache.empty())


def to_torch(caches: Sequence[Any]) -> Any:
    """A DynamicCache with the same tokens, on the CPU.

    Raises:
        TypeError: for a cache that is no KVCache and no sliding window.
    """
    from transformers.cache_utils import DynamicCache

    made = DynamicCache()
    made.layers = [_layer(cache, at) for at, cache in enumerate(leaves(caches))]
    return made


def _layer(cache: Any, at: int) -> Any:
    windowed = isinstance(cache, RotatingKVCache)
    if not isinstance(cache, KVCache) and not (windowed and cache.keep == 0):
        kept = f" that keeps its first {cache.keep} tokens" if windowed else ""
        raise TypeError(f"cannot save cache {at}: it is a {type(cache).__name__}{kept}, and only KVCache and sliding "
                        "windows of RotatingKVCache are saved")  # fmt: skip
    numbers = {"sliding_window": cache.max_size} if windowed else {}
    layer = new_layer("DynamicSlidingWindowLayer" if windowed else "DynamicLayer", numbers)
    if cache.keys is None:
        return layer
    parts = (cache.keys, cache.values)
    fill_layer(layer, *(_tensor(cache, part) if isinstance(part, Packed) else _tokens(cache, part) for part in parts))
    if windowed:
        layer.cumulative_length = cache.offset
    return layer


def _tensor(cache: Any, part: Packed) -> PackedTensor:
    placement = cache.placement
    numbers = (placement.length, placement.packed, placement.begin)
    parts = tensor_of(part.pages), tensor_of(part.dense), torch.tensor(numbers)
    return PackedTensor(Storage(*parts, part.fmt, *numbers), placement.held, placement.begin)


def _tokens(cache: Any, held: mx.array) -> torch.Tensor:
    """The dense tokens that the next call may look at."""
    if isinstance(cache, RotatingKVCache):
        held = cache._temporal_order(held)[:, :, -(cache.max_size - 1) :]
    return tensor_of(held[:, :, : cache.offset])


def from_torch(cache: Any) -> list[Any]:
    """Caches of mlx-lm with the tokens of a cache of transformers, one a layer.

    Raises:
        TypeError: for a cache that has no layers of keys and values.
        ValueError: for folded values, which only torch runs.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise TypeError(f"mlx-lm has no cache for a {type(cache).__name__}")
    return [_cache(layer, at) for at, layer in enumerate(layers)]


def _cache(layer: Any, at: int) -> Any:
    window = getattr(layer, "sliding_window", None)
    plain = KVCache() if window is None else RotatingKVCache(window)
    if getattr(layer, "keys", None) is None:
        return plain
    if not isinstance(layer.keys, PackedTensor):
        plain.keys, plain.values = array_of(layer.keys), array_of(layer.values)
        plain.offset = plain.keys.shape[2]
        if window is not None:
            plain.offset = int(layer.cumulative_length)
            if plain.offset >= window:  # mlx-lm's window has one token more, which the next one replaces
                plain.keys, plain.values = (
                    mx.pad(held, [(0, 0), (0, 0), (window - held.shape[2], 0), (0, 0)])
                    for held in (plain.keys, plain.values)
                )
            plain._idx = plain.keys.shape[2]
        return plain
    (keys, placement), (values, other) = _packed(layer.keys), _packed(layer.values)
    if placement != other:
        raise ValueError(f"keys and values of layer {at} are placed in different ways: {placement} and {other}")
    return holding(plain, keys, values, (placement,), (keys.fmt, values.fmt))


def _packed(x: PackedTensor) -> tuple[Packed, Placement]:
    if x.fmt.folded:
        raise ValueError(f"the values are folded, which MLX does not run: {x.fmt}")
    numbers, parts = stored(x)
    fmt = x.fmt
    placement = Placement(Placement.empty(fmt).fmt, numbers.stored, numbers.packed, numbers.begin)
    pages = torch.zeros(*x.shape[:2], placement.pages(), fmt.page_bytes, dtype=torch.uint8)
    pages[:, :, numbers.slots(pages.shape[2])] = parts["pages"][:, :, : numbers.held_pages]
    dense = fmt.empty_dense(x.shape[0], x.shape[1], fmt.dense_rows, x.dtype, "cpu")
    rows = min(parts["dense"].shape[2], fmt.dense_rows)
    dense[:, :, :rows] = parts["dense"][:, :, :rows]
    return Packed(fmt, array_of(pages), array_of(dense)), placement
