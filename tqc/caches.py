"""Measure, save and load caches of either framework: `tqc.cache_bytes`, `tqc.save_cache`, `tqc.load_cache`."""

from __future__ import annotations

import os
from typing import Any

import torch

from tqc.cache import io


def cache_bytes(cache: Any) -> int:
    """Bytes of memory that a cache holds, spare room included, each counted once.

    Args:
        cache: any transformers cache, a module (its buffers), a tensor, or tuples, lists and dicts of such; or a list
            of mlx-lm's caches.
    """
    if _is_mlx(cache):
        from tqc.mlx_trace.files import bytes_of

        return bytes_of(cache)
    return io.cache_bytes(cache)


def save_cache(cache: Any, path: str | os.PathLike[str]) -> None:
    """Write a cache to one file; packed tensors stay packed. An existing file is replaced when all is written.

    Args:
        cache: a DynamicCache, a StaticCache, an EncoderDecoderCache of such, or a tuple of layers, each a tuple of
            tensors; or a list of mlx-lm's KVCache and RotatingKVCache, which is saved as a DynamicCache.
        path: a symbolic link stays, and what it leads to is written.

    Raises:
        TypeError: for another kind of cache, or a layer of a kind that is not saved; the message names it.
        OSError: if the file cannot be written, as `open` would raise it; what was at `path` is still there then.
    """
    if _is_mlx(cache):
        from tqc.mlx_trace.files import to_torch

        cache = to_torch(cache)
    io.save_cache(cache, path)


def load_cache(path: str | os.PathLike[str], device: torch.device | str | None = None) -> Any:
    """Read a cache that `save_cache` wrote. No code from the file is run, and nothing is allocated before all sizes
    have been checked; a file makes a process allocate about its own size.

    Args:
        device: where its tensors go; the CPU if None. "mlx" for a list of mlx-lm's caches, whoever saved it.

    Returns:
        A cache of the kind that was saved, or that list.

    Raises:
        CacheFileError: if the file is not such a cache, is damaged, is of a newer version or needs more memory than is
            free.
        OSError: if it cannot be opened.
        TypeError, ValueError: for "mlx", if it holds what mlx-lm has no cache for.
    """
    if device == "mlx":
        from tqc.mlx_trace.files import from_torch

        return from_torch(io.load_cache(path))
    return io.load_cache(path, device)


def _is_mlx(cache: Any) -> bool:
    if not isinstance(cache, (list, tuple)) or not cache:
        return False
    return type(cache[0]).__module__.startswith(("mlx_lm.", "tqc.mlx_trace."))
