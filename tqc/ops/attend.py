"""Attention to a packed cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tqc.ops import planes, traceable
from tqc.ops.op import op
from tqc.ops.value import PackedValue, Planes
from tqc.ops.write import is_append, write


@op()
def attend(
    query: Tensor,
    keys: Planes,
    values: Planes,
    key: Tensor | None = None,
    value: Tensor | None = None,
    positions: Tensor | int | None = None,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    is_causal: bool = False,
    counted: bool = True,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention to the tokens of a packed cache and to new ones, which are seen as they come, not coded.

    The new tokens are stored by an `extend` or `write` of their own.

    Args:
        query: [batch, query_heads, n, head_dim]; query head h reads key/value head h // (query_heads // heads).
        keys, values: the caches.
        key, value: new tokens, [batch, heads, m, head_dim], or None. Where the values' format is folded, `value` comes
            rotated, and so does the output go.
        positions: where the new tokens stand in a preallocated cache, as in `write`; None: behind the cache's tokens.
        attn_mask: bool (True: attend) or float (added to the scores), broadcastable to
            [batch, query_heads, n, columns], columns in the order of positions, from the first token that the cache
            holds; those behind stored and new tokens stand for keys and values of zeros, as a preallocated dense cache
            holds them.
        sinks: one logit per query head that joins each softmax with a value of zero, [query_heads] (gpt-oss).
        scale: factor of the scores. The score of a packed token is corrected for its coding error
            (`tqc.ops.planes.correction`).
        softcap: scores become softcap * tanh(scores / softcap) before the mask; 0 for none.
        is_causal: new token i is seen by queries i + n - m and later ones.
        counted: as in `write`.
        return_lse: whether the log-sum-exp of the scores is wanted too.

    Returns:
        Output [batch, query_heads, n, head_dim_v] in query's dtype, a transposed view of [batch, n, ...]; if asked for,
        with the log-sum-exp, float32 [batch, query_heads, n]. A query that may attend to nothing gets zeros and -inf.

    Raises:
        ValueError: if only one of `key` and `value` is given, or if keys and values hold different tokens.
        IndexError: if a position lies outside of the cache.
    """
    start = None
    if positions is not None and key is not None and value is not None and key.shape[2]:
        start = planes.position(positions, query.device)
        stored, capacity = int(keys.state[0]), keys.length
        if not is_append(start, key.shape[2], counted, stored, capacity, attn_mask):
            keys, values = (write(c, new, start, attn_mask, counted) for c, new in ((keys, key), (values, value)))
            key = value = start = None
    else:
        start = planes.position(keys.end, query.device) if keys.end < int(keys.state[0]) else None
    out, lse = planes.attend(
        query,
        *keys.parts,
        *values.parts,
        key,
        value,
        attn_mask,
        sinks,
        start,
        scale,
        softcap,
        is_causal,
        keys.fmt.spec,
        values.fmt.spec,
    )
    return (out, lse) if return_lse else out


@attend.register_fake
def _(query: Tensor, keys: PackedValue, values: PackedValue, return_lse: bool, **_: Any) -> Any:
    batch, heads, rows, _dim = query.shape
    out = query.new_empty(batch, rows, heads, values.fmt.head_dim).transpose(1, 2)
    return (out, query.new_empty(batch, heads, rows, dtype=torch.float32)) if return_lse else out


@attend.register_traceable
def _(query: Tensor, keys: Planes, values: Planes, *rest: Any, return_lse: bool = False, **named: Any) -> Any:
    """New tokens are an append, as in `write`."""
    out, lse = traceable.attend(query, keys, values, *rest, **named)
    return (out, lse) if return_lse else out
