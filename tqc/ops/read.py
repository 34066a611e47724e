"""The way back to dense tokens."""

from __future__ import annotations

from torch import Tensor

from tqc.ops import planes, traceable
from tqc.ops.op import op
from tqc.ops.value import PackedValue, Planes


@op()
def read(cache: Planes) -> Tensor:
    """The tokens of a packed cache, decoded, for a use that no op of the dialect takes.

    Args:
        cache: growing or preallocated.

    Returns:
        [batch, heads, length, head_dim] in the cache's dtype, rotated back where the format is folded; zeros where a
        preallocated cache holds nothing.
    """
    return planes.read(*cache.parts, cache.length, cache.fmt.spec)


@read.register_fake
def _(cache: PackedValue) -> Tensor:
    return cache.empty()


@read.register_traceable
def _(cache: Planes) -> Tensor:
    return traceable.read(cache)
