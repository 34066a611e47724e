"""How a preallocated cache gets tokens, and which writes are appends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tqc.ops import planes, traceable
from tqc.ops.op import op
from tqc.ops.value import PackedValue, Planes


@op(consumes=("cache",))
def write(
    cache: Planes, new: Tensor, positions: Tensor | int, attn_mask: Tensor | None = None, counted: bool = False
) -> Planes:
    """A preallocated cache with tokens at positions, as `index_copy(2, positions, new)` of a dense one.

    What lies behind the new tokens is dropped, and counts as zeros, unless `attn_mask` shows it: a cache is used anew
    without being emptied. No new tokens change nothing.

    Args:
        cache: preallocated.
        new: [batch, heads, n, head_dim] in the cache's dtype; rotated where the format is folded.
        positions: int64 [n], or the first of n consecutive ones.
        attn_mask: as in `attend`; None where attention sees nothing behind the new tokens.
        counted: whether `positions` are known to be consecutive.

    Returns:
        A cache of the same capacity.

    Raises:
        IndexError: if a position lies outside of the cache.
    """
    count = new.shape[2]
    if not count:
        return cache.copy(cache.length)
    start = planes.position(positions, new.device)
    if is_append(start, count, counted, int(cache.state[0]), cache.length, attn_mask):
        written = cache.copy(cache.length)
        planes.append(*written.parts, new, start, cache.fmt.spec)
        return written
    held = planes.held(*cache.parts, cache.length, cache.fmt)
    if counted or start.numel() == 1:
        start = start.flatten()[0] + torch.arange(count, device=start.device)
    held = held.index_copy(2, start, new)
    stored = max(int(cache.state[0]), int(start.max()) + 1)
    batch, heads = held.shape[:2]
    written = Planes.empty(batch, heads, cache.fmt, held.dtype, held.device, cache.length)
    planes.append(*written.parts, held[:, :, :stored], None, cache.fmt.spec)
    return written


def is_append(
    positions: Tensor, count: int, counted: bool, stored: int, capacity: int, attn_mask: Tensor | None
) -> bool:
    """Whether writing at `positions` leaves nothing visible behind the new tokens.

    Args:
        positions: int64 [count], or only the first of consecutive ones.
        counted: whether they are known to be consecutive.
        stored: tokens that the cache may hold before the write.
        attn_mask: of [..., capacity] columns, or None where attention reads up to the new tokens only.

    Raises:
        IndexError: if a position lies outside of the cache.
    """
    first = int(positions.flatten()[0])
    if not counted and positions.numel() > 1 and positions.tolist() != list(range(first, first + count)):
        if positions.min() < 0 or positions.max() >= capacity:
            raise IndexError(f"positions {positions.tolist()} are not all inside of a cache of {capacity} tokens")
        return False
    if first < 0 or first + count > capacity:
        raise IndexError(f"positions {first} to {first + count - 1} are outside of a cache of {capacity} tokens")
    if attn_mask is None or first + count >= stored:
        return True
    behind = attn_mask[..., first + count : stored]
    visible = behind if behind.dtype == torch.bool else behind > torch.finfo(behind.dtype).min / 2
    return not bool(visible.any())


@write.register_fake
def _(cache: PackedValue, new: Tensor, **_: Any) -> PackedValue:
    return cache


@write.register_traceable
def _(
    cache: Planes, new: Tensor, positions: Tensor | int, attn_mask: Tensor | None = None, counted: bool = False
) -> Planes:
    """An append alone: consecutive positions, none behind the stored tokens, nothing visible behind the new ones."""
    return traceable.append(cache, new, planes.position(positions, new.device)) if new.shape[2] else cache
