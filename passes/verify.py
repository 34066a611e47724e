"""Whether a graph is one of the dialect: torch nodes, and ops of the dialect with their types, each cache used once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from tqc.ops import Op, PackedValue, example, is_packed, update
from tqc.ops.text import graph_text
from tqc.passes.edit import fake_mode
from tqc.passes.graph import MEASURES

# Functions of dense tensors that front ends call beside torch's own.
FUNCTIONS = ("tqc.mlx_trace.functions", "tqc.ops.attention")


class InvalidGraph(AssertionError):
    """A graph that no target can realize: the message names the pass that made it and the node, and shows the graph."""


def verify(gm: GraphModule, after: str, finished: bool = True) -> None:
    """Check every node of a graph.

    Args:
        after: the pass that has just run.
        finished: whether it is the last one: until then torch ops may still take packed caches, consumed ones too.

    Raises:
        InvalidGraph: for a node that is unknown or has other types than its op, for a torch op on a packed cache, for a
            cache that is used behind the op that consumed it, and for an `update` that is not at the end.
    """
    with fake_mode(gm.graph):
        for node, reason in _faults(gm, finished):
            raise InvalidGraph(f"after pass {after}, node {node.name} is invalid: {reason}\n{graph_text(gm.graph)}")


def _faults(gm: GraphModule, finished: bool) -> Iterator[tuple[Node, str]]:
    consumed: dict[Node, Node] = {}
    ending = False
    for node in gm.graph.nodes:
        for source in node.all_input_nodes:
            takes = finished or isinstance(node.target, Op)
            if takes and source in consumed and source is not _updated(node):
                yield node, f"it uses {source.name}, which {consumed[source].name} has consumed"
        if node.op in ("call_function", "call_method") and (reason := _why_not(node, finished)):
            yield node, reason
        if isinstance(node.target, Op):
            arguments = node.target.arguments(node)
            for name in node.target.consumes:
                if isinstance(arguments[name], Node):
                    consumed[arguments[name]] = node
        if ending and node.target is not update and node.op != "output":
            yield node, "it stands behind an update"
        ending = ending or node.target is update


def _why_not(node: Node, finished: bool) -> str | None:
    if isinstance(node.target, Op):
        cache = _updated(node)
        if node.target is update and not (cache and cache.op == "placeholder"):
            return "what it updates is no input of the graph"
        return node.target.why_not(node)
    module = getattr(node.target, "__module__", None) or ""
    if module.startswith("tqc") and module not in FUNCTIONS:
        return f"{getattr(node.target, '__name__', node.target)} is no op of the dialect"
    if not finished:
        return None
    if any(map(is_packed, node.all_input_nodes)) and not _measures(example(node)):
        return "a torch op takes a packed cache"
    if any(isinstance(part, PackedValue) for part in _parts(example(node))) and not _of_op(node):
        return "a torch op makes a packed cache"
    return None


def _updated(node: Node) -> Node | None:
    """What an update says something about: its first operand, which targets read by its place."""
    first = node.args[0] if node.target is update and node.args else None
    return first if isinstance(first, Node) else None


def _of_op(node: Node) -> bool:
    """Whether `node` takes one of several results of an op."""
    return any(isinstance(source, Node) and isinstance(source.target, Op) for source in node.args[:1])


def _measures(held: Any) -> bool:
    return isinstance(held, MEASURES) or (isinstance(held, tuple) and not any(isinstance(x, Tensor) for x in held))


def _parts(held: Any) -> tuple[Any, ...]:
    return held if isinstance(held, tuple) else (held,)
