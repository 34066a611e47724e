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

import contextlib
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from tqc.execute.instructions import Instruction
from tqc.execute.regions import pieces
from tqc.ops import example
from tqc.ops.effects import written
from tqc.torch_private import detect_fake_mode, pytree, storage_key


def shared_writes(graph: Graph) -> set[Node]:
    """Every node that makes, views or writes memory which is written in one region and seen through others' tensors.

    A write needs no care where all tensors on that memory are of its region, or where just one comes in: Inductor
    handles both.
    """
    outside: set[Node] = set()
    writes = {node: targets for node in graph.nodes if (targets := written(node))}
    if not writes:
        return outside
    memory_of = _memory(graph)
    holders: dict[int, list[Node]] = defaultdict(list)
    writers: dict[int, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        for memory in memory_of[node]:
            holders[memory].append(node)
        for memory in {memory for target in writes.get(node, ()) for memory in memory_of[target]}:
            writers[memory].append(node)
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


def _memory(graph: Graph) -> dict[Node, set[int]]:
    """Names of the memory that each node's tensors lie in.

    Examples would not do: where a pass put another node into the place of one, those of its views are still of the old
    one's memory. So torch ops are run on the examples of all else.
    """
    held: dict[Node, Any] = {}
    mode = detect_fake_mode([example(node) for node in graph.nodes if node.op == "placeholder"])
    with mode or contextlib.nullcontext(), torch.no_grad():
        for node in graph.nodes:
            held[node] = example(node)
            if node.op in ("call_function", "call_method") and not isinstance(node.target, Instruction):
                # What cannot be run lies in the memory of its example.
                with contextlib.suppress(Exception):
                    held[node] = _run(node, held)
    return {node: _keys(held[node]) | _keys(example(node)) for node in graph.nodes}


def _run(node: Node, held: dict[Node, Any]) -> Any:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), held.__getitem__)
    if isinstance(node.target, str):
        return getattr(args[0], node.target)(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


def _keys(held: Any) -> set[int]:
    tensors = [x for x in pytree.tree_leaves(held) if isinstance(x, Tensor) and x.layout == torch.strided]
    return {storage_key(x) for x in tensors}
