"""Measure, save and load caches: `cache_bytes`, `save_cache`, `load_cache`.

A cache file is a safetensors file. Its metadata has `tqc_cache`, the version of this layout, and `cache`, a JSON
object which says what the tensors are:

    {"kind": "DynamicCache", "grows": true, "layers": [
        {"kind": "DynamicLayer",
         "keys": {"kind": "packed", "spec": "tq1:d64:b3:centred:s4:w64:hadamard:0", "length": 100},
         "values": {"kind": "dense"}}]}

A packed tensor `layers.0.keys` is stored as `layers.0.keys.pages` (those in use, no spare ones), `layers.0.keys.dense`
and `layers.0.keys.state` (see `tqc.format`), a dense one under its own name. An `EncoderDecoderCache` holds two caches
with the prefixes `self_attention.` and `cross_attention.`; a plain tuple of layers has kind `tuple`, and each of its
layers is a list of tensors (`layers.0.0`, `layers.0.1`, ...).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tqc.cache.file import CACHE_KINDS, DENSE_DTYPES, FILE_VERSION, CacheFile, CacheFileError
from tqc.cache.packed_tensor import PackedTensor
from tqc.format import PAGE_TOKENS
from tqc.torch_private import LAYER_COUNTERS, cache_grows, layer_counters


def cache_bytes(cache: Any) -> int:
    """Bytes of memory that a cache holds: whole storages (spare capacity included), each counted once.

    Args:
        cache: any transformers cache, a module (its buffers), a tensor, or tuples, lists and dicts of such.
    """
    storages: dict[tuple[torch.device, int], int] = {}
    for tensor in _held_tensors(cache):
        storage = tensor.untyped_storage()
        storages[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _held_tensors(held: Any) -> Iterator[Tensor]:
    """The plain tensors in `held`, those inside tensor subclasses included."""
    if isinstance(held, Tensor):
        if hasattr(held, "__tensor_flatten__"):
            for name in held.__tensor_flatten__()[0]:
                yield from _held_tensors(getattr(held, name))
        else:
            yield held
    elif isinstance(held, torch.nn.Module):
        yield from held.buffers()
    elif isinstance(held, Mapping):
        for item in held.values():
            yield from _held_tensors(item)
    elif isinstance(held, (list, tuple)):
        for item in held:
            yield from _held_tensors(item)
    elif any(hasattr(held, name) for name in ("layers", "keys", "self_attention_cache", "conv_states")):
        yield from _held_tensors(vars(held))


def save_cache(cache: Any, path: str | os.PathLike[str]) -> None:
    """Write a cache to one file; packed tensors stay packed. An existing file is replaced when all is written.

    Args:
        cache: a DynamicCache, a StaticCache, an EncoderDecoderCache of such, or a tuple of layers, each a tuple of
            tensors.

    Raises:
        TypeError: for another kind of cache, or a layer of a kind not in `LAYER_COUNTERS`; the message names it.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    description = _describe(cache, "", tensors)
    metadata = {"tqc_cache": str(FILE_VERSION), "cache": json.dumps(description)}
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, unfinished, metadata=metadata)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _describe(cache: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the file says about `cache`; its tensors are put into `tensors` under names that begin with `prefix`."""
    kind = _kind(cache)
    if isinstance(cache, (tuple, list)):
        layers = [
            [_describe_tensor(tensor, f"{prefix}layers.{i}.{j}", tensors) for j, tensor in enumerate(layer)]
            for i, layer in enumerate(cache)
        ]
        return {"kind": "tuple", "layers": layers}
    if kind == "EncoderDecoderCache":
        return {
            "kind": kind,
            "self_attention": _describe(cache.self_attention_cache, f"{prefix}self_attention.", tensors),
            "cross_attention": _describe(cache.cross_attention_cache, f"{prefix}cross_attention.", tensors),
        }
    if kind not in CACHE_KINDS:
        raise TypeError(
            f"cannot save a {kind}: only {', '.join(CACHE_KINDS)}, EncoderDecoderCache and tuples are saved"
        )
    described = [_describe_layer(layer, f"{prefix}layers.{i}", tensors) for i, layer in enumerate(cache.layers)]
    return {"kind": kind, "grows": cache_grows(cache), "layers": described}


def _describe_layer(layer: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    kind = _kind(layer)
    if kind not in LAYER_COUNTERS:
        raise TypeError(f"cannot save {name}: it is a {kind}, and only {', '.join(LAYER_COUNTERS)} are saved")
    numbers = {attribute: int(getattr(layer, attribute)) for attribute in layer_counters(kind)}
    parts = {part: _describe_tensor(getattr(layer, part), f"{name}.{part}", tensors) for part in ("keys", "values")}
    return {"kind": kind, **numbers, **parts}


def _kind(held: Any) -> str:
    """Name of a class of transformers; any other class with its module, so that a namesake is not mistaken."""
    cls = type(held)
    return cls.__name__ if cls.__module__ == "transformers.cache_utils" else f"{cls.__module__}.{cls.__name__}"


def _describe_tensor(tensor: Tensor | None, name: str, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        raise TypeError(f"cannot save {name}: it is a {type(tensor).__name__}, not a tensor")
    if not isinstance(tensor, PackedTensor):
        if tensor.dtype not in DENSE_DTYPES.values():
            raise TypeError(f"cannot save {name}: its dtype {tensor.dtype} is not one of a cache")
        tensors[name] = _own(tensor)
        return {"kind": "dense"}
    storage, length = tensor.packed_storage, tensor.shape[2]
    if length < storage.length:
        storage = storage.copy(length)
    tensors[f"{name}.pages"] = _own(storage.pages[:, :, : storage.packed // PAGE_TOKENS])
    tensors[f"{name}.dense"] = _own(storage.dense)
    tensors[f"{name}.state"] = _own(storage.state)
    return {"kind": "packed", "spec": str(storage.fmt), "length": length}


def _own(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU, contiguous, sharing memory with no other (safetensors refuses shared memory)."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def load_cache(path: str | os.PathLike[str], device: torch.device | str | None = None) -> Any:
    """Read a cache that `save_cache` wrote. No code from the file is run, and nothing is allocated before all sizes
    have been checked.

    Args:
        device: where its tensors go; the CPU if None.

    Returns:
        A cache of the kind that was saved.

    Raises:
        CacheFileError: if the file is not such a cache, is damaged or is of a newer version.
        OSError: if it cannot be opened.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            file = CacheFile(handle, torch.device(device or "cpu"))
            build = file.cache(file.description(), "")
            if unknown := sorted(file.names - file.used):
                raise CacheFileError(f"holds a tensor that belongs to nothing: {unknown[0]!r}")
            return build()
    except SafetensorError as error:
        raise CacheFileError(f"{path} is not a tqc cache, or it is truncated: {error}") from None
    except CacheFileError as error:
        raise CacheFileError(f"{path} {error}") from None
