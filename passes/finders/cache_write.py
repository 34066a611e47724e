"""How a site's keys or values are cached, and the slices that say so."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tqc.ops import is_packed
from tqc.passes.graph import calls

FULL = slice(None, None, None)


@dataclass
class CacheWrite:
    """One of a site's two caches.

    Attributes:
        kind: "grow" for `cat([past, new])`, "write" for writing into a preallocated tensor in place, "slide" for a
            preallocated tensor that gets the last of its own tokens and new ones, "read" for a cache that this call
            does not write.
        node: whose value the attention reads, [batch, heads, tokens, head_dim].
        past: the cache before the write; None for an empty one. For "write" and "slide", the preallocated tensor.
        new: the new tokens; None for "read".
        operation: for "write" and "slide", the node that writes.
        positions: for "write", where: a node of int64 [n], or the first position (a node or an int).
        counted: for "write", whether `positions` are known to be consecutive.
        prefix: for "write", how many tokens of the preallocated tensor attention reads; None for all.
        begin, end: for "slide", which tokens of `past` attention reads in front of the new ones: nodes or ints.
        kept: for "grow", what of `node` stays cached where it is its last tokens alone (a sliding window); else None.
        keep: how many tokens that are at most; None for all.
    """

    kind: str
    node: Node
    past: Node | None
    new: Node | None
    operation: Node | None = None
    positions: Any = None
    counted: bool = False
    prefix: Any = None
    begin: Any = 0
    end: Any = 0
    kept: Node | None = None
    keep: int | None = None

    @property
    def leaves(self) -> Node:
        """For "grow", the node that is cached."""
        return self.kept or self.node

    @property
    def packed(self) -> bool:
        return self.past is not None and is_packed(self.past)

    @property
    def starts_anew(self) -> bool:
        """Whether a sliding window holds none of its earlier tokens behind this call."""
        return self.kind == "slide" and self.end == 0

    @property
    def allocated_here(self) -> bool:
        """Whether the preallocated tensor is made in this graph, as zeros."""
        return self.past is not None and calls(self.past, torch.zeros, "new_zeros", torch.zeros_like)


def along_length(node: Node) -> slice | None:
    """`part` of `tensor[:, :, part]` or `tensor[:, :, part, :]`, without a stride."""
    index = node.args[1] if calls(node, operator.getitem) else None
    if not isinstance(index, tuple) or len(index) not in (3, 4):
        return None
    if any(part != FULL for part in (*index[:2], *index[3:])):
        return None
    part = index[2]
    return part if isinstance(part, slice) and part.step in (None, 1) else None
