"""Find attention in a dynamo graph: which nodes compute softmax(scale * Q K' + mask) V, and from what."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from tqc.passes.graph import argument, calls, layer_name, strip_repeat, value

SDPA = (torch.nn.functional.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention)


@dataclass(frozen=True)
class Mask:
    """What is added to the scores of one site, or decides which of them count.

    Attributes:
        node: broadcastable to [batch, query_heads, n, columns].
        kind: "keep" for bool where True attends, "drop" for bool where True does not, "add" for float; "flex" where
            `node` is a `flex_attention` whose mask is still a function.
    """

    node: Node
    kind: str


@dataclass
class Attention:
    """One attention site.

    Attributes:
        output: the node that holds the result, [batch, query_heads, n, head_dim].
        query: [batch, query_heads, n, head_dim].
        key, value: before the repetition of grouped heads, [batch, heads, tokens, head_dim].
        masks: applied after scale and softcap, all of them.
        sinks: node of one logit per query head, or None.
        reason: why the site is not understood (then the fields before it may not say all), or None.
    """

    output: Node
    query: Node
    key: Node
    value: Node
    masks: tuple[Mask, ...] = ()
    scale: float = 1.0
    softcap: float = 0.0
    sinks: Node | None = None
    is_causal: bool = False
    reason: str | None = None

    @property
    def name(self) -> str:
        return layer_name(self.output)


def find_attention(graph: Graph) -> list[Attention]:
    """Every attention site, in graph order."""
    # They make `Attention` objects, so they import this module.
    from tqc.passes.finders.eager_attention import match_eager
    from tqc.passes.finders.flex_attention import match_flex

    sites = []
    for node in graph.nodes:
        for match in (match_sdpa, match_eager, match_flex):
            if site := match(node):
                sites.append(site)
    return sites


def match_sdpa(node: Node) -> Attention | None:
    """`scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)`."""
    if not calls(node, *SDPA):
        return None
    query, key, val = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    mask = argument(node, 3, "attn_mask")
    site = Attention(node, query, key, val, is_causal=bool(argument(node, 5, "is_causal", False)))
    if mask is not None:
        site.masks = (Mask(mask, "keep" if value(mask).dtype == torch.bool else "add"),)
    scale = argument(node, 6, "scale")
    dropout_p = argument(node, 4, "dropout_p", 0.0)
    if value(query).dim() != 4:
        site.reason = f"the query has {value(query).dim()} dimensions, not 4"
    elif isinstance(scale, Node) or isinstance(dropout_p, Node):
        site.reason = "scale or dropout_p is computed in the graph"
    elif dropout_p != 0.0:
        site.reason = f"dropout_p is {dropout_p}"
    else:
        site.scale = 1.0 / math.sqrt(value(query).shape[-1]) if scale is None else float(scale)
        strip_heads(site)
    return site


def strip_heads(site: Attention) -> None:
    """Undo the repetition of grouped heads, which must be the same for keys and values."""
    heads = value(site.query).shape[1]
    key, k_repeat = strip_repeat(site.key, heads)
    val, v_repeat = strip_repeat(site.value, heads)
    if k_repeat != v_repeat:
        site.reason = f"keys are repeated {k_repeat} times and values {v_repeat} times"
    else:
        site.key, site.value = key, val
