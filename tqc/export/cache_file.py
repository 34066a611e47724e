"""The cache of an `OnnxGenerator` as a cache of transformers, and so as the project's cache file, both ways."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from tqc.cache.io import load_cache, save_cache
from tqc.cache.packed_tensor import PackedTensor
from tqc.cache.storage import Storage
from tqc.export.generator import OnnxGenerator
from tqc.export.metadata import ModelFileError
from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.lowering.onnx.layout import from_planes, to_planes
from tqc.torch_private import fill_layer, new_layer


def save(generator: OnnxGenerator, path: str | os.PathLike[str]) -> None:
    """Write the tokens that a generator holds as `tqc.save_cache` writes any cache.

    Raises:
        ModelFileError: for a cache that is in part dense.
    """
    save_cache(as_cache(generator), path)


def as_cache(generator: OnnxGenerator) -> Any:
    """A copy of the tokens that a generator holds, as torch's models take it.

    Raises:
        ModelFileError: for a cache that is in part dense.
    """
    if generator.metadata["dense"]:
        raise ModelFileError(f"cache {generator.metadata['dense'][0]['name']} is dense: only packed caches are saved")
    held, tensors = generator.cache, dict[str, PackedTensor]()
    for packed in generator.metadata["packed"]:
        fmt = PackedFormat.parse(packed["spec"])
        pages, dense = to_planes({part: held[f"{packed['name']}.{part}"] for part in packed["parts"]}, fmt)
        state = torch.from_numpy(held[packed["state"]].copy())
        storage = Storage(torch.from_numpy(pages), torch.from_numpy(dense), state, fmt, *state.tolist())
        tensors[packed["name"]] = PackedTensor.up_to(storage, int(state[0]))
    cache = DynamicCache()
    numbers = sorted({int(name.split(".")[0]) for name in tensors})
    cache.layers = [_layer(tensors[f"{number}.key"], tensors[f"{number}.value"]) for number in numbers]
    return cache


def _layer(keys: PackedTensor, values: PackedTensor) -> Any:
    keep = keys.fmt.keep
    if keep is None:
        layer = new_layer("DynamicLayer", {})
    else:
        layer = new_layer("DynamicSlidingWindowLayer", {"sliding_window": keep + 1})
        layer.cumulative_length = keys.end
    fill_layer(layer, keys, values)
    return layer


def _pages(tensor: PackedTensor, packed: dict[str, Any]) -> np.ndarray:
    """Pages where the generator expects them: those of a window go round in as many slots as it has."""
    pages, fmt = tensor.pages.numpy(), tensor.fmt
    if fmt.keep is None or not pages.shape[2]:
        return pages
    slots = packed["parts"]["scales"][2]
    placed = np.zeros((*pages.shape[:2], slots, pages.shape[3]), np.uint8)
    _, coded, begin = tensor.state.tolist()
    for page in range(max(0, begin - fmt.sink_tokens) // PAGE_TOKENS, coded // PAGE_TOKENS):
        placed[:, :, page % slots] = pages[:, :, page % pages.shape[2]]
    return placed


def load(generator: OnnxGenerator, path: str | os.PathLike[str], mask: np.ndarray | None = None) -> None:
    """Go on behind the tokens of a cache file.

    Args:
        mask: int64 [batch, tokens], 0 for padding; all count without it.

    Raises:
        ModelFileError: if the file holds caches of other formats, layers or sizes than the model's.
        CacheFileError: if it is no cache file.
    """
    cache: Any = load_cache(path)
    parts: dict[str, np.ndarray] = {}
    states: dict[str, np.ndarray] = {}
    for packed in generator.metadata["packed"]:
        layer, part = packed["name"].split(".")
        tensor = getattr(cache.layers[int(layer)], f"{part}s", None) if int(layer) < len(cache.layers) else None
        if not isinstance(tensor, PackedTensor) or str(tensor.fmt) != packed["spec"]:
            found = str(tensor.fmt) if isinstance(tensor, PackedTensor) else "nothing packed"
            raise ModelFileError(f"{path} has {found} for {packed['name']}, and the model takes {packed['spec']}")
        if tensor.end > generator.max_cache_len:
            raise ModelFileError(f"{path} has {tensor.end} tokens, more than max_cache_len, {generator.max_cache_len}")
        held = from_planes(_pages(tensor, packed), tensor.dense.numpy(), tensor.fmt, generator.max_cache_len)
        shapes = {name: list(shape) for name, (_, *shape) in packed["parts"].items()}
        if any(list(held[name].shape[1:]) != shapes[name] for name in shapes):
            raise ModelFileError(f"{path} has {tensor.shape[1]} heads for {packed['name']}, and the model does not")
        parts |= {f"{packed['name']}.{name}": array for name, array in held.items()}
        states[packed["state"]] = tensor.state.numpy()
    batch, length = next(iter(parts.values())).shape[0], int(next(iter(states.values()))[0])
    generator.restore(parts, states, np.ones((batch, length), np.int64) if mask is None else mask)
