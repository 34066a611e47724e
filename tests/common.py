"""Small caches, how two are compared, and the options that compiled ones are made with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticLayer

from tqc.cache.io import load_cache, save_cache
from tqc.cache.packed_tensor import PackedTensor, Storage, extend, pack, write_at
from tqc.format import PackedFormat
from tqc.ops import planes as ops

# Few recent tokens, so that 80 tokens make pages; 8 bits, so that only mistakes show.
OPTIONS: dict[str, Any] = {
    "provider": "reference",
    "rest": "eager",
    "residual_window": 32,
    "sink_tokens": 4,
    "bits_k": 8,
    "bits_v": 8,
}
KEYS, VALUES = PackedFormat(16, 3, True, 4, 32), PackedFormat(16, 2, False, 4, 32)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def empty(fmt, heads=2, batch=1, pages=12, dtype=torch.float32):
    """Storage of a cache without tokens, full of junk where nothing may be read."""
    dense = torch.full((batch, heads, fmt.dense_rows, fmt.head_dim), 77.0, dtype=dtype)
    page = torch.full((batch, heads, pages, fmt.page_bytes), 0xAB, dtype=torch.uint8)
    fmt.head(dense)[:, :, 1:] = 1
    return page, dense, torch.zeros(3, dtype=torch.int64)


def filled(x, fmt, **kwargs):
    parts = empty(fmt, x.shape[1], x.shape[0], dtype=x.dtype, **kwargs)
    ops.append(*parts, x, None, str(fmt))
    return parts


def states(length: int, heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Dense keys and values of two sequences."""
    generator = torch.Generator().manual_seed(length)
    keys, values = (torch.randn(2, heads, length, dim, generator=generator).to(dtype) for _ in range(2))
    return keys, values


def packed_cache(length: int = 100, layers: int = 2, dtype: torch.dtype = torch.float32) -> DynamicCache:
    """Two sequences in KEYS and VALUES, in each layer a token more."""
    cache = DynamicCache()
    for index in range(layers):
        cache.update(*states(length + index, dtype=dtype), index)
        layer = cache.layers[index]
        layer.keys, layer.values = pack(layer.keys, KEYS), pack(layer.values, VALUES)
    return cache


def packed_static_layer(length: int = 90, capacity: int = 200) -> StaticLayer:
    """Two sequences in KEYS and VALUES with room for more tokens."""
    layer = StaticLayer(max_cache_len=capacity)
    layer.lazy_initialization(*states(1))
    layer.cumulative_length += length
    for name, fmt, new in zip(("keys", "values"), (KEYS, VALUES), states(length), strict=True):
        tensor = PackedTensor(Storage.allocate(2, 2, fmt, new.dtype, new.device, capacity), capacity)
        write_at(tensor, new, torch.tensor([0]))
        setattr(layer, name, tensor)
    return layer


def packed_window_layer(length: int = 230, window: int = 100, dtype: torch.dtype = torch.float32) -> Any:
    """Two sequences in KEYS and VALUES, of which the last `window - 1` tokens are kept; half came one by one."""
    layer = DynamicSlidingWindowLayer(window)
    dense = states(length, dtype=dtype)
    layer.lazy_initialization(*dense)
    layer.cumulative_length = length
    for name, fmt, new in zip(("keys", "values"), (KEYS, VALUES), dense, strict=True):
        held = pack(new[:, :, : length // 2], replace(fmt, keep=window - 1))
        for at in range(length // 2, length):
            held = extend(held, new[:, :, at : at + 1])
        setattr(layer, name, held)
    return layer


def as_version_1(tensors: dict[str, torch.Tensor], description: Any, metadata: dict[str, str]) -> None:
    """Make of the parts of a file what version 1 wrote of the same cache, one without windows and balance."""
    metadata["tqc_cache"] = "1"
    for index, layer in enumerate(description["layers"]):
        for part in (layer["keys"], layer["values"]):
            name = f"layers.{index}.{'keys' if part is layer['keys'] else 'values'}"
            fmt, dense = PackedFormat.parse(part["spec"]), tensors[f"{name}.dense"]
            rows = dense.new_zeros(*dense.shape[:2], 1 + fmt.token_rows, fmt.head_dim)
            count = min(dense.shape[2], fmt.token_rows)
            rows[:, :, 1 : 1 + count] = dense[:, :, :count]
            if dense.shape[2] > fmt.token_rows:
                rows[:, :, :1] = fmt.head(dense)[:, :, :1]
            tensors[f"{name}.dense"], tensors[f"{name}.state"] = rows, tensors[f"{name}.state"][:2].clone()
            part["spec"] = part["spec"].replace("tq2", "tq1")


def assert_same(one: Any, other: Any) -> None:
    """Two caches hold the same layers, tensors, packed parts and numbers."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape and one.dtype == other.dtype
        if isinstance(one, PackedTensor):
            assert one.fmt == other.fmt and one.state.tolist() == other.state.tolist()
            assert torch.equal(one.dequantize(), other.dequantize())
        else:
            assert torch.equal(one, other)
    elif isinstance(one, (tuple, list)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif hasattr(one, "layers") or hasattr(one, "keys") or hasattr(one, "self_attention_cache"):
        # generate() marks the caches that it was given.
        assert_same(*({name: v for name, v in vars(x).items() if name != "_is_user_defined"} for x in (one, other)))
    else:
        assert one == other


def round_trip(cache: Any, folder: Path) -> Any:
    save_cache(cache, folder / "cache.safetensors")
    assert [file.name for file in folder.iterdir()] == ["cache.safetensors"]
    loaded = load_cache(folder / "cache.safetensors")
    assert_same(cache, loaded)
    return loaded
