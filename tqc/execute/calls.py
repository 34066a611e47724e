"""The functions that rewritten graphs call: dialect ops on packed tensors, with the kernels chosen at compile time.

They stand in the graph between the regions that Inductor compiles. `provider` names a module in `tqc.lowering`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from tqc.cache import packed_tensor, preallocated
from tqc.cache.packed_tensor import PackedTensor
from tqc.cache.storage import Storage
from tqc.execute.folded_weights import folded_weights
from tqc.format import PackedFormat, quantizer

_providers: dict[str, ModuleType] = {}


def provider_module(name: str) -> ModuleType:
    """The provider called `name`, imported on first use."""
    if name not in _providers:
        _providers[name] = importlib.import_module(f"tqc.lowering.{name}")
    return _providers[name]


def pack(new: Tensor, spec: str, provider: str) -> PackedTensor:
    """Start a packed cache from dense keys or values [batch, heads, n, head_dim]."""
    return packed_tensor.pack(new, PackedFormat.parse(spec), provider_module(provider).append)


def pack_at(new: Tensor, start: Tensor | int, capacity: int, spec: str, provider: str) -> PackedTensor:
    """Start a preallocated packed cache of `capacity` tokens with `new` at position `start`, or `start[0]`."""
    start = start if isinstance(start, Tensor) else torch.tensor([start], device=new.device)
    fmt = PackedFormat.parse(spec)
    storage = packed_tensor.Storage.allocate(new.shape[0], new.shape[1], fmt, new.dtype, new.device, capacity)
    result = PackedTensor(storage, capacity)
    packed_tensor.write_at(result, new, start, provider_module(provider).append)
    return result


def read(cache: PackedTensor, provider: str) -> Tensor:
    """Dense values of a packed cache, for uses that no kernel takes."""
    s = cache.packed_storage
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
    k, v = k_cache.packed_storage.writable(length), v_cache.packed_storage.writable(length)
    k.reserve(length + count)
    v.reserve(length + count)
    k_spec, v_spec = k.fmt.spec, v.fmt.spec
    out, _ = kernels.attend(
        query, k.pages, k.dense, k.state, v.pages, v.dense, v.state,
        key, value, attn_mask, sinks, None, scale, softcap, is_causal, k_spec, v_spec,
    )  # fmt: skip
    _append(kernels, k, v, key, value, None)
    k.appended(count)
    v.appended(count)
    return out, PackedTensor(k, length + count), PackedTensor(v, length + count)


def attend_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: PackedTensor,
    v_cache: PackedTensor,
    positions: Tensor | int,
    counted: bool,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    provider: str,
) -> Tensor:
    """Attend to a preallocated cache with new tokens at `positions`, and write these into it.

    Args:
        positions: int64 [n], or the first of n consecutive ones.
        counted: whether they are known to be consecutive.
    """
    kernels = provider_module(provider)
    start = positions if isinstance(positions, Tensor) else torch.tensor([positions], device=query.device)
    if _on_host(start) or not counted:
        stored, capacity = k_cache.packed_storage.length, k_cache.shape[2]
        if not preallocated.is_append(start, key.shape[2], counted, stored, capacity, attn_mask):
            for cache, new in ((k_cache, key), (v_cache, value)):
                preallocated.rewrite(cache, start, new, kernels)
            return attend(query, k_cache, v_cache, attn_mask, sinks, scale, softcap, provider)
    k, v = k_cache.packed_storage, v_cache.packed_storage
    k_spec, v_spec = k.fmt.spec, v.fmt.spec
    out, _ = kernels.attend(
        query, k.pages, k.dense, k.state, v.pages, v.dense, v.state,
        key, value, attn_mask, sinks, start, scale, softcap, False, k_spec, v_spec,
    )  # fmt: skip
    _append(kernels, k, v, key, value, start)
    k.written_on_device()
    v.written_on_device()
    return out


def _on_host(x: Tensor) -> bool:
    """Whether to look at `x` waits for no device."""
    return x.device.type == "cpu"


def _append(kernels: ModuleType, k: Storage, v: Storage, key: Tensor, value: Tensor, start: Tensor | None) -> None:
    if hasattr(kernels, "append_pair"):
        kernels.append_pair(
            k.pages, k.dense, k.state, key, v.pages, v.dense, v.state, value, start, k.fmt.spec, v.fmt.spec
        )
        return
    kernels.append(k.pages, k.dense, k.state, key, start, k.fmt.spec)
    kernels.append(v.pages, v.dense, v.state, value, start, v.fmt.spec)


def adopt(
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor | int,
    count: int,
    counted: bool,
    attn_mask: Tensor | None,
    k_spec: str,
    v_spec: str,
    provider: str,
) -> None:
    """Turn the caller's own preallocated dense tensors, just written at `positions`, into packed ones, in place.

    They stay dense where that would lose something: see `preallocated`.
    """
    start = positions if isinstance(positions, Tensor) else torch.tensor([positions], device=k_cache.device)
    if not preallocated.is_append(start, count, counted, k_cache.shape[2], k_cache.shape[2], attn_mask):
        return
    if preallocated.can_become_packed(k_cache) and preallocated.can_become_packed(v_cache):
        stored, append = int(start.flatten()[0]) + count, provider_module(provider).append
        preallocated.become_packed(k_cache, stored, PackedFormat.parse(k_spec), append)
        preallocated.become_packed(v_cache, stored, PackedFormat.parse(v_spec), append)


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
    k, v = k_cache.packed_storage, v_cache.packed_storage
    length = k_cache.shape[2]
    start = None if k.length <= length else torch.tensor([length])
    out, _ = provider_module(provider).attend(
        query, k.pages, k.dense, k.state, v.pages, v.dense, v.state,
        None, None, attn_mask, sinks, start, scale, softcap, False, k.fmt.spec, v.fmt.spec,
    )  # fmt: skip
    return out


def fold(new: Tensor, spec: str) -> Tensor:
    """Values as a folded cache takes them, where the layer that made them is not folded."""
    return quantizer.fold(new, PackedFormat.parse(spec)).contiguous()


def unfold(output: Tensor, spec: str) -> Tensor:
    """Inverse of `fold`, for the output of attention, laid out as `attend` does."""
    return quantizer.unfold(output, PackedFormat.parse(spec)).transpose(1, 2).contiguous().transpose(1, 2)


# Calls that stay outside the compiled regions.
BOUNDARY = frozenset({pack, pack_at, adopt, read, attend_extend, attend_write, attend, fold, unfold, folded_weights})
