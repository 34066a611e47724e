"""Products of matrices in any spelling, and tensors whose batch and heads are one dimension."""

from __future__ import annotations

import re
from dataclasses import dataclass
from operator import matmul
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tqc.ops import TENSORS, example
from tqc.passes.graph import argument, calls, strip_casts, writers

_MATMUL = (torch.matmul, matmul, "matmul", torch.bmm, "bmm")
BADDBMM = (torch.baddbmm, "baddbmm")
# Leading dimensions in common, then `left @ right.mT` or `left @ right`.
_EINSUM_OF_ROWS = re.compile(r"(\w\w?|\.\.\.)(\w)(\w),\1(\w)\3->\1\2\4")
_EINSUM = re.compile(r"(\w\w?|\.\.\.)(\w)(\w),\1\3(\w)->\1\2\4")
_RESHAPES = ("reshape", "view", torch.reshape, "flatten", torch.flatten, "unflatten")


@dataclass(frozen=True)
class Product:
    """`added_scale * added + scale * left @ right`.

    Attributes:
        of_rows: whether it is `left @ right.mT` instead.
        added: None where nothing is.
    """

    left: Node
    right: Node
    of_rows: bool = False
    scale: Any = 1.0
    added: Node | None = None
    added_scale: Any = 1.0


def find_product(node: Any) -> Product | None:
    """What `node` multiplies: by `matmul`, `bmm`, `baddbmm`, or an `einsum` that is one of them."""
    if calls(node, *_MATMUL):
        left = argument(node, 0, "input")
        right = argument(node, 1, "other", node.kwargs.get("mat2", node.kwargs.get("tensor2")))
        return Product(left, right) if _tensors(left, right) else None
    if calls(node, *BADDBMM):
        added, left, right = (argument(node, i, name) for i, name in enumerate(("input", "batch1", "batch2")))
        alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
        zeros = calls(added, torch.zeros, torch.zeros_like, "new_zeros") and not writers(added)
        nothing = beta == 0 or zeros
        return Product(left, right, False, alpha, None if nothing else added, beta)
    if calls(node, torch.einsum):
        equation, *operands = node.args
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = list(operands[0])
        equation = str(equation).replace(" ", "")
        of_rows = _EINSUM_OF_ROWS.fullmatch(equation) is not None
        if len(operands) == 2 and _tensors(*operands) and (of_rows or _EINSUM.fullmatch(equation)):
            return Product(operands[0], operands[1], of_rows)
    return None


def _tensors(*nodes: Any) -> bool:
    return all(isinstance(node, Node) and isinstance(example(node), TENSORS) for node in nodes)


def regrouped(node: Node) -> Node | None:
    """The tensor of three or four dimensions that `node` is a reshape of, of the same matrices in the same order."""
    source = node.args[0] if calls(node, *_RESHAPES) else None
    if not isinstance(source, Node) or not isinstance(example(source), TENSORS):
        return None
    before, after = example(source).shape, example(node).shape
    if not {len(before), len(after)} <= {3, 4}:
        return None
    same = (statically_known_true(before[dim] == after[dim]) for dim in (-2, -1))
    return source if all(same) else None


def split_heads(node: Node) -> Node:
    """[batch, heads, n, d] that `node`, [batch * heads, n, d], was flattened from; `node` if that is not known."""
    while example(node).dim() == 3:
        source = strip_copies(node)
        source = regrouped(source) or source
        if source is node:
            break
        node = source
    return strip_copies(node)


def rows_of(node: Node, transposed: bool) -> Node | None:
    """[batch, heads, n, d] that `node` is made from by swaps of the last two dimensions and by flattening; None where
    that is something else, or where `transposed` is not whether the number of swaps is odd."""
    while True:
        node = strip_copies(node)
        if _swaps(node):
            node, transposed = node.args[0], not transposed
        elif example(node).dim() == 3 and (source := regrouped(node)):
            node = source
        else:
            return None if transposed or example(node).dim() != 4 else node


def strip_copies(node: Node) -> Node:
    """The node before casts and `contiguous`."""
    while True:
        source = strip_casts(node)
        source = source.args[0] if calls(source, "contiguous") else source
        if source is node:
            return node
        node = source


def _swaps(node: Node) -> bool:
    """Whether `node` swaps the last two dimensions of another."""
    dims = example(node).dim()
    last = [dims - 2, dims - 1]
    if calls(node, "transpose", torch.transpose, "swapaxes", "swapdims", torch.swapaxes, torch.swapdims):
        given = [argument(node, 1, "dim0"), argument(node, 2, "dim1")]
        return all(isinstance(dim, int) for dim in given) and sorted(dim % dims for dim in given) == last
    if calls(node, "permute", torch.permute):
        order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return [dim % dims for dim in order] == [*range(dims - 2), *reversed(last)]
    return calls(node, torch.ops.aten.mT) or (calls(node, getattr) and node.args[1] == "mT")
