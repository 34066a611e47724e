"""The argument lists of MLX's primitives that this package reads, and a check that this MLX gives the same.

`mx.export_function` gives the arguments of a primitive as a list without names, in an order that no document fixes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from tqc.mlx_trace.graph import CaptureError

# The versions whose lists these are. Another version is used if it gives the same.
VERSIONS = "0.32"

_X = mx.zeros((2, 3, 8))
_W = mx.zeros((4, 8))
_I = mx.array([[0, 1, 0]])
_ONE = mx.array([1])

# By primitive: programs, and the arguments that they must export.
LAYOUTS: dict[str, list[tuple[Callable[[], Any], list[Any]]]] = {
    "AddMM": [(lambda: mx.addmm(_W[0], _X[0], _W.T @ _W, alpha=2.0, beta=3.0), [2.0, 3.0])],
    "Arange": [(lambda: mx.arange(1, 9, 2), [1.0, 9.0, 2.0])],
    "ArgPartition": [(lambda: mx.argpartition(_X, 1, axis=2), [1, 2])],
    "ArgReduce": [
        (lambda: mx.argmin(_X, axis=2, keepdims=True), [0, 2]),
        (lambda: mx.argmax(_X, axis=2, keepdims=True), [1, 2]),
    ],
    "ArgSort": [(lambda: mx.argsort(_X, axis=1), [1])],
    "BitwiseBinary": [(lambda: _I & _I, [0]), (lambda: _I | _I, [1]), (lambda: _I ^ _I, [2]), (lambda: _I << _I, [3])],
    "Concatenate": [(lambda: mx.concatenate([_X, _X], axis=1), [1])],
    "Convolution": [
        (lambda: mx.conv1d(_X, mx.zeros((8, 2, 1)), 1, 3, 1, 8), [[1], [3], [3], [1], [1], 8, False]),
    ],
    "DynamicSlice": [(lambda: mx.slice(_X, _ONE, axes=(1,), slice_size=(2, 1, 8)), [[1], (2, 1, 8)])],
    "DynamicSliceUpdate": [(lambda: mx.slice_update(_X, _X[:, :1], _ONE, axes=(1,)), [[1]])],
    "ExpandDims": [(lambda: mx.expand_dims(_X, (1, 2)), [[1, 2]])],
    "Flatten": [(lambda: mx.flatten(_X, 0, 1), [0, 1])],
    "Gather": [(lambda: mx.take(_W, _I, axis=0), [[0], (1, 8)])],
    "GatherAxis": [(lambda: mx.take_along_axis(_W, _I, axis=1), [1])],
    "GatherMM": [
        (lambda: mx.gather_mm(_X, mx.zeros((2, 8, 4)), rhs_indices=_I[0, :2], sorted_indices=True), [False, True]),
    ],
    "GatherQMM": [
        (
            lambda: mx.gather_qmm(_quantized_x(), *_quantized(2), rhs_indices=_ONE, group_size=32, bits=4),
            [32, 4, 0, True, False, False],
        ),
    ],
    "Log": [(lambda: mx.log2(_X), [0]), (lambda: mx.log10(_X), [1]), (lambda: mx.log(_X), [2])],
    "Pad": [(lambda: mx.pad(_X, [(0, 0), (1, 2), (0, 0)]), [[0, 1, 2], (0, 1, 0), (0, 2, 0)])],
    "Partition": [(lambda: mx.partition(_X, 1, axis=2), [1, 2])],
    "QuantizedMatmul": [
        (
            lambda: mx.quantized_matmul(_quantized_x(), *(a[0] for a in _quantized(1)), group_size=32, bits=4),
            [32, 4, 0, True],
        ),
    ],
    "Reduce": [
        (lambda: mx.all(_X, (1,), keepdims=True), [0, [1]]),
        (lambda: mx.any(_X, (1,), keepdims=True), [1, [1]]),
        (lambda: mx.sum(_X, (1, 2), keepdims=True), [2, [1, 2]]),
        (lambda: mx.prod(_X, (1,), keepdims=True), [3, [1]]),
        (lambda: mx.min(_X, (1,), keepdims=True), [4, [1]]),
        (lambda: mx.max(_X, (1,), keepdims=True), [5, [1]]),
    ],
    "Scan": [
        (lambda: mx.cumsum(_X, axis=1, reverse=True, inclusive=False), [2, 1, True, False]),
        (lambda: mx.cumprod(_X, axis=1), [3, 1, False, True]),
    ],
    "Scatter": [(lambda: _W.at[_I[0]].add(1.0), [2, [0]])],
    "ScatterAxis": [(lambda: mx.put_along_axis(_W, _I, mx.array(1.0), axis=1), [1, 1])],
    "Slice": [(lambda: _X[:, 1:3, ::2], [(0, 1, 0), (2, 3, 8), (1, 1, 2)])],
    "SliceUpdate": [
        (lambda: _X.at[..., :2].add(1.0), [2, (0, 0, 0), (2, 3, 2), (1, 1, 1)]),
        (lambda: _X.at[..., :2].multiply(2.0), [3, (0, 0, 0), (2, 3, 2), (1, 1, 1)]),
        (lambda: _assigned(_X + 0), [4, (0, 1, 0), (2, 2, 8), (1, 1, 1)]),
    ],
    "Split": [(lambda: mx.split(_X, [2, 5], axis=2), [(2, 5), 2])],
    "Sqrt": [(lambda: mx.sqrt(_X), [False]), (lambda: mx.rsqrt(_X), [True])],
    "Squeeze": [(lambda: mx.squeeze(_I, 0), [[0]])],
    "Transpose": [(lambda: mx.transpose(_X, (2, 0, 1)), [[2, 0, 1]])],
    "Unflatten": [(lambda: mx.unflatten(_X, 2, (2, 4)), [2, (2, 4)])],
}


def _assigned(x: mx.array) -> mx.array:
    x[:, 1:2] = 1.0
    return x


def _quantized_x() -> mx.array:
    return mx.zeros((1, 1, 32))


def _quantized(count: int) -> tuple[mx.array, ...]:
    return mx.zeros((count, 4, 4), mx.uint32), mx.zeros((count, 4, 1)), mx.zeros((count, 4, 1))


@functools.cache
def check() -> None:
    """Compare what tiny programs export with LAYOUTS.

    Raises:
        CaptureError: if this MLX gives other lists.
    """
    faults = []
    for name, programs in LAYOUTS.items():
        for program, expected in programs:
            records: list[dict[str, Any]] = []
            mx.export_function(records.append, program)
            found = [record["arguments"] for record in records if record.get("name") == name]
            if expected not in found:
                faults.append(f"{name} has arguments {found}, not {expected}")
    if faults:
        raise CaptureError(f"MLX {mx.__version__} exports programs in another way than {VERSIONS}: {'; '.join(faults)}")
