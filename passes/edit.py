"""Changing graphs: what every pass does when it puts a node in another's place."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from tqc.passes.find_attention import Mask
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


def combine_masks(graph: Graph, masks: tuple[Mask, ...]) -> Node | None:
    """One node that stands for all masks, inserted where the graph stands: bool (True attends) or float (added)."""
    if not masks:
        return None
    total, added = _as_given(graph, masks[0])
    for mask in masks[1:]:
        other, other_added = _as_given(graph, mask)
        if not added and not other_added:
            total = _insert(graph, torch.logical_and, total, other)
            continue
        total = total if added else _added(graph, total)
        other = other if other_added else _added(graph, other)
        total, added = _insert(graph, torch.add, total, other), True
    return total


def _as_given(graph: Graph, mask: Mask) -> tuple[Node, bool]:
    if mask.kind == "drop":
        return _insert(graph, torch.logical_not, mask.node), False
    return mask.node, mask.kind == "add"


def _added(graph: Graph, keep: Node) -> Node:
    zeros = _insert(graph, torch.zeros_like, keep, dtype=torch.float32)
    dropped = _insert(graph, torch.logical_not, keep)
    return _insert(graph, torch.masked_fill, zeros, dropped, -math.inf)


def _insert(graph: Graph, function: Any, *args: Any, **kwargs: Any) -> Node:
    node = graph.call_function(function, args, kwargs)
    set_value(node, function(*(value(arg) for arg in args), **kwargs))
    return node
