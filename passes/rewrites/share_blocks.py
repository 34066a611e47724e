"""Let a whole block add to its input what it added in the steps before."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from tqc.ops import example
from tqc.passes.edit import insert
from tqc.passes.graph import argument, calls, module_path
from tqc.passes.rewrites.step_state import BLOCK, StateGraph, StateInput, StateKey

_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_CASTS = ("to", "type_as", "float", "half", "bfloat16", "contiguous", "clone")


def share_blocks(graph: StateGraph, blocks: Sequence[str], decide: Callable[[int], tuple[int, bool]]) -> list[str]:
    """Of each block, share what `decide(layer)` says: of how many computed steps its states are, 0 where it is
    computed, and whether its states are kept.

    Before:  y = block(x)
    After:   shared:  y = x + state                  # the block is gone
             kept:    y = block(x), and y - x leaves the graph

    Returns:
        Why blocks are computed that were to be shared.
    """
    notes: list[str] = []
    wanted = {layer: found for layer in range(len(blocks)) if any(found := decide(layer))}
    if not wanted:
        return notes
    inside: dict[int, dict[Node, None]] = {layer: {} for layer in wanted}
    for node in graph.gm.graph.nodes:
        path = module_path(node)
        for layer, nodes in inside.items():
            if path == blocks[layer] or path.startswith(f"{blocks[layer]}."):
                nodes[node] = None
    for layer, (terms, keep) in wanted.items():
        streams = _streams(inside[layer])
        if not streams:
            notes.append(f"{blocks[layer]} is computed: what it adds to which of its inputs was not found")
        for number, (output, start) in enumerate(streams):
            key = StateKey(blocks[layer] if not number else f"{blocks[layer]}#{number + 1}", BLOCK)
            if terms:
                state = graph.read(StateInput(key, terms), output, output)
                with graph.gm.graph.inserting_before(output):
                    graph.replace(output, insert(graph.gm.graph, torch.add, start, state))
            elif keep:
                with graph.gm.graph.inserting_after(output):
                    graph.keep(key, insert(graph.gm.graph, torch.sub, output, start))
    return notes


def _streams(nodes: Mapping[Node, Any]) -> list[tuple[Node, Node]]:
    """What leaves a block, with the input that it was added to; none if one of them was added to nothing."""
    found = []
    for node in nodes:
        held = example(node)
        leaves = isinstance(held, Tensor) and held.dim() >= 3 and any(user not in nodes for user in node.users)
        if leaves and any(_reads(user) for user in node.users if user not in nodes):
            starts = _starts(node, nodes)
            if len(starts) != 1:
                return []
            found.append((node, starts.pop()))
    return found


def _reads(user: Node) -> bool:
    """Whether it looks at elements, not at sizes alone."""
    return user.op == "output" or isinstance(example(user), (Tensor, tuple, list)) and not calls(user, "size")


def _starts(output: Node, nodes: Mapping[Node, Any]) -> set[Node]:
    """The inputs of a block that additions lead from to `output`."""
    found, waiting, shape = set(), [output], example(output).shape
    while waiting:
        node = waiting.pop()
        if node not in nodes:
            found.add(node)
        elif calls(node, *_ADDS):
            terms = (argument(node, 0, "input"), argument(node, 1, "other"))
            waiting += [term for term in terms if isinstance(term, Node) and example(term).shape == shape]
        elif calls(node, *_CASTS):
            waiting.append(node.args[0])
    return found
