"""Floating point operations of a graph, by the shapes in it; a multiply and an add are two, as torch counts them."""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from tqc.ops import example
from tqc.passes.finders.sdpa import SDPA
from tqc.passes.graph import argument, calls

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_MATMULS = (torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "__matmul__")


def count_flops(graph: Graph) -> dict[str, int]:
    """Of matrix products, convolutions and attention: "attention", which is the products with queries, keys and values
    alone and without masks, and "total"."""
    attention = sum(_of_attention(node) for node in graph.nodes if calls(node, *SDPA))
    return {"attention": attention, "total": attention + sum(map(_of_product, graph.nodes))}


def _of_attention(node: Node) -> int:
    query, key, value = (example(argument(node, i, name)) for i, name in enumerate(("query", "key", "value")))
    pairs = math.prod(map(int, query.shape[:-1])) * int(key.shape[-2])
    return 2 * pairs * (int(query.shape[-1]) + int(value.shape[-1]))


def _of_product(node: Node) -> int:
    if calls(node, torch.nn.functional.linear):
        return 2 * _size(node) * int(example(argument(node, 1, "weight")).shape[1])
    if calls(node, *_CONVOLUTIONS):
        weight = example(argument(node, 1, "weight")).shape
        return 2 * _size(node) * math.prod(map(int, weight[1:]))
    if calls(node, *_MATMULS):
        return 2 * _size(node) * int(example(node.args[0]).shape[-1])
    if calls(node, torch.addmm, torch.baddbmm):
        return 2 * _size(node) * int(example(node.args[1]).shape[-1])
    return 0


def _size(node: Node) -> int:
    held = example(node)
    return math.prod(map(int, held.shape)) if isinstance(held, Tensor) else 0
