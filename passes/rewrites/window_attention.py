"""Attention in which a query sees near tokens alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from tqc.ops import example
from tqc.passes.edit import inline
from tqc.passes.finders.sdpa import SDPA
from tqc.passes.graph import argument, calls


def why_no_window(output: Node) -> str:
    """Why `output` cannot have a window; "" if it can."""
    if not calls(output, *SDPA):
        return "this spelling of attention has no windows"
    query, key, value = (example(argument(output, i, name)) for i, name in enumerate(("query", "key", "value")))
    if not query.dim() == key.dim() == value.dim() == 4 or query.shape[:3] != key.shape[:3]:
        return "grouped heads and other lengths of keys have no windows"
    if argument(output, 3, "attn_mask") is not None or argument(output, 5, "is_causal", False):
        return "masked attention has no windows"
    if not isinstance(query.shape[2], int):
        return "tokens whose number varies have no windows"
    return ""


def window_attention(output: Node, share: float) -> Node:
    """The same attention where the graph stands, in runs of tokens that see their own and the two beside it: `share` of
    all tokens together, or a little more.

    Before:  out = sdpa(query, key, value)                       # [batch, heads, n, head_dim]
    After:   out = sdpa(query in runs of w, key and value in overlapping runs of 3 w, mask of the ends)
    """
    tensors = [argument(output, i, name) for i, name in enumerate(("query", "key", "value"))]
    tokens = example(output).shape[2]
    width = max(1, -(-round(tokens * share) // 3))
    return inline(output.graph, windowed, *tensors, tokens, width, argument(output, 6, "scale"))


def windowed(query: Tensor, key: Tensor, value: Tensor, tokens: int, width: int, scale: float | None) -> Tensor:
    """Attention of [batch, heads, tokens, head_dim] in runs of `width`."""
    runs = -(-tokens // width)
    pad = runs * width - tokens
    heads = query.shape[1]
    query = torch.nn.functional.pad(query, (0, 0, 0, pad)).flatten(0, 1).unflatten(1, (runs, width))
    key, value = (
        torch.nn.functional.pad(x, (0, 0, width, width + pad)).flatten(0, 1).unfold(1, 3 * width, width).mT
        for x in (key, value)
    )
    column = torch.arange(runs, device=query.device)[:, None] * width + torch.arange(3 * width, device=query.device)
    seen = ((column >= width) & (column < width + tokens))[:, None, :]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
    return out.flatten(1, 2)[:, :tokens].unflatten(0, (-1, heads))
