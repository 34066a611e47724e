"""How a growing cache loses tokens."""

from __future__ import annotations

from dataclasses import replace

import torch

from tqc.ops import planes, traceable
from tqc.ops.op import op
from tqc.ops.value import PackedValue, Planes


@op(consumes=("cache",))
def rewind(cache: Planes, length: int) -> Planes:
    """The first `length` tokens of a growing cache.

    Where `length` falls inside a packed page, that page's tokens become dense again, as their decoded values.

    Args:
        cache: of at least as many tokens.
        length: 0 or more.

    Returns:
        A cache of `length` tokens.

    Raises:
        ValueError: if the cache has fewer tokens.
    """
    if not 0 <= length <= cache.length:
        raise ValueError(f"length must be between 0 and {cache.length}, the tokens of the cache; got {length}")
    shorter = replace(cache.copy(), length=length)
    begin = int(cache.state[2])
    packed = planes.rewind(shorter.pages, shorter.dense, int(cache.state[1]), begin + length, cache.fmt)
    shorter.state.copy_(torch.tensor([begin + length, packed, begin]))
    return shorter


@rewind.register_fake
def _(cache: PackedValue, length: int) -> PackedValue:
    return replace(cache, length=length)


@rewind.register_traceable
def _(cache: Planes, length: int) -> Planes:
    return replace(traceable.rewind(cache, cache.state[2:] + length), length=length)
