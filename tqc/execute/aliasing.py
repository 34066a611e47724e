"""Which nodes of a graph must stay outside of compiled regions, since what they write shows elsewhere.

Inductor knows which tensors of a graph share memory. A region is a graph of its own: that two of its inputs are views
of one tensor, so that a write into one changes the other, may be lost, and what it returns as a view may be a copy.

    region_0: h = ...; w = h.view(-1)           region_0: ...
    attend                                ->    h = ...; w = h.view(-1)
    region_1: w.add_(1); y = h * 2              attend
                                                w.add_(1)
                                                region_1: y = h * 2
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from tqc.execute.regions import pieces
from tqc.ops import example
from tqc.ops.effects import written
from tqc.torch_private import pytree, storage_key


def shared_writes(graph: Graph) -> set[Node]:
    """Every node that makes, views or writes memory which is written in one region and seen through others' tensors.

    A write needs no care where all tensors on that memory are of its region, or where just one comes in: Inductor
    handles both.
    """
    holders: dict[int, list[Node]] = defaultdict(list)
    writers: dict[int, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        for memory in _memory(node):
            holders[memory].append(node)
        for target in written(node):
            for memory in _memory(target):
                writers[memory].append(node)
    outside: set[Node] = set()
    if not writers:
        return outside
    order = {node: index for index, node in enumerate(graph.nodes)}
    while True:
        # Of each node the first node of its region.
        region = {node: piece[0] for piece in pieces(graph, outside) if isinstance(piece, list) for node in piece}
        shown = [
            memory
            for memory, by in writers.items()
            if not outside.issuperset(by) and _shows(by, holders[memory], region, order)
        ]
        more = {node for memory in shown for node in (*holders[memory], *writers[memory]) if node in region}
        if not more:
            return outside
        outside |= more  # each cuts a region, so that what lay in one may lie in two


def _shows(writers: list[Node], holders: list[Node], region: dict[Node, Node], order: dict[Node, int]) -> bool:
    if len({region.get(node) for node in writers}) > 1:
        return True
    start = region.get(writers[0], writers[0])
    elsewhere = [node for node in holders if region.get(node) is not start]
    # The caller, too, has its inputs still.
    seen = [n for n in elsewhere if n.op == "placeholder" or any(order[user] >= order[start] for user in n.users)]
    return len(seen) > 1


def _memory(node: Node) -> Iterator[int]:
    for held in pytree.tree_leaves(example(node)):
        if isinstance(held, Tensor) and held.layout == torch.strided:
            yield storage_key(held)
