"""The scores of tokens whose cache has groups: one node for the keys and values of a site."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, Node

from tqc import ops
from tqc.passes.edit import insert
from tqc.passes.plan import Site


def score_tokens(graph: Graph, site: Site, query: Node, key: Any, value: Any, *caches: Any, attn_mask: Any) -> Any:
    """`score` of new tokens where the graph stands, as the operands that `pack` and `extend` of keys take."""
    assert site.k_fmt
    scale = site.attention.scale
    node = insert(graph, ops.score, key, value, query, site.k_fmt.spec, *caches, attn_mask=attn_mask, scale=scale)
    scored = site.mark(node)
    return {name: insert(graph, operator.getitem, scored, i) for i, name in enumerate(("score", "state_rows"))}
