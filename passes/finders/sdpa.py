"""Find `scaled_dot_product_attention`."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from tqc.ops import example
from tqc.passes.finders.site import Attention, Mask, strip_heads
from tqc.passes.graph import argument, calls

SDPA = (torch.nn.functional.scaled_dot_product_attention,)


def match_sdpa(node: Node) -> Attention | None:
    """`scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)`."""
    if not calls(node, *SDPA):
        return None
    query, key, val = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    mask = argument(node, 3, "attn_mask")
    site = Attention(node, query, key, val, is_causal=bool(argument(node, 5, "is_causal", False)))
    if mask is not None:
        site.masks = (Mask(mask, "keep" if example(mask).dtype == torch.bool else "add"),)
    scale = argument(node, 6, "scale")
    dropout_p = argument(node, 4, "dropout_p", 0.0)
    if example(query).dim() != 4:
        site.reason = f"the query has {example(query).dim()} dimensions, not 4"
    elif isinstance(scale, Node) or isinstance(dropout_p, Node):
        site.reason = "scale or dropout_p is computed in the graph"
    elif dropout_p != 0.0:
        site.reason = f"dropout_p is {dropout_p}"
    else:
        site.scale = 1.0 / math.sqrt(example(query).shape[-1]) if scale is None else float(scale)
        strip_heads(site)
    return site
