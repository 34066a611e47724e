"""The second half of a batch: what leads from projections to a tensor, computed for it alone."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from tqc.ops import TENSORS, example
from tqc.passes.edit import insert
from tqc.passes.graph import calls, writers

_PROJECTIONS = (torch.nn.functional.linear,)
_SHAPED = ("view", "reshape", "expand", torch.reshape)  # whose first size is the batch
# Each with the dims that it touches, which must not be that of the batch.
_REARRANGED = {
    **dict.fromkeys(("transpose", torch.transpose, "permute", torch.permute, "mean"), lambda dims: dims),
    **dict.fromkeys(("unflatten", torch.unflatten, "flatten", "unbind", torch.unbind), lambda dims: dims[:1]),
}
_ELEMENTWISE = (
    *("contiguous", "float", "to", "type_as", "half", "bfloat16", "clone", "pow", "rsqrt"),
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, torch.add, torch.mul, torch.neg),
    *(torch.nn.functional.layer_norm, torch.nn.functional.rms_norm, torch.rms_norm, torch.nn.functional.dropout),
    *(torch.pow, torch.rsqrt),
)


class Half:
    """Copies of nodes for the second half of a batch, made where `graph` stands.

    A chain of ops that each work by sample is copied up to the projections, whose input is cut in two; where anything
    else comes in between, its result is cut.
    """

    def __init__(self, graph: Graph, batch: int) -> None:
        self.graph, self.batch = graph, batch
        self._made: dict[Node, Node] = {}

    def __call__(self, node: Node) -> Node:
        if node not in self._made:
            self._made[node] = self._copy(node) or self.cut(node)
        return self._made[node]

    def cut(self, node: Node) -> Node:
        return insert(self.graph, "__getitem__", insert(self.graph, "chunk", node, 2), 1)

    def _copy(self, node: Node) -> Node | None:
        args = self._args(node)
        if args is None or not self._batched(node) or writers(node):
            return None
        dims = _first(example(node)).dim()

        def half(operand: Node) -> Node:
            held = _first(example(operand))
            if not self._batched(operand) or (calls(node, *_ELEMENTWISE) and held.dim() != dims):
                return operand
            return self.cut(operand) if calls(node, *_PROJECTIONS) else self(operand)

        copied = insert(self.graph, node.target, *map_arg(args, half), **map_arg(node.kwargs, half))
        expected = (self.batch // 2, *_first(example(node)).shape[1:])
        if tuple(_first(example(copied)).shape) != expected:
            self.graph.erase_node(copied)
            return None
        copied.meta.update({name: value for name, value in node.meta.items() if name not in copied.meta})
        return copied

    def _args(self, node: Node) -> tuple[Any, ...] | None:
        """The arguments of a copy, before tensors are halved; None where it does not work by sample."""
        args = node.args
        if calls(node, *_PROJECTIONS, *_ELEMENTWISE):
            return args
        if calls(node, operator.getitem):  # of what `unbind` gave
            return args if isinstance(example(args[0]), tuple) else None
        if calls(node, torch.stack):
            dim = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
            return args if dim != 0 and dim != -_first(example(node)).dim() else None
        if calls(node, *_REARRANGED):
            return args if self._leaves_batch(node) else None
        if not calls(node, *_SHAPED) or node.kwargs:
            return None
        sizes = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
        if not sizes or not isinstance(sizes[0], int) or sizes[0] not in (self.batch, -1):
            return None
        return (args[0], (sizes[0] if sizes[0] == -1 else self.batch // 2, *sizes[1:]))

    @staticmethod
    def _leaves_batch(node: Node) -> bool:
        given = list(node.args[1:]) or [node.kwargs[name] for name in ("dim", "start_dim") if name in node.kwargs]
        if given and isinstance(given[0], (tuple, list)):
            given = list(given[0])
        count = _first(example(node.args[0])).dim()
        dims = [dim % count for dim in _REARRANGED[node.target](given or [0]) if not isinstance(dim, bool)]
        if calls(node, "permute", torch.permute):
            return bool(dims) and dims[0] == 0
        return 0 not in dims

    def _batched(self, node: Node) -> bool:
        held = _first(example(node))
        return isinstance(held, TENSORS) and held.dim() >= 3 and held.shape[0] == self.batch


def _first(held: Any) -> Any:
    return held[0] if isinstance(held, tuple) and held else held
