"""Layers that are alike: one is traced and converted to ONNX, the others are copied from it.

    y = layer(x, weights 0)                 x', w' = tqc::enter_0(x, weights 0)
    z = layer(y, weights 1)        ->       y' = layer(x', w')
                                            (y,) = tqc::leave_0(y')
                                            (z,) = tqc::repeat_0(y, weights 1)

`outline` does so before the graph is traced; `expand` puts the nodes between `enter` and `leave` in the place of each
`repeat`, and leaves none of the three. What torch.onnx makes of a node depends on its operands' shapes alone, and
those of like layers are the same.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from tqc.lowering.onnx.builder import DOMAIN
from tqc.lowering.onnx.realize import Call
from tqc.ops import example

# Behind each call of these, a graph is cut: there is one a layer.
ATTENTION = (torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.softmax)


@dataclass
class _Segment:
    """Nodes that follow each other.

    Attributes:
        text: what they compute, the same for nodes that compute the same of other tensors.
        given: tensors that they take from outside.
        used: which of them have results that others take.
    """

    nodes: list[Node]
    text: Any = None
    given: list[Node] = field(default_factory=list)
    used: list[int] = field(default_factory=list)


class _Results:
    """What a traced segment returned; the results of those that are alike have these shapes."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []

    def remember(self, *results: Tensor) -> list[Tensor]:
        self.held = list(results)
        return self.held

    def recall(self, *operands: Tensor) -> list[Tensor]:
        return self.held


def outline(gm: GraphModule) -> None:
    """Put calls of `repeat` in the place of the segments of `gm` that an earlier one is like."""
    calls = [node for node in gm.graph.nodes if node.op.startswith("call")]
    for node in gm.graph.find_nodes(op="get_attr"):
        calls[0].prepend(node)
    alike: dict[Any, list[_Segment]] = defaultdict(list)
    for nodes in _cut(calls):
        segment = _describe(gm, nodes)
        if segment is not None:
            alike[segment.text].append(segment)
    replaced: dict[Node, Node] = {}
    for number, segments in enumerate(group for group in alike.values() if len(group) > 1):
        _mark(gm, number, segments, replaced)
    gm.graph.lint()
    gm.recompile()


def _cut(calls: Sequence[Node]) -> list[list[Node]]:
    """The calls in order, cut behind each attention and what takes its results apart."""
    segments: list[list[Node]] = [[]]
    attends = False
    for node in calls:
        if attends and node.target is not operator.getitem:
            segments.append([])
            attends = False
        segments[-1].append(node)
        attends = attends or node.target in ATTENTION
        attends = attends or (isinstance(node.target, Call) and node.target.function.startswith("attend"))
    return segments


def _describe(gm: GraphModule, nodes: list[Node]) -> _Segment | None:
    """None for nodes that give others what is no tensor."""
    inside = {node: index for index, node in enumerate(nodes)}
    segment, numbers = _Segment(nodes), dict[Node, int]()

    def name(operand: Node) -> Any:
        if operand in inside:
            return ("inside", inside[operand])
        if isinstance(example(operand), (int, torch.SymInt)):
            return ("number", str(example(operand)))
        if operand not in numbers:
            numbers[operand] = len(numbers)
            segment.given.append(operand)
        return ("given", numbers[operand], _kind(gm, operand))

    lines = []
    for index, node in enumerate(nodes):
        target = node.target.function if isinstance(node.target, Call) else node.target
        lines.append((node.op, target, repr(map_arg((node.args, node.kwargs), lambda x: _Name(name(x))))))
        outside = any(user not in inside for user in node.users)
        if outside and (isinstance(node.target, Call) or isinstance(example(node), (tuple, list))):
            return None
        if outside and not isinstance(example(node), (int, torch.SymInt)):
            segment.used.append(index)
    segment.text = tuple(lines)
    return segment


@dataclass(frozen=True)
class _Name:
    of: Any


def _kind(gm: GraphModule, node: Node) -> str:
    held = operator.attrgetter(str(node.target))(gm) if node.op == "get_attr" else example(node)
    return f"{held.dtype} {tuple(held.shape)}" if isinstance(held, Tensor) else "of an op"


