"""Find the op that front ends put where attention has sinks or a softcap."""

from __future__ import annotations

import torch
from torch.fx import Node

from tqc.ops import attention, example
from tqc.passes.finders.site import Attention, Mask, strip_heads


def match_dense_op(node: Node) -> Attention | None:
    """`attention(query, key, value, attn_mask, sinks, scale, softcap, is_causal)`."""
    if node.target is not attention:
        return None
    given = attention.arguments(node)
    mask = given["attn_mask"]
    masks = () if mask is None else (Mask(mask, "keep" if example(mask).dtype == torch.bool else "add"),)
    site = Attention(node, given["query"], given["key"], given["value"], masks)
    site.scale, site.softcap, site.sinks = float(given["scale"]), float(given["softcap"]), given["sinks"]
    site.is_causal = given["is_causal"]
    strip_heads(site)
    return site
