"""What an op of the dialect is. One file of this folder holds one op:

    @op(consumes=("cache",))
    def extend(cache: Planes, new: Tensor) -> Planes:       the schema and the reference, which *is* the meaning
    @extend.register_fake
    def _(cache: PackedValue, new: Tensor) -> PackedValue:  the type of the result
    @extend.register_traceable
    def _(cache: Planes, new: Tensor) -> Planes:            the same in static shapes, without a look at data

An op stands in a graph as the target of a node. It is functional: it writes into no operand, and what it makes is new.
A graph with such nodes belongs to no target; each of them realizes it in its own way.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tqc.ops.value import PackedValue, Planes, example

_MATCHES: dict[Any, tuple[type, ...]] = {
    Planes: (PackedValue,),
    int: (int, torch.SymInt),
    float: (float, int, torch.SymFloat),
}


class Op:
    """An op: callable as its reference, and the target of the nodes that stand for it.

    Attributes:
        consumes: arguments that nothing may use behind the op, so that a target may write in place.
        fake: examples of the arguments -> example of the result.
        traceable: the reference with static shapes (pages hold the capacity) and nothing read on the host, in torch ops
            that ONNX and MLX can express; None where there is none.
    """

    def __init__(self, reference: Callable[..., Any], consumes: tuple[str, ...]) -> None:
        self.reference, self.consumes = reference, consumes
        self.fake: Callable[..., Any] | None = None
        self.traceable: Callable[..., Any] | None = None
        self.signature = inspect.signature(reference)
        self.__name__ = self.__qualname__ = reference.__name__
        self.__doc__ = reference.__doc__
        self.__module__ = "tqc.ops"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.reference(*args, **kwargs)

    def __repr__(self) -> str:
        return f"tqc.ops.{self.__name__}"

    @property
    def schema(self) -> str:
        return f"{self.__name__}{self.signature}".replace("'", "").replace("Planes", "Packed")

    def register_fake(self, function: Callable[..., Any]) -> None:
        self.fake = function

    def register_traceable(self, function: Callable[..., Any]) -> None:
        self.traceable = function

    def arguments(self, node: Node) -> dict[str, Any]:
        """Arguments of a node by name, defaults included.

        Raises:
            TypeError: if they do not fit the signature.
        """
        bound = self.signature.bind(*node.args, **node.kwargs)
        bound.apply_defaults()
        return bound.arguments

    def why_not(self, node: Node) -> str | None:
        """Why a node does not have this op's types, or None."""
        try:
            arguments = self.arguments(node)
        except TypeError as error:
            return str(error)
        hints = typing.get_type_hints(self.reference)
        for name, argument in arguments.items():
            if isinstance(argument, Node) and example(argument) is None:
                return f"{name} has no example"
            wanted = typing.get_args(hints[name]) or (hints[name],)
            allowed = [kind for hint in wanted for kind in _MATCHES.get(hint, (hint,))]
            if not isinstance(example(argument), tuple(allowed)):
                kinds = " or ".join(getattr(kind, "__name__", str(kind)) for kind in wanted).replace("Planes", "Packed")
                return f"{name} must be {kinds}, got {type(example(argument)).__name__}"
        try:
            made = self.fake_of(node)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            return str(error)
        return _why_not_same(made, example(node))

    def fake_of(self, node: Node) -> Any:
        """The example of a node from those of its operands; to be called in the graph's fake mode, if it has one."""
        assert self.fake
        return self.fake(**{name: example(operand) for name, operand in self.arguments(node).items()})


def _why_not_same(made: Any, recorded: Any) -> str | None:
    if isinstance(made, tuple) and isinstance(recorded, tuple):
        if len(made) != len(recorded):
            return f"it must have {len(made)} results, got {len(recorded)}"
        return next(filter(None, map(_why_not_same, made, recorded)), None)
    for kind in (PackedValue, Tensor):
        if isinstance(made, kind) and isinstance(recorded, kind):
            parts = ("shape", "dtype", "device", *(("fmt",) if kind is PackedValue else ()))
            for part in parts:
                a, b = getattr(made, part), getattr(recorded, part)
                if _differ(a, b) if part == "shape" else a != b:
                    return f"its {part} must be {a}, got {b}"
            return None
    if type(made) is not type(recorded):
        return f"its result must be {type(made).__name__}, got {type(recorded).__name__}"
    return None


def _differ(a: torch.Size, b: torch.Size) -> bool:
    return len(a) != len(b) or any(statically_known_true(x != y) for x, y in zip(a, b, strict=True))


def op(consumes: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Make an op of the function that is its reference."""
    return lambda reference: Op(reference, consumes)