def _mark(gm: GraphModule, number: int, segments: list[_Segment], replaced: dict[Node, Node]) -> None:
    """`replaced`: by nodes that were given when segments were described, those that took their place."""
    graph, results = gm.graph, _Results()
    used = sorted({index for segment in segments for index in segment.used})
    first = segments[0]
    given = [replaced.get(node, node) for node in first.given]
    with graph.inserting_before(first.nodes[0]):
        entered = _call(gm, Call(f"enter_{number}", lambda *given: list(given)), given, len(given))
    swap = dict(zip(given, entered, strict=True))
    for node in first.nodes:
        node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda x: swap.get(x, x))
    with graph.inserting_after(first.nodes[-1]):
        anchor = graph.call_function(operator.add, (0, 0))
    with graph.inserting_before(anchor):
        made = [first.nodes[index] for index in used]
        left = _call(gm, Call(f"leave_{number}", results.remember), made, len(used))
    graph.erase_node(anchor)
    replaced |= _replace(first, dict(zip(used, left, strict=True)), keep={node.args[0] for node in left})
    for segment in segments[1:]:
        given = [replaced.get(node, node) for node in segment.given]
        with graph.inserting_before(segment.nodes[0]):
            made = _call(gm, Call(f"repeat_{number}", results.recall), given, len(used))
        swaps = dict(zip(used, made, strict=True))
        numbers = {i: first.nodes[i] for i in range(len(segment.nodes)) if i not in swaps}
        replaced |= _replace(segment, numbers | swaps)
        for node in reversed(segment.nodes):
            graph.erase_node(node)


def _call(gm: GraphModule, target: Call, operands: Sequence[Node], count: int) -> list[Node]:
    made = gm.graph.call_function(target, tuple(operands))
    return [gm.graph.call_function(operator.getitem, (made, i)) for i in range(count)]


def _replace(segment: _Segment, results: dict[int, Node], keep: Iterable[Any] = ()) -> dict[Node, Node]:
    """Let those outside of a segment take `results`, by the index of a node, instead of its own."""
    inside = {*segment.nodes, *keep}
    for index, made in results.items():
        for user in list(segment.nodes[index].users):
            if user not in inside:
                user.replace_input_with(segment.nodes[index], made)
    return {segment.nodes[index]: made for index, made in results.items()}


def expand(model: Any) -> None:
    """Copy what is between `enter` and `leave` of an onnx_ir model to where it repeats."""
    marks: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for node in model.graph:
        kind, _, number = node.op_type.partition("_")
        if node.domain == DOMAIN and kind in ("enter", "leave", "repeat"):
            marks[number][kind].append(node)
    for number, found in marks.items():
        (enter,), (leave,) = found["enter"], found["leave"]
        inner = _between(model.graph, enter, leave)
        for count, repeat in enumerate(found["repeat"], 1):
            _copy(model.graph, inner, enter, leave, repeat, f"{number}_{count}")
        for mark in (leave, enter):
            _bypass(model.graph, mark, mark.inputs)


def _between(graph: Any, enter: Any, leave: Any) -> list[Any]:
    """Nodes that lead from `enter` to `leave`, in order."""
    behind, nodes = set(enter.outputs), []
    for node in graph:
        if node is not leave and any(value in behind for value in node.inputs):
            behind.update(node.outputs)
            nodes.append(node)
    wanted, found = set(leave.inputs), []
    for node in reversed(nodes):
        if any(value in wanted for value in node.outputs):
            wanted.update(value for value in node.inputs if value is not None)
            found.append(node)
    return found[::-1]


def _copy(graph: Any, nodes: list[Any], enter: Any, leave: Any, repeat: Any, suffix: str) -> None:
    import onnx_ir as ir

    values = dict(zip(enter.outputs, repeat.inputs, strict=True))
    for node in nodes:
        outputs = [
            ir.Value(name=f"{value.name}_{suffix}", shape=value.shape, type=value.type) for value in node.outputs
        ]
        values |= dict(zip(node.outputs, outputs, strict=True))
        made = ir.Node(
            node.domain,
            node.op_type,
            [values.get(value, value) for value in node.inputs],
            list(node.attributes.values()),
            outputs=outputs,
            version=node.version,
            name=f"{node.name}_{suffix}",
        )
        graph.insert_before(repeat, made)
    _bypass(graph, repeat, [values[value] for value in leave.inputs])


def _bypass(graph: Any, node: Any, values: Sequence[Any]) -> None:
    """Let `values` take the place of a node's results, and their names where these are the graph's."""
    import onnx_ir as ir

    for old, new in zip(node.outputs, values, strict=True):
        name, public = old.name, old.is_graph_output()
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        if public:
            old.name, new.name = None, name
    graph.remove(node, safe=True)
