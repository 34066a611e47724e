"""Writes ONNX functions as arithmetic on values: `(x @ r) * 2.0` adds a MatMul, a Constant and a Mul."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import FunctionProto, NodeProto, helper, numpy_helper

DOMAIN = "tqc"
OPSET = 24
# Opset of the domain: a change of what a function takes or gives makes a new one.
DOMAIN_VERSION = 1


class Value:
    """A tensor inside of a function. Numbers in arithmetic with it become float32 or, if whole, int64 constants."""

    def __init__(self, body: Body, name: str) -> None:
        self.body, self.name = body, name

    def __add__(self, other: Any) -> Value:
        return self.body.op("Add", self, other)

    def __radd__(self, other: Any) -> Value:
        return self.body.op("Add", other, self)

    def __sub__(self, other: Any) -> Value:
        return self.body.op("Sub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return self.body.op("Sub", other, self)

    def __mul__(self, other: Any) -> Value:
        return self.body.op("Mul", self, other)

    def __truediv__(self, other: Any) -> Value:
        return self.body.op("Div", self, other)

    def __mod__(self, other: Any) -> Value:
        return self.body.op("Mod", self, other)

    def __matmul__(self, other: Any) -> Value:
        return self.body.op("MatMul", self, other)

    def __lt__(self, other: Any) -> Value:
        return self.body.op("Less", self, other)

    def __gt__(self, other: Any) -> Value:
        return self.body.op("Greater", self, other)

    def __or__(self, other: Any) -> Value:
        return self.body.op("BitwiseOr", self, other)


class Body:
    """The nodes of one function, in order.

    Sizes and positions are int64 tensors of one element; `axis` arguments count from the front or, negative, the back.
    """

    def __init__(self, name: str) -> None:
        self.name, self.nodes = name, list[NodeProto]()
        self.inputs: list[str] = []
        self._count = 0
        self._constants: dict[Any, Value] = {}

    def input(self, name: str) -> Value:
        self.inputs.append(name)
        return Value(self, name)

    def fresh(self) -> Value:
        self._count += 1
        return Value(self, f"v{self._count}")

    def op(self, kind: str, *operands: Any, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """Add a node; None stands for an optional input that is not given."""
        names = ["" if operand is None else self.value(operand).name for operand in operands]
        made = [self.fresh() for _ in range(outputs)]
        node = helper.make_node(kind, names, [value.name for value in made], domain=domain, **attributes)
        self.nodes.append(node)
        return made[0] if outputs == 1 else tuple(made)

    def value(self, held: Any) -> Value:
        if isinstance(held, Value):
            return held
        return self.constant(held, np.int64 if isinstance(held, int) else np.float32)

    def constant(self, held: Any, dtype: Any) -> Value:
        array = np.asarray(held, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            made = self.fresh()
            tensor = numpy_helper.from_array(array)
            self.nodes.insert(0, helper.make_node("Constant", [], [made.name], value=tensor))
            self._constants[key] = made
        return self._constants[key]

    def index(self, held: Any) -> Value:
        """A position as an int64 of one element."""
        return held if isinstance(held, Value) else self.constant([held], np.int64)

    def ints(self, *held: int) -> Value:
        return self.constant(held, np.int64)

    def cast(self, x: Value, dtype: Any) -> Value:
        return self.op("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def float(self, x: Value) -> Value:
        return self.cast(x, np.float32)

    def like(self, x: Value, other: Value) -> Value:
        """`x` in the dtype of `other`."""
        return self.op("CastLike", x, other)

    def slice(self, x: Value, start: Any, end: Any, axis: int, step: Any = 1) -> Value:
        return self.op("Slice", x, self.index(start), self.index(end), self.ints(axis), self.index(step))

    def size(self, x: Value, axis: int) -> Value:
        return self.op("Shape", x, start=axis, end=axis + 1)

    def reshape(self, x: Value, *sizes: Any) -> Value:
        """0 keeps a size, -1 is what is left; others are numbers or values."""
        if all(isinstance(size, int) for size in sizes):
            return self.op("Reshape", x, self.ints(*sizes))
        return self.op("Reshape", x, self.op("Concat", *map(self.index, sizes), axis=0))

    def concat(self, *parts: Value, axis: int) -> Value:
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=axis)

    def arange(self, start: Any, end: Any) -> Value:
        """int64 [end - start], empty where that is negative."""
        first, last = (self.op("Squeeze", self.index(at), self.ints(0)) for at in (start, end))
        return self.op("Range", first, last, self.constant(1, np.int64))

    def gather(self, x: Value, index: Value, axis: int) -> Value:
        return self.op("Gather", x, index, axis=axis)

    def transpose(self, x: Value) -> Value:
        """The last two of four axes swapped."""
        return self.op("Transpose", x, perm=[0, 1, 3, 2])

    def reduce(self, kind: str, x: Value, *axes: int, keep: bool = True) -> Value:
        return self.op(f"Reduce{kind}", x, self.ints(*axes), keepdims=int(keep))

    def where(self, condition: Value, x: Any, y: Any) -> Value:
        return self.op("Where", condition, x, y)

    def max(self, *operands: Any) -> Value:
        return self.op("Max", *operands)

    def min(self, *operands: Any) -> Value:
        return self.op("Min", *operands)

    def floor_div(self, x: Value, by: int) -> Value:
        """Of numbers that are not negative."""
        return self.op("Div", x, self.ints(by))

    def shift(self, x: Value, bits: int, direction: str) -> Value:
        if not bits:
            return x
        return self.op("BitShift", x, self.constant(bits, np.uint8), direction=direction)

    def mask(self, x: Value, bits: int) -> Value:
        return self.op("BitwiseAnd", x, self.constant(2**bits - 1, np.uint8))

    def scatter(self, past: Value, update: Value, at: Value, batch: Value, circular: bool = False) -> Value:
        """`past` with `update` at index `at` of axis -2, in place where a host binds both ends to one buffer."""
        everywhere = self.op("Expand", at, batch)
        return self.op("TensorScatter", past, update, everywhere, axis=-2, mode="circular" if circular else "linear")

    def branch(
        self, condition: Value, then: Callable[[], Sequence[Value]], other: Callable[[], Sequence[Value]]
    ) -> Any:
        """`then()` or `other()`, as many values each; only one of them is computed."""
        graphs, count = {}, 0
        for name, function in (("then_branch", then), ("else_branch", other)):
            with self._nested() as nodes:
                made = [self.op("Identity", value) for value in function()]
            outputs = [helper.make_empty_tensor_value_info(value.name) for value in made]
            graphs[name], count = helper.make_graph(nodes, name, [], outputs), len(made)
        scalar = self.op("Squeeze", condition)
        return self.op("If", scalar, outputs=count, **graphs)

    @contextlib.contextmanager
    def _nested(self) -> Iterator[list[NodeProto]]:
        """Nodes of a subgraph; constants stay where they were made first, so those of a branch are its own."""
        outer, constants = self.nodes, self._constants
        self.nodes, self._constants = [], dict(constants)
        try:
            yield self.nodes
        finally:
            self.nodes, self._constants = outer, constants

    def function(self, outputs: dict[str, Value], calls: bool = False) -> FunctionProto:
        """The function; `outputs` names what it returns, each a value of its own."""
        made = {name for node in self.nodes for name in node.output}
        for name, value in outputs.items():
            if value.name in made:  # no copy between the node that makes it and the output
                _rename(self.nodes, value.name, name)
            else:
                self.nodes.append(helper.make_node("Identity", [value.name], [name]))
        imports = [helper.make_opsetid("", OPSET)]
        if calls:
            imports.append(helper.make_opsetid(DOMAIN, DOMAIN_VERSION))
        return helper.make_function(DOMAIN, self.name, self.inputs, list(outputs), self.nodes, imports)


def _rename(nodes: Iterable[NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename(attribute.g.node, old, new)


def call(body: Body, function: FunctionProto, *operands: Any) -> Any:
    """A node that calls another function of the domain."""
    return body.op(function.name, *operands, outputs=len(function.output), domain=DOMAIN)


__all__ = ["DOMAIN", "DOMAIN_VERSION", "OPSET", "Body", "Value", "call", "onnx"]
