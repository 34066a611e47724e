"""An FX graph that grows by calls, and what it is made of: the primitives of an exported program of MLX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from tqc.ops import example, set_example
from tqc.torch_private import FakeTensorMode

Type = tuple[tuple[int, ...], torch.dtype]


class CaptureError(RuntimeError):
    """Why a program of MLX has no graph."""


@dataclass
class Primitive:
    """One call of an exported program.

    Attributes:
        arguments: what MLX gives, without names.
        inputs: nodes, or the numbers that scalar constants are.
        types: shapes and dtypes of the inputs.
        outputs: those of the results.
        near: path of the module that it was computed in or behind, as far as weights and markers tell.
    """

    name: str
    arguments: list[Any]
    inputs: list[Any]
    types: list[Type]
    outputs: list[Type]
    near: str

    @property
    def output(self) -> Type:
        return self.outputs[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.outputs[0][0]

    @property
    def dtype(self) -> torch.dtype:
        return self.outputs[0][1]

    def tensor(self, graph: Graph, index: int) -> Node:
        """An input as a node, of its whole shape."""
        value, (shape, dtype) = self.inputs[index], self.types[index]
        if isinstance(value, Node):
            return value
        return graph.call(torch.full, graph.sizes(shape), value, dtype=dtype, like=(shape, dtype))

    def __str__(self) -> str:
        types = ", ".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in self.types)
        return f"{self.name}({types}; arguments {str(self.arguments)[:400]}), behind {self.near or 'the inputs'}"


@dataclass
class Graph:
    """An FX graph that grows by calls, each with the example that its result has.

    Attributes:
        capacities: nodes by a size that occurs nowhere else: in lists of sizes that number means the third dimension of
            such a node, however long it is in a later call.
    """

    graph: torch.fx.Graph = field(default_factory=torch.fx.Graph)
    capacities: dict[int, Node] = field(default_factory=dict)
    fake: Any = field(default_factory=FakeTensorMode)
    _made: dict[tuple[Any, ...], Node] = field(default_factory=dict)

    def placeholder(self, path: str, like: Type, weight: bool = False) -> Node:
        node = self.graph.placeholder("".join(c if c.isalnum() else "_" for c in path))
        held = self._example(like)
        with self.fake:
            set_example(node, torch.nn.Parameter(held, requires_grad=False) if weight else held)
        node.meta["path"] = path
        return node

    def call(self, target: Any, *args: Any, like: Any, **kwargs: Any) -> Node:
        """Call a function, or a method by its name.

        Args:
            like: shape and dtype of the result, a list of them, or a number.
        """
        node = self.graph.create_node(
            "call_method" if isinstance(target, str) else "call_function", target, args, kwargs
        )
        if isinstance(like, list):
            set_example(node, tuple(self._example(part) for part in like))
        else:
            set_example(node, self._example(like) if isinstance(like, tuple) else like)
        return node

    def _example(self, like: Type) -> Any:
        with self.fake:
            return torch.empty(like[0], dtype=like[1])

    def scalar(self, value: Any, dtype: torch.dtype) -> Node:
        return self.call(torch.full, (), value, dtype=dtype, like=((), dtype))

    def once(self, target: Any, *args: Any, like: Any) -> Node:
        """A call that the graph has already, or a new one."""
        key = (target, *args)
        if key not in self._made:
            self._made[key] = self.call(target, *args, like=like)
        return self._made[key]

    def size(self, number: Any) -> Any:
        """A size, or the node that gives it where it is a capacity."""
        return self.once("size", self.capacities[number], 2, like=number) if self.is_capacity(number) else number

    def sizes(self, numbers: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(self.size(number) for number in numbers)

    def is_capacity(self, number: Any) -> bool:
        return number in self.capacities

    @staticmethod
    def shape(value: Any) -> tuple[int, ...]:
        return tuple(example(value).shape) if isinstance(value, Node) else ()

    @staticmethod
    def calls(value: Any, *targets: Any) -> bool:
        return isinstance(value, Node) and value.op in ("call_function", "call_method") and value.target in targets

    def is_broadcast(self, value: Any) -> bool:
        return self.calls(value, "expand")

    @staticmethod
    def is_weight(value: Any) -> bool:
        return isinstance(value, Node) and isinstance(example(value), torch.nn.Parameter)


def dtype_of(dtype: Any) -> torch.dtype:
    return getattr(torch, str(dtype).rsplit(".", 1)[-1].rstrip("_"))


def type_of(held: Any) -> Type:
    """Shape and dtype of an array, or of what a program says of one."""
    shape, dtype = held[1:] if isinstance(held, tuple) else (held.shape, held.dtype)
    return tuple(shape), dtype_of(dtype)
