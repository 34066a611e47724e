"""Softmax attention that torch's own function cannot say: with sinks, or a softcap. No op of the dialect, but what a
front end may put into a graph, where a model of torch would spell it out."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    is_causal: bool = False,
) -> Tensor:
    """softmax(softcap * tanh(scale * Q K' / softcap) + mask, with one more column of sinks) V.

    Args:
        query: [batch, query_heads, n, head_dim].
        key, value: [batch, heads, tokens, head_dim]; query_heads is a multiple of heads.
        attn_mask: bool (True attends) or float (added), broadcastable to [batch, query_heads, n, tokens].
        sinks: [query_heads], a logit that takes weight and gives no value.
        softcap: 0 for none.
        is_causal: aligned to the start, as torch's.

    Returns:
        [batch, query_heads, n, head_dim of the values] in the query's dtype.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query.float() @ key.float().mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]]
    return (weights @ value.float()).to(query.dtype)
