"""Caches that the caller allocated at full length and that are written in place (StaticCache, hand-written ones).

Such a cache must become packed without the caller's help: the caller's tensor object itself is turned into a packed
tensor of the same shape. Positions behind the stored tokens count as zeros; so a write that goes back drops what lies
behind it, unless attention still looks there.
"""

from __future__ import annotations

import logging
from types import ModuleType

import torch
from torch import Tensor

from tqc.cache import packed_tensor
from tqc.cache.packed_tensor import PackedTensor
from tqc.cache.storage import Storage
from tqc.format import PackedFormat

log = logging.getLogger(__name__)


def is_append(
    positions: Tensor, count: int, counted: bool, stored: int, capacity: int, attn_mask: Tensor | None
) -> bool:
    """Whether writing at `positions` leaves nothing visible behind the new tokens.

    Args:
        positions: int64 [count], or only the first where `counted`.
        counted: whether positions are known to be consecutive.
        stored: tokens that the cache may hold before the write.
        attn_mask: of [..., capacity] columns, or None where attention reads up to the new tokens only.

    Raises:
        IndexError: if a position lies outside of the cache.
    """
    first = int(positions.flatten()[0])
    if not counted and count > 1 and positions.tolist() != list(range(first, first + count)):
        return False
    if first < 0 or first + count > capacity:
        raise IndexError(f"positions {first} to {first + count - 1} are outside of a cache of {capacity} tokens")
    if attn_mask is None or first + count >= stored:
        return True
    behind = attn_mask[..., first + count : stored]
    visible = behind if behind.dtype == torch.bool else behind > torch.finfo(behind.dtype).min / 2
    return not bool(visible.any())


def rewrite(cache: PackedTensor, positions: Tensor, new: Tensor, kernels: ModuleType) -> None:
    """Write anywhere: decode the cache, write, and pack it anew. Slow, and it codes the same tokens again."""
    log.warning(
        "a packed cache is written out of order (a ring buffer?): it is packed anew at each such call; "
        "options={'skip_layers': ...} leaves it dense"
    )
    s = cache.packed_storage
    dense = kernels.read(s.pages, s.dense, s.state, cache.shape[2], s.fmt.spec)
    dense.index_copy_(2, positions, new)
    stored = max(s.length, int(positions.max()) + 1)
    cache.packed_storage = _allocate(dense, stored, s.fmt, kernels.append)
    cache.packed_storage.view(cache)


def can_become_packed(tensor: Tensor) -> bool:
    """Whether nobody else can hold the memory of `tensor`, as far as that shows."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return type(tensor) is Tensor and not tensor._is_view() and whole and not tensor.requires_grad


def become_packed(tensor: Tensor, stored: int, fmt: PackedFormat, append: packed_tensor.Append) -> None:
    """Turn a dense tensor object into a `PackedTensor` of the same shape that holds its first `stored` tokens."""
    packed = PackedTensor(_allocate(tensor, stored, fmt, append), tensor.shape[2])
    try:
        torch._C._swap_tensor_impl(tensor, packed)
    except RuntimeError as error:
        log.warning("a preallocated cache stays dense, its tensor is in use elsewhere: %s", error)
        return
    tensor.__class__, packed.__class__ = packed.__class__, tensor.__class__
    tensor.__dict__, packed.__dict__ = packed.__dict__, {}
    tensor.packed_storage.view(tensor)  # type: ignore[attr-defined]


def _allocate(dense: Tensor, stored: int, fmt: PackedFormat, append: packed_tensor.Append) -> Storage:
    batch, heads, capacity, _ = dense.shape
    storage = Storage.allocate(batch, heads, fmt, dense.dtype, dense.device, capacity)
    append(storage.pages, storage.dense, storage.state, dense[:, :, :stored], None, fmt.spec)
    storage.appended(stored)
    return storage
