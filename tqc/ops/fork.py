"""Two continuations of one cache."""

from __future__ import annotations

from tqc.ops.op import op
from tqc.ops.value import PackedValue, Planes


@op()
def fork(cache: Planes) -> Planes:
    """The same tokens as a cache of its own, so that both can be extended.

    Args:
        cache: one that grows.

    Returns:
        A cache as long as the first. A target may share memory until one of them is written to.
    """
    return cache.copy()


@fork.register_fake
def _(cache: PackedValue) -> PackedValue:
    return cache


@fork.register_traceable
def _(cache: Planes) -> Planes:
    return cache
