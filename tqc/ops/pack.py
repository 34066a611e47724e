"""How a packed cache starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tqc.format import PackedFormat
from tqc.ops import planes, traceable
from tqc.ops.op import op
from tqc.ops.value import PackedValue, Planes


@op()
def pack(
    new: Tensor,
    spec: str,
    start: Tensor | int | None = None,
    capacity: int | None = None,
    query: Tensor | None = None,
    score: Tensor | None = None,
    state_rows: Tensor | None = None,
) -> Planes:
    """Start a packed cache with tokens of a dense one.

    Args:
        new: [batch, heads, n, head_dim] in float32, bfloat16 or float16; rotated where the format is folded.
        spec: of the `PackedFormat`.
        start: position of the first of them, a number, or int64 [1 or more] of which the first counts; those before it
            are zeros. None for 0.
        capacity: tokens that the cache can hold where it is preallocated; None where it grows.
        query: what attends to these keys, [batch, query_heads, n, head_dim], by which their channels are balanced (see
            `tqc.format.balance`); None to leave them as they are. A cache with groups remembers the last of them.
        score, state_rows: of a cache with groups, what `score` gave; `state_rows` for keys alone.

    Returns:
        A cache of `capacity` tokens, or of n and those before `start`.

    Raises:
        ValueError: if `spec` is malformed or of another version, or if a cache that grows has a tensor for `start`.
    """
    cache = _empty(new, spec, start, capacity)
    where = None if start is None else planes.position(start, new.device)
    planes.choose_balance(cache.dense, 0, 0, new, query, cache.fmt)
    planes.append(*cache.parts, new, where, spec, score)
    if query is not None and state_rows is not None:
        planes.remember(cache.dense, 0, query, state_rows, cache.fmt)
    return cache


def _empty(new: Tensor, spec: str, start: Tensor | int | None, capacity: int | None) -> Planes:
    tokens = _tokens(new, start, capacity)
    return Planes.empty(new.shape[0], new.shape[1], PackedFormat.parse(spec), new.dtype, new.device, tokens)


def _tokens(new: Tensor, start: Tensor | int | None, capacity: int | None) -> int:
    if capacity is not None:
        return capacity
    if isinstance(start, Tensor):
        raise ValueError("start must be a number where the cache grows: its length must not depend on data")
    return new.shape[2] + (start or 0)


@pack.register_fake
def _(new: Tensor, spec: str, start: Tensor | int | None, capacity: int | None, **_: Any) -> PackedValue:
    fmt = PackedFormat.parse(spec)
    tokens = fmt.held_tokens(_tokens(new, start, capacity))
    return PackedValue(fmt, new.shape[0], new.shape[1], tokens, new.dtype, new.device)


@pack.register_traceable
def _(
    new: Tensor,
    spec: str,
    start: Tensor | int | None = None,
    capacity: int | None = None,
    query: Tensor | None = None,
    score: Tensor | None = None,
    state_rows: Tensor | None = None,
) -> Planes:
    """A tensor `start` must hold 0."""
    cache = _empty(new, spec, start, capacity)
    planes.choose_balance(cache.dense, 0, 0, new, query, cache.fmt)
    if start is not None and not isinstance(start, Tensor):
        new = torch.nn.functional.pad(new, (0, 0, start, 0))
    return traceable.remember(traceable.append(cache, new, None, score), 0, query, state_rows)
