"""What MLX has for each function and method of torch that a graph may call: one table."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
import torch.nn.functional as F

from tqc import ops
from tqc.mlx_trace import functions
from tqc.mlx_trace.arrays import dtype_of
from tqc.torch_private import LOG_USAGE


def _attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    attn_mask: mx.array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    sinks: mx.array | None = None,
) -> mx.array:
    if dropout_p:
        raise ValueError(f"dropout_p is {dropout_p}")
    length, columns = query.shape[2], key.shape[2]
    mask: Any = attn_mask
    if is_causal:
        # MLX aligns it to the end, torch to the start.
        mask = "causal" if length == columns else mx.arange(columns) <= mx.arange(length)[:, None]
    elif mask is not None and mask.dtype != mx.bool_:
        mask = mask.astype(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, mask=mask, sinks=sinks)


def dense_attention(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    attn_mask: mx.array | None = None,
    sinks: mx.array | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    is_causal: bool = False,
) -> mx.array:
    """`tqc.ops.attention`: MLX has all of it but the softcap."""
    if not softcap:
        return _attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale, sinks=sinks)
    if sinks is not None or is_causal:
        raise ValueError("a softcap together with sinks or is_causal")
    batch, heads, length, head_dim = query.shape
    query = (query * scale).reshape(batch, key.shape[1], -1, length, head_dim)
    scores = query @ mx.expand_dims(key, 2).swapaxes(-1, -2)
    scores = mx.tanh(scores / softcap) * softcap
    if attn_mask is not None:
        mask = attn_mask
        if mask.ndim == 4:
            mask = mx.expand_dims(mask, 2) if mask.shape[1] == 1 else mask.reshape(*scores.shape[:3], *mask.shape[2:])
        lowest = mx.array(mx.finfo(scores.dtype).min, scores.dtype)
        scores = mx.where(mask, scores, lowest) if mask.dtype == mx.bool_ else scores + mask
    out = mx.softmax(scores, axis=-1, precise=True) @ mx.expand_dims(value, 2)
    return out.reshape(batch, heads, length, value.shape[-1])


def _setitem(x: mx.array, index: Any, new: mx.array) -> mx.array:
    """The array with a slice replaced whose start may be an array."""
    if isinstance(index, tuple) and any(isinstance(part, slice) and isinstance(part.start, mx.array) for part in index):
        axis = next(at for at, part in enumerate(index) if isinstance(part, slice) and part.start is not None)
        return mx.slice_update(x, new.astype(x.dtype), index[axis].start, axes=(axis,))
    made = x + 0 if x.dtype != mx.bool_ else mx.logical_or(x, False)
    made[index] = new
    return made


def _index_copy(x: mx.array, dim: int, index: mx.array, new: mx.array) -> mx.array:
    shape = [1] * x.ndim
    shape[dim] = -1
    return mx.put_along_axis(x, mx.broadcast_to(index.reshape(shape), new.shape), new, axis=dim)


def _rope(
    x: mx.array, dims: int, traditional: bool, base: Any, scale: float, offset: Any, freqs: mx.array | None = None
) -> mx.array:
    how: dict[str, Any] = {"traditional": traditional, "base": base, "scale": scale, "offset": offset, "freqs": freqs}
    return mx.fast.rope(x, dims, **how)


def _causal_mask(columns: int, first: Any, length: int, window: int | None = None) -> mx.array:
    if isinstance(first, mx.array) and first.ndim:
        first = first[:, None, None, None]
    keys, queries = mx.arange(columns), first + mx.arange(length)[:, None]
    mask = keys <= queries
    return mask if window is None else mask & (keys > queries - window)


def _slice_update(x: mx.array, update: mx.array, index: tuple[slice, ...], reduce: str = "none") -> mx.array:
    if reduce == "none":
        return _setitem(x, index, update)
    how = {"sum": "add", "prod": "multiply", "max": "maximum", "min": "minimum"}[reduce]
    return getattr(x.at[index], how)(update)


def _gather(x: mx.array, indices: Sequence[mx.array], axes: Sequence[int], sizes: Sequence[int]) -> mx.array:
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    made = x.transpose(*axes, *rest)[tuple(indices)]
    return made.reshape(*made.shape[: made.ndim - len(rest)], *sizes)


def _scatter(x: mx.array, indices: Sequence[mx.array], updates: mx.array, axes: Sequence[int], reduce: str) -> mx.array:
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    order = [*axes, *rest]
    moved = x.transpose(order)
    shape = mx.broadcast_arrays(*indices)[0].shape
    updates = updates.reshape(*shape, *moved.shape[len(axes) :])
    at = moved.at[tuple(indices)]
    if reduce == "none":
        moved = moved + 0
        moved[tuple(indices)] = updates
    else:
        how = {"sum": "add", "prod": "multiply", "max": "maximum", "min": "minimum"}[reduce]
        moved = getattr(at, how)(updates)
    return moved.transpose([order.index(dim) for dim in range(x.ndim)])


def _scan(x: mx.array, kind: str, dim: int, reverse: bool = False, inclusive: bool = True) -> mx.array:
    function = {"sum": mx.cumsum, "prod": mx.cumprod}[kind]
    return function(x, axis=dim, reverse=reverse, inclusive=inclusive)


def _convolution(x, weight, stride, padding, dilation, input_dilation, groups, flip):
    return mx.conv_general(x, weight, stride, (padding[0], padding[1]), dilation, input_dilation, groups, flip)


def _quantized_matmul(x, weight, scales, biases, transpose, group_size, bits, mode):
    how = {"transpose": transpose, "group_size": group_size, "bits": bits, "mode": mode}
    return mx.quantized_matmul(x, weight, scales, biases, **how)


def _gather_qmm(x, weight, scales, biases, left, right, transpose, group_size, bits, mode, sorted_indices):
    how = {"transpose": transpose, "group_size": group_size, "bits": bits, "mode": mode}
    how |= {"lhs_indices": left, "rhs_indices": right, "sorted_indices": sorted_indices}
    return mx.gather_qmm(x, weight, scales, biases, **how)


def _linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


def _norm_of(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`rms_norm` and `layer_norm`, over the last dimension alone."""

    def norm(x: mx.array, shape: Any, *weights: Any, weight: Any = None, bias: Any = None, eps: Any = None) -> mx.array:
        if len(shape) != 1:
            raise ValueError(f"a norm over {len(shape)} dimensions")
        given = list(weights) or [held for held in (weight, bias) if held is not None]
        wanted = 1 if function is mx.fast.rms_norm else 2
        eps = given.pop() if len(given) > wanted else eps
        given += [None] * (wanted - len(given))
        return function(x, *given, 1e-5 if eps is None else eps)

    return norm


