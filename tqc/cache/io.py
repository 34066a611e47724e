"""Measure, save and load caches: `cache_bytes`, `save_cache`, `load_cache`.

A cache file is a safetensors file. Its metadata has `tqc_cache`, the version of this layout, and `cache`, a JSON
object which says what the tensors are:

    {"kind": "DynamicCache", "grows": true, "layers": [
        {"kind": "DynamicLayer",
         "keys": {"kind": "packed", "spec": "tq2:d64:b3:centred:s4:w64:hadamard:0", "length": 100},
         "values": {"kind": "dense"}}]}

A packed tensor `layers.0.keys` is stored as `layers.0.keys.pages`, `layers.0.keys.dense` and `layers.0.keys.state`, in
the one order and size that its tokens have whatever memory they lay in (see `tqc.cache.stored`); a dense one under its
own name. An `EncoderDecoderCache` holds two caches with the prefixes `self_attention.` and `cross_attention.`; a plain
tuple of layers has kind `tuple`, and each of its layers is a list of tensors (`layers.0.0`, `layers.0.1`, ...).

Files have the version of their packed tensors. In those of version 1 specs begin with `tq1`, `state` has no third
number and `dense` has a row for the centre in front of the tokens; they are converted while they are read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tqc.cache.file import CACHE_KINDS, DENSE_DTYPES, FILE_VERSION, MAX_HEADER_BYTES, CacheFile, CacheFileError
from tqc.cache.packed_tensor import PackedTensor
from tqc.cache.stored import stored
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
        path: a symbolic link stays, and what it leads to is written.

    Raises:
        TypeError: for another kind of cache, or a layer of a kind not in `LAYER_COUNTERS`; the message names it.
        OSError: if the file cannot be written, as `open` would raise it; what was at `path` is still there then.
    """
    tensors: dict[str, Tensor] = {}
    description = _describe(cache, "", tensors)
    metadata = {"tqc_cache": str(FILE_VERSION), "cache": json.dumps(description)}
    try:
        _write(tensors, metadata, Path(os.path.realpath(path)))
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from None


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write a safetensors file that is whole on the disk before it gets its name."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if path.exists() and not path.is_file():  # a device, say, which a file must not replace
        code = errno.EISDIR if path.is_dir() else errno.EINVAL
        raise OSError(code, os.strerror(code))
    # Threads may save to one path at a time, and the name may be as long as a name can be.
    unfinished = path.with_name(f".tqc-{uuid.uuid4().hex}")
    try:
        save_file(tensors, unfinished, metadata=metadata)
        _sync(unfinished)
        unfinished.replace(path)
    except SafetensorError as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # it tells in no other way what the system said
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code) if found else str(error)) from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    with contextlib.suppress(OSError):  # some file systems cannot
        _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
    numbers, parts = stored(tensor)
    tensors.update({f"{name}.{part}": found for part, found in parts.items()})
    return {"kind": "packed", "spec": str(numbers.fmt), "length": numbers.length}


def _own(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU, contiguous, sharing memory with no other (safetensors refuses shared memory)."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def load_cache(path: str | os.PathLike[str], device: torch.device | str | None = None) -> Any:
    """Read a cache that `save_cache` wrote. No code from the file is run, and nothing is allocated before all sizes
    have been checked; a file makes a process allocate about its own size.

    Args:
        device: where its tensors go; the CPU if None.

    Returns:
        A cache of the kind that was saved.

    Raises:
        CacheFileError: if the file is not such a cache, is damaged, is of a newer version or needs more memory than is
            free.
        OSError: if it cannot be opened.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    if header > MAX_HEADER_BYTES:
        raise CacheFileError(f"{path} is not a tqc cache: {header} bytes of header, more than {MAX_HEADER_BYTES}")
    try:
        with safe_open(path, framework="pt") as handle:
            file = CacheFile(handle, torch.device(device or "cpu"))
            build = file.cache(file.description(), "")
            file.check_whole()
            return build()
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), os.fspath(path)) from None
    except SafetensorError as error:
        raise CacheFileError(f"{path} is not a tqc cache, or it is truncated: {error}") from None
    except CacheFileError as error:
        raise CacheFileError(f"{path} {error}") from None
