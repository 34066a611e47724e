"""How a growing cache gets tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from tqc.ops import planes, traceable
from tqc.ops.op import op
from tqc.ops.value import PackedValue, Planes


@op(consumes=("cache",))
def extend(
    cache: Planes,
    new: Tensor,
    query: Tensor | None = None,
    score: Tensor | None = None,
    state_rows: Tensor | None = None,
) -> Planes:
    """A growing cache with tokens behind its own; those that leave the recent window are packed.

    Args:
        cache: of m tokens.
        new: [batch, heads, n, head_dim] in the cache's dtype; rotated where the format is folded.
        query, score, state_rows: as in `pack`.

    Returns:
        A cache of m + n tokens, or of the last `keep` of them where the format keeps no more.
    """
    length = cache.fmt.held_tokens(cache.length + new.shape[2])
    longer = replace(cache.copy(cache.end + new.shape[2]), length=length)
    start = planes.position(cache.end, new.device)
    if not int(longer.state[1]):
        planes.choose_balance(longer.dense, cache.end - cache.length, cache.end, new, query, cache.fmt)
    planes.append(*longer.parts, new, start, cache.fmt.spec, score)
    if query is not None and state_rows is not None:
        planes.remember(longer.dense, cache.end, query, state_rows, cache.fmt)
    return longer


@extend.register_fake
def _(cache: PackedValue, new: Tensor, **_: Any) -> PackedValue:
    return cache.longer(new.shape[2])


@extend.register_traceable
def _(
    cache: Planes,
    new: Tensor,
    query: Tensor | None = None,
    score: Tensor | None = None,
    state_rows: Tensor | None = None,
) -> Planes:
    """The cache must have room for the new tokens. The balance of its heads stays as it is."""
    length = cache.fmt.held_tokens(cache.length + new.shape[2])
    start = cache.state[2:] + cache.length
    longer = replace(traceable.append(cache, new, start, score), length=length)
    return traceable.remember(longer, start, query, state_rows)
