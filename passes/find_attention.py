"""Find attention in a dynamo graph: which nodes compute softmax(scale * Q K' + mask) V, and from what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from tqc.passes.graph import argument, calls, layer_name, strip_repeat, value

SDPA = (torch.nn.functional.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention)


@dataclass
class Attention:
    """One attention site.

    Attributes:
        output: the node that holds the result, [batch, query_heads, n, head_dim].
        query: [batch, query_heads, n, head_dim].
        key, value: before the repetition of grouped heads, [batch, heads, tokens, head_dim].
        attn_mask: node or None.
        sinks: node of one logit per query head, or None.
        reason: why the site cannot be fused whatever its cache, or None.
    """

    output: Node
    query: Node
    key: Node
    value: Node
    attn_mask: Node | None
    scale: float
    softcap: float = 0.0
    sinks: Node | None = None
    is_causal: bool = False
    reason: str | None = None

    @property
    def name(self) -> str:
        return layer_name(self.output)


def find_attention(graph: Graph) -> list[Attention]:
    """Every attention site, in graph order."""
    sites = []
    for node in graph.nodes:
        for match in (_match_sdpa,):
            if site := match(node):
                sites.append(site)
    return sites


def _match_sdpa(node: Node) -> Attention | None:
    """`scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)`."""
    if not calls(node, *SDPA):
        return None
    query, key, val = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    heads = value(query).shape[1]
    key, k_repeat = strip_repeat(key, heads)
    val, v_repeat = strip_repeat(val, heads)
    scale = argument(node, 6, "scale")
    dropout_p = argument(node, 4, "dropout_p", 0.0)
    reason = None
    if dropout_p != 0.0:
        reason = f"dropout_p is {dropout_p}"
    elif k_repeat != v_repeat:
        reason = f"keys are repeated {k_repeat} times and values {v_repeat} times"
    return Attention(
        output=node,
        query=query,
        key=key,
        value=val,
        attn_mask=argument(node, 3, "attn_mask"),
        scale=_scale(scale, query),
        is_causal=bool(argument(node, 5, "is_causal", False)),
        reason=reason,
    )


def _scale(scale: Any, query: Node) -> float:
    return 1.0 / math.sqrt(value(query).shape[-1]) if scale is None else float(scale)
