"""Find where the keys and values of an attention site come from: how its cache is written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from tqc.passes.graph import argument, calls, is_packed, value


@dataclass
class CacheWrite:
    """One of a site's two caches.

    Attributes:
        kind: "grow" for `cat([past, new])`, "read" for a cache that this call does not write.
        node: whose value the attention reads, [batch, heads, tokens, head_dim].
        past: the cache before the write; None for an empty one.
        new: the new tokens; None for "read".
    """

    kind: str
    node: Node
    past: Node | None
    new: Node | None

    @property
    def packed(self) -> bool:
        return self.past is not None and is_packed(self.past)


def find_cache(node: Node) -> CacheWrite | str:
    """How `node`, the keys or values of an attention site, is cached; or why that is not understood."""
    if calls(node, torch.cat, torch.concat):
        return _match_cat(node)
    if node.op == "placeholder" and is_packed(node):
        return CacheWrite("read", node, node, None)
    return "keys and values are not written to a cache in a way that is known"


def _match_cat(node: Node) -> CacheWrite | str:
    """`torch.cat([past, new], dim=-2)`, as transformers' DynamicCache writes it."""
    tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2 or dim not in (2, -2):
        return "the concatenation is not of a cache and new tokens along the length"
    past, new = tensors
    if value(new).dim() != 4:
        return f"new keys or values have {value(new).dim()} dimensions, not 4"
    empty = value(past).numel() == 0 if not is_packed(past) else False
    if empty:
        return CacheWrite("grow", node, None, new)
    if past.op != "placeholder":
        return "the cache before the concatenation is not an input of the graph"
    return CacheWrite("grow", node, past, new)
