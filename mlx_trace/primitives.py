"""What each primitive of MLX is in a graph of torch: one table. `layouts.py` checks the lists of arguments it reads."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from tqc.mlx_trace import functions
from tqc.mlx_trace.graph import CaptureError, Graph, Primitive

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs,
    "Add": operator.add,
    "ArcCos": torch.arccos,
    "ArcSin": torch.arcsin,
    "ArcTan": torch.arctan,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Divide": operator.truediv,
    "Erf": torch.erf,
    "ErfInv": torch.erfinv,
    "Exp": torch.exp,
    "Expm1": torch.expm1,
    "Floor": torch.floor,
    "FloorDivide": operator.floordiv,
    "Greater": operator.gt,
    "GreaterEqual": operator.ge,
    "Less": operator.lt,
    "LessEqual": operator.le,
    "Log1p": torch.log1p,
    "LogAddExp": torch.logaddexp,
    "LogicalAnd": torch.logical_and,
    "LogicalNot": torch.logical_not,
    "LogicalOr": torch.logical_or,
    "Maximum": torch.maximum,
    "Minimum": torch.minimum,
    "Multiply": operator.mul,
    "Negative": operator.neg,
    "NotEqual": operator.ne,
    "Power": operator.pow,
    "Remainder": operator.mod,
    "Round": torch.round,
    "Select": torch.where,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Square": torch.square,
    "Subtract": operator.sub,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
_BITWISE = (operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift)
_REDUCE = (torch.all, torch.any, torch.sum, torch.prod, torch.amin, torch.amax)
_SCATTER = ("max", "min", "sum", "prod", "none")
_SCAN = ("max", "min", "sum", "prod")
_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


def translate(graph: Graph, p: Primitive) -> list[Any]:
    """Nodes of what a primitive makes.

    Raises:
        CaptureError: for a primitive that is not in the table, or arguments it cannot be told from.
    """
    if p.name in _ELEMENTWISE:
        return [_elementwise(graph, _ELEMENTWISE[p.name], p)]
    if p.name not in _TABLE:
        raise CaptureError(f"the primitive {p} is not known")
    made = _TABLE[p.name](graph, p)
    return made if isinstance(made, list) else [made]


def _elementwise(graph: Graph, function: Callable[..., Any], p: Primitive) -> Node:
    """Operands without the broadcasts that torch makes by itself; numbers as they are where torch takes them."""
    shapes = []
    operands: list[Any] = []
    for index in range(len(p.inputs)):
        value = p.inputs[index]
        takes_numbers = index if function is torch.where else function.__module__ == "_operator"
        if not isinstance(value, Node) and not takes_numbers:
            value = graph.scalar(value, p.types[index][1])
        while graph.is_broadcast(value):
            value = value.args[0]
        operands.append(value)
        shapes.append(graph.shape(value))
    if tuple(torch.broadcast_shapes(*shapes)) != p.shape:
        operands = [p.tensor(graph, index) for index in range(len(p.inputs))]
    if not any(isinstance(operand, Node) for operand in operands[-2:]):
        operands[-1] = graph.scalar(operands[-1], p.types[-1][1])
    return graph.call(function, *operands, like=p.output)


def _matmul(graph: Graph, p: Primitive) -> Node:
    x, weight = p.tensor(graph, 0), p.tensor(graph, 1)
    if graph.calls(weight, torch.permute) and tuple(weight.args[1]) == (1, 0) and graph.is_weight(weight.args[0]):
        return _linear(graph, p, x, weight.args[0])
    operands = [held.args[0] if graph.is_broadcast(held) else held for held in (x, weight)]
    batches = [graph.shape(held)[:-2] for held in operands]
    if tuple(torch.broadcast_shapes(*batches)) != p.shape[:-2]:
        operands = [x, weight]
    return graph.call(torch.matmul, *operands, like=p.output)


def _addmm(graph: Graph, p: Primitive) -> Node:
    alpha, beta = p.arguments
    x, weight, added = (p.tensor(graph, index) for index in range(3))
    bias = added.args[0] if graph.is_broadcast(added) else added
    transposed = graph.calls(weight, torch.permute) and tuple(weight.args[1]) == (1, 0)
    if (alpha, beta) == (1.0, 1.0) and transposed and graph.is_weight(weight.args[0]) and len(graph.shape(bias)) == 1:
        return _linear(graph, p, x, weight.args[0], bias)
    made = graph.call(torch.matmul, x, weight, like=p.output)
    made = made if alpha == 1.0 else graph.call(operator.mul, made, alpha, like=p.output)
    added = added if beta == 1.0 else graph.call(operator.mul, added, beta, like=p.output)
    return graph.call(operator.add, made, added, like=p.output)


def _linear(graph: Graph, p: Primitive, x: Node, *weights: Node) -> Node:
    """`linear` of what was flattened for it: the flattening comes behind, where the next reshape takes it away."""
    source = x.args[0] if graph.calls(x, torch.flatten, torch.reshape) else x
    shape = graph.shape(source)
    if source is x or len(p.shape) != 2 or shape[-1] != graph.shape(x)[-1]:
        return graph.call(F.linear, x, *weights, like=p.output)
    made = graph.call(F.linear, source, *weights, like=((*shape[:-1], p.shape[-1]), p.dtype))
    return graph.call(torch.flatten, made, 0, len(shape) - 2, like=p.output)


def _reshape(graph: Graph, p: Primitive, target: Callable[..., Any], *how: Any) -> Node:
    source = p.tensor(graph, 0)
    before = source.args[0] if graph.calls(source, torch.flatten, torch.unflatten, torch.reshape) else None
    if before is not None and graph.shape(before) == p.shape:
        return before
    if graph.shape(source) == p.shape:
        return source
    return graph.call(target, source, *how, like=p.output)


def _expand_dims(graph: Graph, p: Primitive) -> Node:
    made, shape = p.tensor(graph, 0), list(p.types[0][0])
    for axis in sorted(p.arguments[0]):
        shape.insert(axis, 1)
        made = graph.call(torch.unsqueeze, made, axis, like=(tuple(shape), p.dtype))
    return made


def _squeeze(graph: Graph, p: Primitive) -> Node:
    source, axes = p.tensor(graph, 0), tuple(p.arguments[0])
    if graph.calls(source, torch.unsqueeze) and axes == (source.args[1],):
        return source.args[0]
    return graph.call(torch.squeeze, source, axes, like=p.output)


def _broadcast(graph: Graph, p: Primitive) -> Any:
    value = p.inputs[0]
    if not isinstance(value, Node) or graph.shape(value) == p.shape:
        return value
    return graph.call("expand", value, graph.sizes(p.shape), like=p.output)


def _slices(graph: Graph, p: Primitive, start: Any, stop: Any, step: Any) -> tuple[slice, ...]:
    made = []
    for size, first, last, by in zip(p.types[0][0], start, stop, step, strict=True):
        whole = (first, last, by) == (0, size, 1)
        if not whole and graph.is_capacity(size):
            raise CaptureError(f"a part of a cache is taken by {p}")
        made.append(slice(None) if whole else slice(first, last, None if by == 1 else by))
    return tuple(made)


def _slice(graph: Graph, p: Primitive) -> Node:
    if any(step < 0 for step in p.arguments[2]):
        raise CaptureError(f"a negative step in {p}")
    return graph.call(operator.getitem, p.tensor(graph, 0), _slices(graph, p, *p.arguments), like=p.output)


def _slice_update(graph: Graph, p: Primitive) -> Node:
    reduce, *where = p.arguments
    x, update = p.tensor(graph, 0), p.tensor(graph, 1)
    return graph.call(functions.slice_update, x, update, _slices(graph, p, *where), _SCATTER[reduce], like=p.output)


def _split(graph: Graph, p: Primitive) -> list[Node]:
    axis = p.arguments[1]
    if graph.is_capacity(p.types[0][0][axis]):
        raise CaptureError(f"a part of a cache is taken by {p}")
    sizes = [shape[axis] for shape, _ in p.outputs]
    parts = graph.call(torch.split, p.tensor(graph, 0), sizes, axis, like=p.outputs)
    return [graph.call(operator.getitem, parts, index, like=like) for index, like in enumerate(p.outputs)]


def _gather(graph: Graph, p: Primitive) -> Node:
    axes, sizes = p.arguments
    x, *indices = (p.tensor(graph, index) for index in range(len(p.inputs)))
    shape = p.types[0][0]
    if axes == [0] and len(shape) == 2 and tuple(sizes) == (1, shape[1]):
        rows = graph.call(F.embedding, indices[0], x, like=((*p.types[1][0], shape[1]), p.dtype))
        return graph.call(torch.unsqueeze, rows, len(p.types[1][0]), like=p.output)
    return graph.call(functions.gather, x, indices, axes, graph.sizes(sizes), like=p.output)


def _scatter(graph: Graph, p: Primitive) -> Node:
    reduce, axes = p.arguments
    x, *indices, updates = (p.tensor(graph, index) for index in range(len(p.inputs)))
    return graph.call(functions.scatter, x, indices, updates, axes, _SCATTER[reduce], like=p.output)


def _scatter_axis(graph: Graph, p: Primitive) -> Node:
    function = (torch.scatter_add, torch.scatter)[p.arguments[0]]
    x, index, updates = (p.tensor(graph, at) for at in range(3))
    return graph.call(function, x, p.arguments[1], index, updates, like=p.output)


def _pad(graph: Graph, p: Primitive) -> Node:
    axes, low, high = p.arguments
    dims = len(p.shape)
    pairs = {axis % dims: (low[at], high[at]) for at, axis in enumerate(axes)}
    flat = [number for dim in reversed(range(dims)) for number in pairs.get(dim, (0, 0))]
    if isinstance(p.inputs[1], Node):
        raise CaptureError(f"padded with a computed value: {p}")
    return graph.call(F.pad, p.tensor(graph, 0), flat, "constant", p.inputs[1], like=p.output)


def _arange(graph: Graph, p: Primitive) -> Node:
    bounds = p.arguments if p.dtype.is_floating_point else [int(bound) for bound in p.arguments]
    start, stop, step = graph.sizes(bounds)
    if p.dtype.is_floating_point or p.dtype.is_signed:
        return graph.call(torch.arange, start, stop, step, dtype=p.dtype, like=p.output)
    signed = graph.call(torch.arange, start, stop, step, dtype=torch.int32, like=(p.shape, torch.int32))
    return graph.call("to", signed, p.dtype, like=p.output)  # torch has no unsigned one


def _reduce(graph: Graph, p: Primitive) -> Node:
    kind, axes = p.arguments
    dims: Any = axes[0] if kind == 3 else tuple(axes)
    if kind == 3 and len(axes) > 1:
        raise CaptureError(f"a product over several axes: {p}")
    return graph.call(_REDUCE[kind], p.tensor(graph, 0), dim=dims, keepdim=True, like=p.output)


def _scan(graph: Graph, p: Primitive) -> Node:
    kind, axis, reverse, inclusive = p.arguments
    if _SCAN[kind : kind + 1] not in (("sum",), ("prod",)):
        raise CaptureError(f"a scan that is no sum or product: {p}")
    return graph.call(functions.scan, p.tensor(graph, 0), _SCAN[kind], axis, reverse, inclusive, like=p.output)


def _convolution(graph: Graph, p: Primitive) -> Node:
    stride, low, high, dilation, input_dilation, groups, flip = p.arguments
    how = (stride, [low, high], dilation, input_dilation, groups, flip)
    return graph.call(functions.convolution, p.tensor(graph, 0), p.tensor(graph, 1), *how, like=p.output)


def _quantized_matmul(graph: Graph, p: Primitive) -> Node:
    group_size, bits, mode, transpose = p.arguments
    tensors = [p.tensor(graph, index) for index in range(len(p.inputs))]
    biases = tensors[3] if len(tensors) > 3 else None
    how = (transpose, group_size, bits, _MODES[mode])
    return graph.call(functions.quantized_matmul, *tensors[:3], biases, *how, like=p.output)


def _gather_qmm(graph: Graph, p: Primitive) -> Node:
    group_size, bits, mode, transpose, left_sorted, right_sorted = p.arguments
    x, weight, scales, *biases, left, right = (p.tensor(graph, index) for index in range(len(p.inputs)))
    how = (transpose, group_size, bits, _MODES[mode], right_sorted)
    held = biases[0] if biases else None
    return graph.call(functions.gather_qmm, x, weight, scales, held, left, right, *how, like=p.output)


def _of_tensors(function: Any) -> Callable[[Graph, Primitive], Node]:
    """A function of tensors, then all arguments in their order."""
    return lambda graph, p: graph.call(
        function, *(p.tensor(graph, index) for index in range(len(p.inputs))), *p.arguments, like=p.output
    )


def _binary(choose: Callable[[list[Any]], Any]) -> Callable[[Graph, Primitive], Node]:
    return lambda graph, p: _elementwise(graph, choose(p.arguments), p)


def _unchanged(graph: Graph, p: Primitive) -> list[Any]:
    return list(p.inputs[: len(p.outputs)])


def _equal(arguments: list[Any]) -> Any:
    if arguments != [False]:
        raise CaptureError("a comparison where NaN equals NaN")
    return operator.eq


_TABLE: dict[str, Callable[[Graph, Primitive], Any]] = {
    "AddMM": _addmm,
    "Arange": _arange,
    "ArgPartition": _of_tensors(functions.argpartition),
    "ArgReduce": lambda graph, p: graph.call(
        (torch.argmin, torch.argmax)[p.arguments[0]], p.tensor(graph, 0), p.arguments[1], True, like=p.output
    ),
    "ArgSort": _of_tensors(torch.argsort),
    "AsType": lambda graph, p: graph.call("to", p.tensor(graph, 0), p.dtype, like=p.output),
    "BitwiseBinary": _binary(lambda arguments: _BITWISE[arguments[0]]),
    "Broadcast": _broadcast,
    "Concatenate": lambda graph, p: graph.call(
        torch.cat, [p.tensor(graph, index) for index in range(len(p.inputs))], p.arguments[0], like=p.output
    ),
    "Convolution": _convolution,
    "Copy": _unchanged,
    "Depends": _unchanged,
    "DivMod": lambda graph, p: [
        graph.call(function, p.tensor(graph, 0), p.tensor(graph, 1), like=like)
        for function, like in zip((operator.floordiv, operator.mod), p.outputs, strict=True)
    ],
    "DynamicSlice": _of_tensors(functions.dynamic_slice),
    "DynamicSliceUpdate": _of_tensors(functions.dynamic_slice_update),
    "Equal": _binary(_equal),
    "ExpandDims": _expand_dims,
    "Flatten": lambda graph, p: _reshape(graph, p, torch.flatten, *p.arguments),
    "Full": lambda graph, p: p.tensor(graph, 0),
    "Gather": _gather,
    "GatherAxis": _of_tensors(torch.take_along_dim),
    "GatherMM": _of_tensors(functions.gather_mm),
    "GatherQMM": _gather_qmm,
    "Log": _binary(lambda arguments: (torch.log2, torch.log10, torch.log)[arguments[0]]),
    "LogSumExp": lambda graph, p: graph.call(torch.logsumexp, p.tensor(graph, 0), -1, True, like=p.output),
    "Matmul": _matmul,
    "Pad": _pad,
    "Partition": _of_tensors(functions.partition),
    "QuantizedMatmul": _quantized_matmul,
    "Reduce": _reduce,
    "Reshape": lambda graph, p: _reshape(graph, p, torch.reshape, graph.sizes(p.arguments[0])),
    "Scan": _scan,
    "Scatter": _scatter,
    "ScatterAxis": _scatter_axis,
    "Slice": _slice,
    "SliceUpdate": _slice_update,
    "Softmax": lambda graph, p: graph.call(torch.softmax, p.tensor(graph, 0), -1, like=p.output),
    "Sort": _of_tensors(functions.sort),
    "Split": _split,
    "Sqrt": _binary(lambda arguments: torch.rsqrt if arguments[0] else torch.sqrt),
    "Squeeze": _squeeze,
    "StopGradient": _unchanged,
    "Transpose": lambda graph, p: graph.call(torch.permute, p.tensor(graph, 0), tuple(p.arguments[0]), like=p.output),
    "Unflatten": lambda graph, p: _reshape(graph, p, torch.unflatten, p.arguments[0], graph.sizes(p.arguments[1])),
    "View": lambda graph, p: graph.call("view", p.tensor(graph, 0), p.dtype, like=p.output),
}
