"""A graph as text: every type, constant and operand, enough to see what a pass did and to rebuild the graph by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from tqc.ops.op import Op
from tqc.ops.value import PackedValue, example


def graph_text(graph: Graph) -> str:
    """One line a node: `name: type = op(operands)`."""
    return "\n".join(_lines(graph)) + "\n"


def _lines(graph: Graph) -> Iterator[str]:
    yield "graph("
    for node in graph.find_nodes(op="placeholder"):
        yield f"    {node.name}: {type_text(example(node))},"
    yield "):"
    for node in graph.nodes:
        if node.op == "output":
            yield f"    return {_operand(node.args[0])}"
        elif node.op != "placeholder":
            yield f"    {node.name}: {type_text(example(node))} = {_call(node)}"


def _call(node: Node) -> str:
    if node.op == "get_attr":
        return f"self.{node.target}"
    operands = [_operand(operand) for operand in node.args]
    operands += [f"{name}={_operand(operand)}" for name, operand in node.kwargs.items()]
    if node.op == "call_method":
        receiver, *operands = operands
        return f"{receiver}.{node.target}({', '.join(operands)})"
    return f"{target_text(node)}({', '.join(operands)})"


def target_text(node: Node) -> str:
    """What a node calls: `tqai.attend` for an op of the dialect."""
    target = node.target
    if isinstance(target, Op):
        return f"tqai.{target.__name__}"
    if isinstance(target, str) or isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(target)
    name = getattr(target, "__name__", type(target).__name__)
    module = (getattr(target, "__module__", None) or "torch").lstrip("_").replace("_C._nn", "nn.functional")
    return f"{module}.{name}"


def _operand(operand: Any) -> str:
    if isinstance(operand, Node):
        return operand.name
    if isinstance(operand, (tuple, list)):
        inner = ", ".join(map(_operand, operand))
        return f"({inner}{',' if len(operand) == 1 else ''})" if isinstance(operand, tuple) else f"[{inner}]"
    if isinstance(operand, dict):
        return "{" + ", ".join(f"{key}: {_operand(held)}" for key, held in operand.items()) + "}"
    if isinstance(operand, slice):
        return f"slice({', '.join(map(_operand, (operand.start, operand.stop, operand.step)))})"
    return repr(operand)


def type_text(held: Any) -> str:
    """Type of what a node holds: shape, dtype, device, and strides where they are not those of a contiguous tensor."""
    if isinstance(held, PackedValue):
        return str(held)
    if isinstance(held, Tensor):
        text = f"{str(held.dtype).removeprefix('torch.')}{list(held.shape)} {held.device}"
        strides = held.stride()
        return text if _contiguous(held.shape, strides) else f"{text} strides {list(strides)}"
    if isinstance(held, (tuple, list)):
        return f"({', '.join(map(type_text, held))})"
    if isinstance(held, (torch.SymInt, torch.SymFloat)):
        hint = held.node.hint if held.node.has_hint() else "?"
        return f"{type(held).__name__} {held} = {hint}"
    return "None" if held is None else f"{type(held).__name__} {held}"


def _contiguous(shape: Any, strides: Any) -> bool:
    expected: Any = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if str(stride) != str(expected) and str(size) != "1":
            return False
        expected = expected * size
    return True
