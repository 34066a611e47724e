"""Changing graphs: what every pass does when it puts a node in another's place."""

from __future__ import annotations

import contextlib
import math
import operator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node

from tqc.passes.finders.attention import Mask
from tqc.passes.finders.flex_attention import FLEX, block_mask_of, mask_function, shape_of, visible
from tqc.passes.graph import value

# What may go once nothing reads it: ops without effects that lead from a cache to attention. In-place ops never go.
_PURE_METHODS = {
    *("reshape", "view", "expand", "transpose", "permute", "contiguous", "unsqueeze", "repeat_interleave", "size"),
    *("to", "type", "type_as", "float", "masked_fill", "max", "softmax", "matmul"),
}
_PURE_FUNCTIONS = {
    operator.getitem,
    torch.cat,
    torch.concat,
    torch.tensor,
    torch.repeat_interleave,
    torch.reshape,
    torch.transpose,
    torch.unsqueeze,
    torch.zeros,
    torch.matmul,
    torch.tanh,
    torch.nn.functional.softmax,
    torch.nn.functional.dropout,
    torch.nn.functional.scaled_dot_product_attention,
    torch._C._nn.scaled_dot_product_attention,
    operator.add,
    operator.mul,
    operator.sub,
    operator.truediv,
    operator.matmul,
    torch.softmax,
    FLEX,
}


def set_value(node: Node, example: Any) -> None:
    """Record the example value (a fake tensor) that later passes and the compiler read."""
    node.meta["example_value"] = example


def erase_unused(node: Node) -> None:
    """Erase `node` if nothing reads it and it has no effects, then likewise the nodes it alone read."""
    if node.users or not (
        (node.op == "call_method" and node.target in _PURE_METHODS)
        or (node.op == "call_function" and node.target in _PURE_FUNCTIONS)
    ):
        return
    inputs = list(node.all_input_nodes)
    node.graph.erase_node(node)
    for before in inputs:
        erase_unused(before)


def erase_unused_sizes(graph: Graph) -> None:
    """Erase arithmetic on sizes that nothing reads any more, so that regions do not depend on lengths for nothing."""
    for node in reversed(graph.nodes):
        is_size = isinstance(value(node), (int, torch.SymInt)) and node.op in ("call_function", "call_method")
        if is_size and not node.users:
            graph.erase_node(node)


def combine_masks(graph: Graph, masks: tuple[Mask, ...], columns: Any) -> Node | None:
    """One node that stands for all masks, inserted where the graph stands: bool (True attends) or float (added).

    Args:
        columns: how many keys there are, a node or an int.
    """
    if not masks:
        return None
    total, added = _as_given(graph, masks[0], columns)
    for mask in masks[1:]:
        other, other_added = _as_given(graph, mask, columns)
        if not added and not other_added:
            total = insert(graph, torch.logical_and, total, other)
            continue
        total = total if added else _added(graph, total)
        other = other if other_added else _added(graph, other)
        total, added = insert(graph, torch.add, total, other), True
    while value(total).dim() < 4:
        total = insert(graph, torch.unsqueeze, total, 0)
    return total


def _as_given(graph: Graph, mask: Mask, columns: Any) -> tuple[Node, bool]:
    if mask.kind == "drop":
        return insert(graph, torch.logical_not, mask.node), False
    if mask.kind == "flex":
        return _materialize(graph, mask.node, columns), False
    return mask.node, mask.kind == "add"


def _added(graph: Graph, keep: Node) -> Node:
    zeros = insert(graph, torch.zeros_like, keep, dtype=torch.float32)
    dropped = insert(graph, torch.logical_not, keep)
    return insert(graph, torch.masked_fill, zeros, dropped, -math.inf)


def _materialize(graph: Graph, node: Node, columns: Any) -> Node:
    """The mask of a `flex_attention` node as a tensor: its mask function, inlined, on all indices at once."""
    device = value(node.args[0]).device
    ranges, indices = [], []
    for dim, size in enumerate((*shape_of(node), columns)):
        if isinstance(size, torch.SymInt):
            size = insert(graph, _size, node.args[0], dim)
        ranges.append(insert(graph, torch.arange, size, device=device))
        shape = [1, 1, 1, 1]
        shape[dim] = -1
        indices.append(insert(graph, torch.reshape, ranges[-1], tuple(shape)))
    function, others = mask_function(node)
    env: dict[Node, Any] = {}
    given = iter((*indices, *others))
    result: Any = None
    for inner in function.graph.nodes:
        if inner.op == "placeholder":
            env[inner] = next(given)
        elif inner.op == "output":
            result = inner.args[0][0] if isinstance(inner.args[0], (tuple, list)) else inner.args[0]
        else:
            args, kwargs = torch.fx.node.map_arg((inner.args, inner.kwargs), env.__getitem__)
            target = inner.target if inner.op == "call_function" else getattr(torch.Tensor, str(inner.target))
            env[inner] = insert(graph, target, *args, **kwargs)
    return insert(graph, visible, env[result], ranges[2], ranges[3], *block_mask_of(node))


def _size(tensor: torch.Tensor, dim: int) -> int:
    return tensor.shape[dim]


def insert(graph: Graph, function: Any, *args: Any, **kwargs: Any) -> Node:
    """Call `function` where the graph stands; its example value is computed from those of its arguments."""
    node = graph.call_function(function, args, kwargs)
    examples = torch.fx.node.map_arg((args, kwargs), value)
    with _fake_mode(graph):
        set_value(node, function(*examples[0], **examples[1]))
    return node


def _fake_mode(graph: Graph) -> Any:
    """The mode of the graph's own example values; the one of the tracing context may be another."""
    examples = (value(node) for node in graph.nodes if node.op == "placeholder")
    return next(
        (example.fake_mode for example in examples if isinstance(example, FakeTensor)), contextlib.nullcontext()
    )
