"""State that goes from one call of a graph to the next, as inputs and outputs behind its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.fx import GraphModule, Node

from tqc.ops import TENSORS, example, set_example
from tqc.passes.edit import fake_mode, inline, insert
from tqc.passes.graph import argument, calls, writers
from tqc.torch_private import MODULE_STACK

ATTENTION = "attention"  # what attention gave
WINDOW = "window"  # what attention in a window lacked
BLOCK = "block"  # what a block added to its input


class StateKey(NamedTuple):
    """What a state is of.

    Attributes:
        name: path of the attention site or of the block, with a number behind where that has several.
        what: ATTENTION, WINDOW or BLOCK.
    """

    name: str
    what: str


@dataclass(frozen=True)
class StateInput:
    """States that a graph reads: of the last `terms` computed steps, and, where these are several, their weights in a
    forecast, float32 [terms].

    Attributes:
        of_other: whether they are of the other guidance branch.
    """

    key: StateKey
    terms: int = 1
    of_other: bool = False


@dataclass
class Sharing:
    """A graph's inputs behind its own, in order, and its outputs."""

    inputs: list[StateInput] = field(default_factory=list)
    outputs: list[StateKey] = field(default_factory=list)


class StateGraph:
    """A graph that gets such inputs and outputs.

    Attributes:
        sharing: what it has got so far.
        gone: nodes that nothing needs any more.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.gm, self.sharing, self.gone = gm, Sharing(), list[Node]()
        self._last = next((node for node in reversed(gm.graph.nodes) if node.op == "placeholder"), None)
        self._kept: list[Node] = []

    def read(self, given: StateInput, like: Node, before: Node) -> Node:
        """A state of the shape of `like`, or a forecast of it, made in front of `before`."""
        held = example(like)
        shape = held.transpose(1, 2).shape if held.dim() == 4 else held.shape
        states = [self._placeholder(shape, held) for _ in range(given.terms)]
        weights = self._placeholder((given.terms,), held, torch.float32) if given.terms > 1 else None
        self.sharing.inputs.append(given)
        with self.gm.graph.inserting_before(before):
            state = states[0] if weights is None else inline(self.gm.graph, _forecast, weights, *states)
            return _swapped(self.gm, state)

    def keep(self, key: StateKey, node: Node) -> None:
        """Let `node` leave the graph as a state. One of four dimensions is [batch, n, query_heads, head_dim] then,
        which is how kernels lay it out."""
        self.sharing.outputs.append(key)
        self._kept.append(node)

    def replace(self, node: Node, by: Node, reading: Iterable[Node] = ()) -> None:
        """Put `by` in the place of `node`, but in the nodes of `reading`."""
        behind = set(reading)
        node.replace_all_uses_with(by, delete_user_cb=lambda user: user not in behind)
        self.gone.append(node)

    def finish(self) -> Sharing:
        """Erase what led to replaced nodes and to nothing else; a graph that nothing was done to stays as it was."""
        if self._kept:
            output = self.gm.graph.output_node()
            with self.gm.graph.inserting_before(output):
                extra = [insert(self.gm.graph, "contiguous", _swapped(self.gm, node)) for node in self._kept]
            output.args = ((*output.args[0], *extra),)
        if self.gone:
            settled = _settle_casts(self.gm)
            _erase(self.gm, [settled.get(node, node) for node in self.gone])
        if self._kept or self.gone:
            self.gm.graph.lint()
            self.gm.recompile()
        return self.sharing

    def _placeholder(self, shape: Iterable[int], like: torch.Tensor, dtype: torch.dtype | None = None) -> Node:
        assert self._last is not None
        with self.gm.graph.inserting_after(self._last):
            self._last = node = self.gm.graph.placeholder(
                f"step_state_{len(self.gm.graph.find_nodes(op='placeholder'))}"
            )
        with fake_mode(self.gm.graph):
            set_example(node, torch.empty(tuple(shape), dtype=dtype or like.dtype, device=like.device))
        return node


def _forecast(weights: torch.Tensor, *states: torch.Tensor) -> torch.Tensor:
    return sum((weights[n] * state for n, state in enumerate(states[1:], 1)), weights[0] * states[0])


def _swapped(gm: GraphModule, node: Node) -> Node:
    return insert(gm.graph, "transpose", node, 1, 2) if example(node).dim() == 4 else node


def _settle_casts(gm: GraphModule) -> dict[Node, Node]:
    """Cast to a dtype where a tensor is asked for nothing else: `out.type_as(query)` would keep the query. What stands
    for what."""
    settled = {}
    for node in list(gm.graph.nodes):
        if calls(node, "type_as"):
            like = example(argument(node, 1, "other"))
            with gm.graph.inserting_before(node):
                cast = insert(gm.graph, "to", node.args[0], like.device, like.dtype)
            cast.meta[MODULE_STACK] = node.meta.get(MODULE_STACK)
            node.replace_all_uses_with(cast)
            gm.graph.erase_node(node)
            settled[node] = cast
    return settled


def _erase(gm: GraphModule, gone: list[Node]) -> None:
    """Erase what led to these and to nothing else, writes in place into it included."""
    behind: set[Node] = set()
    waiting = list(gone)
    while waiting:
        node = waiting.pop()
        if node not in behind and node.op not in ("placeholder", "get_attr"):
            behind.add(node)
            waiting += [*node.all_input_nodes, *(writers(node) if isinstance(example(node), TENSORS) else ())]
    alive = set()
    waiting = [node for node in gm.graph.nodes if node not in behind]
    while waiting:
        node = waiting.pop()
        if node not in alive:
            alive.add(node)
            waiting += [*node.all_input_nodes, *(writers(node) if isinstance(example(node), TENSORS) else ())]
    for node in reversed(list(gm.graph.nodes)):
        if node not in alive:
            gm.graph.erase_node(node)
