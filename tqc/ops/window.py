"""What a sliding window of a preallocated cache goes on with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tqc.ops import planes, traceable
from tqc.ops.op import op
from tqc.ops.value import PackedValue, Planes


@op()
def window(cache: Planes, begin: int, end: int, keep: int) -> Planes:
    """Tokens `begin` to `end` of a preallocated cache, as a cache that grows and keeps the last `keep` tokens.

    Args:
        cache: preallocated; `update` says what it becomes of what `extend` makes of the window.
        begin, end: of its tokens; where fewer are stored the rest are zeros.
        keep: how many tokens the window holds at most, no fewer than the cache does.

    Returns:
        A cache of `end - begin` tokens. A target may share memory until one of them is written to.

    Raises:
        ValueError: if `begin` and `end` are no places in the cache.
    """
    if not 0 <= begin <= end <= cache.length:
        raise ValueError(f"begin and end must lie in a cache of {cache.length} tokens, got {begin} and {end}")
    fmt, first = replace(cache.fmt, keep=keep), int(cache.state[2])
    part = replace(cache.copy(), fmt=fmt, length=end - begin)
    stored = min(int(cache.state[0]), first + end)
    packed = planes.rewind(part.pages, part.dense, int(cache.state[1]), stored, fmt)
    part.state.copy_(torch.tensor([stored, packed, first + begin]))
    return part


@window.register_fake
def _(cache: PackedValue, begin: Any, end: Any, keep: int) -> PackedValue:
    return replace(cache, fmt=replace(cache.fmt, keep=keep), length=end - begin)


@window.register_traceable
def _(cache: Planes, begin: int, end: int, keep: int) -> Planes:
    part = traceable.rewind(cache, torch.minimum(cache.state[0], cache.state[2] + end))
    first = torch.tensor([0, 0, begin], device=cache.state.device)
    return replace(part, state=part.state + first, fmt=replace(cache.fmt, keep=keep), length=end - begin)
