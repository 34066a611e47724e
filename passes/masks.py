"""The masks of an attention site as one tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node

from tqc.ops import example
from tqc.passes.edit import inline, insert, size
from tqc.passes.finders.flex_attention import block_mask_of, mask_function, shape_of, visible
from tqc.passes.finders.site import Attention, Mask


def combine_masks(graph: Graph, attention: Attention, columns: Any) -> Node | None:
    """One node that stands for all masks, inserted where the graph stands: bool (True attends) or float (added).

    Args:
        columns: how many keys there are, a node or an int.
    """
    masks = attention.masks
    if not masks:
        return None
    alike = len({example(mask.node).dtype for mask in masks if mask.kind == "add"}) == 1
    total, added = _as_given(graph, masks[0], attention.heads, columns, alike)
    for mask in masks[1:]:
        other, other_added = _as_given(graph, mask, attention.heads, columns, alike)
        if not added and not other_added:
            total = insert(graph, torch.logical_and, total, other)
            continue
        total = total if added else _added(graph, total)
        other = other if other_added else _added(graph, other)
        total, added = insert(graph, torch.add, total, other), True
    while example(total).dim() < 4:
        total = insert(graph, torch.unsqueeze, total, 0)
    return total


def _as_given(graph: Graph, mask: Mask, heads: int, columns: Any, alike: bool) -> tuple[Node, bool]:
    if mask.kind == "flex":
        return _materialize(graph, mask.node, columns), False
    node = mask.node
    if mask.flat:
        node = insert(graph, "reshape", node, (-1, heads, *(size(graph, node, dim) for dim in (1, 2))))
    if mask.kind == "drop":
        return insert(graph, torch.logical_not, node), False
    if mask.kind == "add" and (mask.factor != 1.0 or not alike):
        node = _scaled(graph, node, mask.factor)
    return node, mask.kind == "add"


def _scaled(graph: Graph, mask: Node, factor: float) -> Node:
    """`factor` times a float mask, in float32. What stands for minus infinity, the lowest number of the mask's dtype,
    becomes that of float32, so that it stays as good as minus infinity."""
    wide = insert(graph, "to", mask, torch.float32)
    hidden = insert(graph, torch.le, wide, torch.finfo(example(mask).dtype).min / 2)
    wide = insert(graph, torch.mul, wide, factor)
    return insert(graph, torch.masked_fill, wide, hidden, torch.finfo(torch.float32).min)


def _added(graph: Graph, keep: Node) -> Node:
    zeros = insert(graph, torch.zeros_like, keep, dtype=torch.float32)
    dropped = insert(graph, torch.logical_not, keep)
    return insert(graph, torch.masked_fill, zeros, dropped, -math.inf)


def _materialize(graph: Graph, node: Node, columns: Any) -> Node:
    """The mask of a `flex_attention` node as a tensor: its mask function, inlined, on all indices at once."""
    device = example(node.args[0]).device
    ranges, indices = [], []
    for dim, count in enumerate((*shape_of(node), columns)):
        if isinstance(count, torch.SymInt):
            count = size(graph, node.args[0], dim)
        ranges.append(insert(graph, torch.arange, count, device=device))
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
            env[inner] = insert(graph, inner.target, *args, **kwargs)
    return inline(graph, visible, env[result], ranges[2], ranges[3], *block_mask_of(node))
