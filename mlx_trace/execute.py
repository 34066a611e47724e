"""A graph of torch functions as a program on MLX arrays."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import torch
from torch.fx import GraphModule, Node

from tqc.mlx_trace.arrays import array_of
from tqc.mlx_trace.realize import Call
from tqc.mlx_trace.table import FUNCTIONS, METHODS


class Unsupported(RuntimeError):
    """What a graph calls and MLX, or this table, has not."""


class Executor:
    """A graph module, callable with arrays: it gives what the graph returns. It may be given to `mx.compile`.

    Args:
        gm: calls of the functions in FUNCTIONS and the methods in METHODS. Writing in place is understood for an
            input, which gives the new array from there on.
        weights: arrays that placeholders stand for, by the path in their `meta["path"]` or by their name; the others
            are arguments of a call, in order.

    Raises:
        Unsupported: at once, naming each function that is in no table.
    """

    def __init__(self, gm: GraphModule, weights: dict[str, mx.array] | None = None) -> None:
        weights = weights or {}
        self.inputs: list[Node] = []
        self.held: dict[Node, Any] = {}
        self.steps: list[tuple[Node, Callable[..., Any]]] = []
        lacking = set()
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                path = node.meta.get("path", node.target)
                if path in weights:
                    self.held[node] = weights[path]
                else:
                    self.inputs.append(node)
            elif node.op == "get_attr":
                self.held[node] = array_of(operator.attrgetter(str(node.target))(gm))
            elif node.op == "output":
                self.result = node.args[0]
            else:
                table: dict[Any, Callable[..., Any]] = METHODS if node.op == "call_method" else FUNCTIONS
                if isinstance(node.target, Call):
                    self.steps.append((node, node.target))
                elif node.target not in table:
                    lacking.add(str(node.target if isinstance(node.target, str) else _name(node.target)))
                else:
                    self.steps.append((node, table[node.target]))
        if lacking:
            raise Unsupported(f"MLX has nothing for {', '.join(sorted(lacking))}")

    def __call__(self, *arrays: Any) -> Any:
        if len(arrays) != len(self.inputs):
            raise TypeError(f"the graph takes {len(self.inputs)} arrays, got {len(arrays)}")
        env = dict(self.held)
        env.update(zip(self.inputs, arrays, strict=True))
        for node, function in self.steps:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            try:
                made = function(*args, **kwargs)
            except (TypeError, ValueError) as error:
                raise Unsupported(f"{node.name}, a call of {_name(node.target)}: {error}") from error
            if node.target is operator.setitem:
                env[node.args[0]] = made
            env[node] = made
        return torch.fx.node.map_arg(self.result, env.__getitem__)


def _name(target: Any) -> str:
    return target if isinstance(target, str) else f"{target.__module__}.{target.__name__}"
