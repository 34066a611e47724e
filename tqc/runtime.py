"""The functions that rewritten graphs call: dialect ops on packed tensors, with the kernels chosen at compile time.

They stand in the graph between the regions that Inductor compiles. `provider` names a module in `tqc.lowering`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from tqc import packed_tensor
from tqc.format import PackedFormat
from tqc.packed_tensor import PackedTensor

_providers: dict[str, ModuleType] = {}


def provider_module(name: str) -> ModuleType:
    """The provider called `name`, imported on first use."""
    if name not in _providers:
        _providers[name] = importlib.import_module(f"tqc.lowering.{name}")
    return _providers[name]


def pack(new: Tensor, spec: str, provider: str) -> PackedTensor:
    """Start a packed cache from dense keys or values [batch, heads, n, head_dim]."""
    return packed_tensor.pack(new, PackedFormat.parse(spec), provider_module(provider).append)


def pack_at(new: Tensor, start: Tensor, capacity: int, spec: str, provider: str) -> PackedTensor:
    """Start a preallocated packed cache of `capacity` tokens with `new` at position `start[0]`."""
    fmt = PackedFormat.parse(spec)
    storage = packed_tensor.Storage.allocate(new.shape[0], new.shape[1], fmt, new.dtype, new.device, capacity)
    result = PackedTensor(storage, capacity)
    packed_tensor.write_at(result, new, start, provider_module(provider).append)
    return result


def read(cache: PackedTensor, provider: str) -> Tensor:
    """Dense values of a packed cache, for uses that no kernel takes."""
    s = cache.storage
    return provider_module(provider).read(s.pages, s.dense, s.state, cache.shape[2], s.fmt.spec)


def attend_extend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: PackedTensor,
    v_cache: PackedTensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    is_causal: bool,
    provider: str,
) -> tuple[Tensor, PackedTensor, PackedTensor]:
    """Attend to a growing cache and the new tokens, then append these: (output, keys, values)."""
    kernels = provider_module(provider)
    length, count = k_cache.shape[2], key.shape[2]
    k, v = k_cache.storage.writable(length), v_cache.storage.writable(length)
    k.reserve(length + count)
    v.reserve(length + count)
    k_spec, v_spec = k.fmt.spec, v.fmt.spec
    out, _ = kernels.attend(
        query, k.pages, k.dense, k.state, v.pages, v.dense, v.state,
        key, value, attn_mask, sinks, None, scale, softcap, is_causal, k_spec, v_spec,
    )  # fmt: skip
    kernels.append(k.pages, k.dense, k.state, key, None, k_spec)
    kernels.append(v.pages, v.dense, v.state, value, None, v_spec)
    k.appended(count)
    v.appended(count)
    return out, PackedTensor(k, length + count), PackedTensor(v, length + count)


def attend_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: PackedTensor,
    v_cache: PackedTensor,
    start: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    provider: str,
) -> Tensor:
    """Attend to a preallocated cache with new tokens at position `start[0]`, and write these into it."""
    kernels = provider_module(provider)
    k, v = k_cache.storage, v_cache.storage
    k_spec, v_spec = k.fmt.spec, v.fmt.spec
    out, _ = kernels.attend(
        query, k.pages, k.dense, k.state, v.pages, v.dense, v.state,
        key, value, attn_mask, sinks, start, scale, softcap, False, k_spec, v_spec,
    )  # fmt: skip
    for storage, new, spec in ((k, key, k_spec), (v, value, v_spec)):
        kernels.append(storage.pages, storage.dense, storage.state, new, start, spec)
        storage.written_on_device()
    return out


def attend(
    query: Tensor,
    k_cache: PackedTensor,
    v_cache: PackedTensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    provider: str,
) -> Tensor:
    """Attend to a packed cache that stays as it is (cross attention, layers that share a cache)."""
    k, v = k_cache.storage, v_cache.storage
    length = k_cache.shape[2]
    start = None if k.length == length else torch.tensor([length])
    out, _ = provider_module(provider).attend(
        query, k.pages, k.dense, k.state, v.pages, v.dense, v.state,
        None, None, attn_mask, sinks, start, scale, softcap, False, k.fmt.spec, v.fmt.spec,
    )  # fmt: skip
    return out


# Calls that stay outside the compiled regions.
BOUNDARY = frozenset({pack, pack_at, read, attend_extend, attend_write, attend})
