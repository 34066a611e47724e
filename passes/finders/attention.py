"""Find attention in a dynamo graph: which nodes compute softmax(scale * Q K' + mask) V, and from what."""

from __future__ import annotations

from torch.fx import Graph

from tqc.passes.finders.eager_attention import match_eager
from tqc.passes.finders.flex_attention import match_flex
from tqc.passes.finders.named_attention import match_named
from tqc.passes.finders.sdpa import match_sdpa
from tqc.passes.finders.site import Attention


def find_attention(graph: Graph) -> list[Attention]:
    """Every attention site, in graph order."""
    matches = (match(node) for node in graph.nodes for match in (match_sdpa, match_eager, match_flex, match_named))
    return [site for site in matches if site]
