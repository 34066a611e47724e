"""Find `flex_attention`: its mask function becomes a mask tensor, its score function must be a softcap or nothing."""

from __future__ import annotations

from torch.fx import Node

from tqc.passes.find_attention import Attention


def match_flex(node: Node) -> Attention | None:
    return None