def _arange(*bounds: Any, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> mx.array:
    kind = torch.int64 if all(isinstance(bound, int) for bound in bounds) else torch.float32
    return mx.arange(*bounds, dtype=dtype_of(dtype or kind))


def _full(size: Any, value: Any, dtype: torch.dtype | None = None, **rest: Any) -> mx.array:
    return mx.full(tuple(size), value, dtype_of(dtype) if dtype else None)


def _to(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    """A cast; where a tensor lives has no meaning here."""
    dtypes = [held for held in (*args, *kwargs.values()) if isinstance(held, torch.dtype)]
    return x.astype(dtype_of(dtypes[0])) if dtypes else x


def _getitem(x: Any, index: Any) -> Any:
    return x[index]


def _sizes(x: Any) -> tuple[int, ...]:
    return tuple(x[0]) if len(x) == 1 and isinstance(x[0], (tuple, list)) else tuple(x)


def _expand(x: mx.array, *sizes: Any) -> mx.array:
    sizes = _sizes(sizes)
    old = [1] * (len(sizes) - x.ndim) + list(x.shape)
    return mx.broadcast_to(x, [old[at] if size == -1 else size for at, size in enumerate(sizes)])


def _reshape(x: mx.array, *sizes: Any) -> mx.array:
    return x.reshape(*_sizes(sizes))


def _split(x: mx.array, sizes: Any, dim: int = 0) -> list[mx.array]:
    if isinstance(sizes, int):
        return mx.split(x, list(range(sizes, x.shape[dim], sizes)), axis=dim)
    return mx.split(x, np.cumsum(sizes)[:-1].tolist(), axis=dim)


def _reduction(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def reduce(x: mx.array, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> mx.array:
        made = function(x, axis=tuple(dim) if isinstance(dim, (list, tuple)) else dim, keepdims=keepdim)
        return made if dtype is None else made.astype(dtype_of(dtype))

    return reduce


def _softmax(x: mx.array, dim: int = -1, dtype: Any = None, **rest: Any) -> mx.array:
    return mx.softmax(x if dtype is None else x.astype(dtype_of(dtype)), axis=dim, precise=True)


def _pad(x: mx.array, pad: Sequence[int], mode: str = "constant", value: Any = None) -> mx.array:
    if mode != "constant":
        raise ValueError(f"padding by {mode}")
    pairs = [(pad[at], pad[at + 1]) for at in range(0, len(pad), 2)]
    return mx.pad(x, [(0, 0)] * (x.ndim - len(pairs)) + pairs[::-1], constant_values=value or 0)


def _dropout(x: mx.array, p: float = 0.5, training: bool = True, inplace: bool = False) -> mx.array:
    if training and p:
        raise ValueError(f"dropout with p = {p}")
    return x


def _same(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


def _attribute(x: Any, name: str) -> Any:
    if name not in ("shape", "mT", "T", "ndim"):
        raise ValueError(f"the attribute {name}")
    return x.swapaxes(-1, -2) if name == "mT" else getattr(x, name)


_OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "matmul", "and_", "or_", "xor", "lshift"),
    *("rshift", "invert", "eq", "ne", "lt", "le", "gt", "ge"),
)
_UNARY = (
    *("abs", "arccos", "arcsin", "arctan", "ceil", "cos", "cosh", "erf", "erfinv", "exp", "expm1", "floor", "log"),
    *("log10", "log1p", "log2", "logical_not", "round", "rsqrt", "sigmoid", "sign", "sin", "sinh", "sqrt", "square"),
    *("tan", "tanh"),
)
_BINARY = ("logaddexp", "logical_and", "logical_or", "maximum", "minimum", "remainder", "outer")

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{getattr(operator, name): getattr(operator, name) for name in _OPERATORS},
    **{getattr(torch, name): getattr(mx, name) for name in (*_UNARY, *_BINARY)},
    F.dropout: _dropout,
    F.embedding: lambda indices, weight, *rest, **how: weight[indices],
    F.gelu: lambda x, approximate="none": nn.gelu(x) if approximate == "none" else nn.gelu_approx(x),
    F.layer_norm: _norm_of(mx.fast.layer_norm),
    F.linear: _linear,
    F.pad: _pad,
    F.relu: lambda x, inplace=False: mx.maximum(x, 0),
    F.rms_norm: _norm_of(mx.fast.rms_norm),
    F.scaled_dot_product_attention: _attention,
    F.silu: lambda x, inplace=False: nn.silu(x),
    F.softmax: _softmax,
    functions.argpartition: lambda x, kth, dim: mx.argpartition(x, kth, axis=dim),
    functions.causal_mask: _causal_mask,
    functions.convolution: _convolution,
    functions.dynamic_slice: lambda x, start, axes, size: mx.slice(x, start, tuple(axes), tuple(size)),
    functions.dynamic_slice_update: lambda x, update, start, axes: mx.slice_update(x, update, start, tuple(axes)),
    functions.gather: _gather,
    functions.gather_mm: lambda x, weight, left, right, left_sorted=False, right_sorted=False: mx.gather_mm(
        x, weight, left, right, sorted_indices=right_sorted
    ),
    functions.gather_qmm: _gather_qmm,
    functions.partition: lambda x, kth, dim: mx.partition(x, kth, axis=dim),
    functions.quantized_matmul: _quantized_matmul,
    functions.ring_write: lambda buffer, new, index: mx.slice_update(buffer, new, index, axes=(2,)),
    functions.rope: _rope,
    functions.scan: _scan,
    functions.scatter: _scatter,
    functions.slice_update: _slice_update,
    functions.sort: lambda x, dim: mx.sort(x, axis=dim),
    functions.window_append: lambda past, new: mx.concatenate([past, new], axis=2),
    getattr: _attribute,
    operator.getitem: _getitem,
    operator.setitem: _setitem,
    ops.attention: dense_attention,
    torch.all: _reduction(mx.all),
    torch.amax: _reduction(mx.max),
    torch.amin: _reduction(mx.min),
    torch.any: _reduction(mx.any),
    torch.arange: _arange,
    torch.argmax: lambda x, dim=None, keepdim=False: mx.argmax(x, axis=dim, keepdims=keepdim),
    torch.argmin: lambda x, dim=None, keepdim=False: mx.argmin(x, axis=dim, keepdims=keepdim),
    torch.argsort: lambda x, dim=-1: mx.argsort(x, axis=dim),
    torch.cat: lambda tensors, dim=0: mx.concatenate(list(tensors), axis=dim),
    torch.cumsum: lambda x, dim: mx.cumsum(x, axis=dim),
    torch.einsum: lambda equation, *operands: mx.einsum(equation, *operands),
    torch.flatten: mx.flatten,
    torch.full: _full,
    torch.logsumexp: lambda x, dim, keepdim=False: mx.logsumexp(x, axis=dim, keepdims=keepdim),
    torch.matmul: mx.matmul,
    torch.mean: _reduction(mx.mean),
    torch.permute: lambda x, dims: mx.transpose(x, dims),
    torch.prod: _reduction(mx.prod),
    torch.repeat_interleave: lambda x, repeats, dim=None: mx.repeat(x, repeats, axis=dim),
    torch.reshape: lambda x, shape: mx.reshape(x, tuple(shape)),
    torch.scatter: lambda x, dim, index, new: mx.put_along_axis(x, index, new, axis=dim),
    torch.softmax: _softmax,
    torch.split: _split,
    torch.squeeze: lambda x, dim=None: mx.squeeze(x, dim),
    torch.sum: _reduction(mx.sum),
    torch.take_along_dim: lambda x, index, dim: mx.take_along_axis(x, index, axis=dim),
    torch.transpose: mx.swapaxes,
    torch.unflatten: lambda x, dim, sizes: mx.unflatten(x, dim, tuple(sizes)),
    torch.unsqueeze: mx.expand_dims,
    torch.where: mx.where,
    torch.zeros: lambda *size, dtype=None, **rest: mx.zeros(_sizes(size), dtype_of(dtype or torch.float32)),
    LOG_USAGE: _same,
}
FUNCTIONS |= {torch.add: operator.add, torch.sub: operator.sub, torch.mul: operator.mul, torch.div: operator.truediv}
FUNCTIONS |= {torch.cos: mx.cos, torch.sin: mx.sin, torch.pow: operator.pow, torch.neg: operator.neg}

METHODS: dict[str, Callable[..., Any]] = {
    "bool": lambda x: x.astype(mx.bool_),
    "chunk": lambda x, chunks, dim=0: mx.split(x, chunks, axis=dim),
    "contiguous": _same,
    "cos": mx.cos,
    "detach": _same,
    "expand": _expand,
    "flatten": mx.flatten,
    "float": lambda x: x.astype(mx.float32),
    "index_copy": _index_copy,
    "index_copy_": _index_copy,
    "mean": _reduction(mx.mean),
    "permute": lambda x, *dims: mx.transpose(x, _sizes(dims)),
    "pow": operator.pow,
    "repeat_interleave": lambda x, repeats, dim=None: mx.repeat(x, repeats, axis=dim),
    "reshape": _reshape,
    "sin": mx.sin,
    "size": lambda x, dim=None: x.shape if dim is None else x.shape[dim],
    "softmax": _softmax,
    "squeeze": lambda x, dim=None: mx.squeeze(x, dim),
    "sum": _reduction(mx.sum),
    "to": _to,
    "transpose": mx.swapaxes,
    "type_as": lambda x, other: x.astype(other.dtype),
    "unsqueeze": mx.expand_dims,
    "view": lambda x, *sizes: x.view(dtype_of(sizes[0])) if isinstance(sizes[0], torch.dtype) else _reshape(x, *sizes),
}
