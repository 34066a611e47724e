"""Which tokens of a group are kept, and how exactly: what a scorer says of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tqc.format import PackedFormat
from tqc.ops.op import op
from tqc.ops.value import Planes
from tqc.plugins import scorer_of
from tqc.plugins.scorer import Span


@op()
def score(
    key: Tensor,
    value: Tensor,
    query: Tensor,
    spec: str,
    keys: Planes | None = None,
    values: Planes | None = None,
    attn_mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The scores by which the new tokens' `extend` or `pack` sorts the groups that it packs.

    A scorer sees of each group the same tokens and queries however the tokens came: those from the group's first token
    up to the one with which it leaves the window.

    Args:
        key, value, query: of the same n new tokens, as in `attend`; behind those of the caches.
        spec: of the keys' format, which has groups.
        keys, values: the caches before them; None where they start.
        attn_mask: as in `attend`. A token that the last query does not see goes first.
        scale: factor of the products of queries and keys.

    Returns:
        (float32 [batch, heads, g * tokens of a group]: of the tokens that are not packed yet, from the first on, for
        the g = ceil(n / tokens of a group) groups that can leave the window at most; zeros where none does.
        The scorer's state behind these groups, [batch, heads, state_rows, head_dim].)

    Raises:
        ValueError: if the scorer makes numbers that are not finite of finite tokens.
    """
    fmt = PackedFormat.parse(spec)
    keys, values = _or_empty(keys, key, fmt), _or_empty(values, value, fmt)
    length, packed = int(keys.state[0]), int(keys.state[1])
    size = fmt.block_tokens
    groups = (fmt.packed_tokens(length + key.shape[2], packed) - packed) // size
    scores, state = _scores(key, value, query, fmt, keys, values, attn_mask, scale, length, packed, groups)
    if key.device.type == "cpu" and not torch.isfinite(scores).all() and _finite(key, value, query, keys, values):
        assert fmt.groups
        raise ValueError(f"scorer {fmt.groups.scorer} gives scores that are not finite")
    missing = -(-key.shape[2] // size) - groups
    return torch.nn.functional.pad(scores, (0, missing * size)), state


def _or_empty(cache: Planes | None, new: Tensor, fmt: PackedFormat) -> Planes:
    if cache is not None:
        return cache
    dense = new.new_zeros(*new.shape[:2], fmt.dense_rows, new.shape[3])
    nothing = torch.zeros(3, dtype=torch.int64, device=new.device)
    return Planes(new.new_zeros(*new.shape[:2], 0, 0, dtype=torch.uint8), dense, nothing, fmt, 0)


def _finite(*held: Tensor | Planes) -> bool:
    return all(bool(torch.isfinite(x.dense if isinstance(x, Planes) else x).all()) for x in held)


def _scores(
    key: Tensor,
    value: Tensor,
    query: Tensor,
    fmt: PackedFormat,
    keys: Planes,
    values: Planes,
    attn_mask: Tensor | None,
    scale: float,
    length: Any,
    packed: Any,
    count: int,
    leaving: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Of `count` groups from the packed index `packed` on, `length` tokens being there before the new ones; both may be
    tensors of one element."""
    groups, (batch, heads) = fmt.groups, key.shape[:2]
    assert groups
    scorer = scorer_of(groups.scorer)
    at = fmt.token_rows + fmt.head_rows
    ring, state = keys.dense[:, :, at : fmt.dense_rows].tensor_split((groups.repeats * groups.queries,), dim=2)
    if not count:
        return key.new_zeros(batch, heads, 0, dtype=torch.float32), state
    each = torch.arange(count, device=key.device)[:, None] * groups.tokens + packed
    span = fmt.sink_tokens + each + torch.arange(fmt.residual_window + 1, device=key.device)  # [count, w + 1]
    asked = span[:, span.shape[1] - groups.queries :]
    sinks = torch.arange(fmt.sink_tokens, device=key.device)

    def tokens(cache: Planes, new: Tensor, position: Tensor) -> Tensor:
        row = torch.where(position < fmt.sink_tokens, position, _ring_row(position, fmt))
        old = cache.dense.index_select(2, torch.clamp(row.flatten(), max=cache.dense.shape[2] - 1))
        fresh = _at(new, position.flatten() - length)
        chosen = torch.where((position < length).reshape(1, 1, -1, 1), old, fresh)
        return chosen.float().unflatten(2, position.shape)

    past = ring.unflatten(2, (groups.repeats, groups.queries)) if groups.queries else ring.unsqueeze(2)
    new_queries = query.unflatten(1, (heads, groups.repeats))
    old = past.index_select(3, asked.flatten() % max(1, groups.queries))
    fresh = new_queries.index_select(3, torch.clamp(asked.flatten() - length, 0, query.shape[2] - 1))
    queries = torch.where((asked < length).reshape(1, 1, 1, -1, 1), old, fresh.to(old.dtype)).float()
    whole = Span(
        tokens(keys, key, span),
        tokens(values, value, span),
        tokens(keys, key, sinks).unsqueeze(2).expand(-1, -1, count, -1, -1),
        queries.unflatten(3, asked.shape).transpose(2, 3),
        span[:, 0] - fmt.sink_tokens,
        groups.tokens,
        scale,
    )
    scores, state = scorer.scores(whole, state, leaving)
    scores = scores.float()
    if attn_mask is not None:
        seen = attn_mask[..., -1, :]
        seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
        seen = seen.expand(*seen.shape[:-1], max(1, seen.shape[-1]))
        columns = span[:, : groups.tokens].flatten()
        shown = seen.index_select(-1, torch.clamp(columns, max=seen.shape[-1] - 1)).any(1, keepdim=True)
        scores = scores.masked_fill(~shown.unflatten(-1, (count, -1)), torch.finfo(torch.float32).min)
    return scores.flatten(2), state


def _ring_row(position: Tensor, fmt: PackedFormat) -> Tensor:
    return fmt.sink_tokens + (position - fmt.sink_tokens) % fmt.residual_window


def _at(new: Tensor, index: Tensor) -> Tensor:
    return new.index_select(2, torch.clamp(index, 0, new.shape[2] - 1))


@score.register_fake
def _(key: Tensor, spec: str, **_: Any) -> tuple[Tensor, Tensor]:
    fmt = PackedFormat.parse(spec)
    assert fmt.groups
    count = -(-key.shape[2] // fmt.block_tokens) * fmt.block_tokens
    batch, heads, _n, dim = key.shape
    scores = key.new_empty(batch, heads, count, dtype=torch.float32)
    return scores, key.new_empty(batch, heads, fmt.groups.state_rows, dim)


@score.register_traceable
def _(
    key: Tensor,
    value: Tensor,
    query: Tensor,
    spec: str,
    keys: Planes | None = None,
    values: Planes | None = None,
    attn_mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """All groups that can leave the window are scored, whether they do or not."""
    fmt = PackedFormat.parse(spec)
    keys, values = _or_empty(keys, key, fmt), _or_empty(values, value, fmt)
    length, packed, size = keys.state[0], keys.state[1], fmt.block_tokens
    count = -(-key.shape[2] // size)
    last = fmt.token_rows + packed + size * torch.arange(count, device=key.device)
    leaving = length + key.shape[2] > last
    return _scores(key, value, query, fmt, keys, values, attn_mask, scale, length, packed, count, leaving)
