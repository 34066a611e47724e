"""Find the function that front ends put where attention has sinks or a softcap."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from tqc.ops import attention, example
from tqc.passes.finders.site import Attention, Mask, strip_heads
from tqc.passes.graph import argument, calls


def match_named(node: Node) -> Attention | None:
    """`tqc.ops.attention(query, key, value, attn_mask, sinks, scale, softcap, is_causal)`."""
    if not calls(node, attention):
        return None

    def given(position: int, name: str, default: Any = None) -> Any:
        return argument(node, position, name, default)

    mask = given(3, "attn_mask")
    masks = () if mask is None else (Mask(mask, "keep" if example(mask).dtype == torch.bool else "add"),)
    scores = (float(given(5, "scale", 1.0)), float(given(6, "softcap", 0.0)), given(4, "sinks"))
    key, val = given(1, "key"), given(2, "value")
    site = Attention(node, given(0, "query"), key, val, masks, *scores, is_causal=given(7, "is_causal", False))
    strip_heads(site)
    return site
