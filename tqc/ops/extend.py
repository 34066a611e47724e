"""How a growing cache gets tokens."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tqc.ops import planes, traceable
from tqc.ops.op import op
from tqc.ops.value import PackedValue, Planes


@op(consumes=("cache",))
def extend(cache: Planes, new: Tensor) -> Planes:
    """A growing cache with tokens behind its own; those that leave the recent window are packed.

    Args:
        cache: of m tokens.
        new: [batch, heads, n, head_dim] in the cache's dtype; rotated where the format is folded.

    Returns:
        A cache of m + n tokens.
    """
    longer = replace(cache.copy(cache.length + new.shape[2]), length=cache.length + new.shape[2])
    planes.append(*longer.parts, new, planes.position(cache.length, new.device), cache.fmt.spec)
    return longer


@extend.register_fake
def _(cache: PackedValue, new: Tensor) -> PackedValue:
    return cache.longer(new.shape[2])


@extend.register_traceable
def _(cache: Planes, new: Tensor) -> Planes:
    """The pages must have room for the new tokens."""
    start = planes.position(cache.length, new.device)
    return replace(traceable.append(cache, new, start), length=cache.length + new.shape[2])
