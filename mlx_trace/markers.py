"""Functions of `mx.fast` that leave one node in a trace, whatever the device would make of them.

While a program is exported, a kernel of Metal need not exist: it is recorded with its source. So a marker is a kernel
whose source is a comment that says which function stands here, with its arguments and the module that called it.
"""

from __future__ import annotations

import contextlib
import json
import operator
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import torch
import torch.nn.functional as F
from torch.fx import Node

from tqc import ops
from tqc.mlx_trace import functions
from tqc.mlx_trace.graph import CaptureError, Graph, Primitive

_SIGN = "// tqc "
_lock = threading.RLock()


@dataclass
class Trace:
    """One trace.

    Attributes:
        modules: paths of the modules that are being called, the innermost last.
        masks: by the number of keys of a cache, what makes the mask of so many queries: for attention that asks for
            none because its keys would end with the newest token.
        made: masks that caches have made, by identity, each with its window.
    """

    modules: list[str] = field(default_factory=list)
    masks: dict[int, Callable[..., mx.array]] = field(default_factory=dict)
    made: dict[int, tuple[mx.array, int | None]] = field(default_factory=dict)
    thread: int = field(default_factory=threading.get_ident)

    def mark(self, function: str, inputs: list[mx.array], shape: Any, dtype: mx.Dtype, **arguments: Any) -> mx.array:
        """An array of this shape and dtype that `place` makes a node of."""
        said = {"function": function, "module": self.modules[-1] if self.modules else "", "arguments": arguments}
        names = [f"input{index}" for index in range(len(inputs))]
        kernel = mx.fast.metal_kernel(f"tqc_{function}", names, ["made"], f"{_SIGN}{json.dumps(said)}\n")
        how: Any = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
        return kernel(inputs=inputs, output_shapes=[tuple(shape)], output_dtypes=[dtype], **how)[0]

    def mask_of(self, function: str, inputs: list[mx.array], shape: Any, length: int, window: int | None) -> mx.array:
        """The mask that a cache makes for `length` queries."""
        mask = self.mark(function, inputs, shape, mx.bool_, length=length, window=window)
        self.made[id(mask)] = mask, window
        return mask

    @contextlib.contextmanager
    def marking(self) -> Iterator[None]:
        """Markers in place of functions, for this thread; the others see what they are used to."""
        marked: dict[tuple[Any, str], Callable[..., Any]] = {
            (mx.fast, "scaled_dot_product_attention"): self._attention,
            (mx.fast, "rope"): self._rope,
            (mx.fast, "rms_norm"): self._rms_norm,
            (mx.fast, "layer_norm"): self._layer_norm,
            (mx, "contiguous"): lambda x, *args, **kwargs: x,
        }
        with _lock:
            originals = {place: getattr(*place) for place in marked}
            try:
                for place, function in marked.items():
                    setattr(*place, self._for_this_thread(function, originals[place]))
                yield
            finally:
                for place, original in originals.items():
                    setattr(*place, original)

    def _for_this_thread(self, function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self.thread:
                return original(*args, **kwargs)
            kwargs.pop("stream", None)
            return function(*args, **kwargs)

        return call

    def _attention(self, q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None):
        length, columns = q.shape[2], k.shape[2]
        causal = mask == "causal" if isinstance(mask, str) else False
        if mask is None or causal:
            mask = self.masks[columns](length) if columns in self.masks else None
        elif id(mask) in self.made and mask.shape[-1] != columns and columns in self.masks:
            # Made by the cache of another layer, which holds its tokens in another way.
            mask = self.masks[columns](length, window_size=self.made[id(mask)][1])
        if causal and mask is None and length != columns:
            mask = mx.arange(columns) <= mx.arange(columns - length, columns)[:, None]
        inputs = [q, k, v, *(held for held in (mask, sinks) if held is not None)]
        how = {"masked": mask is not None, "sinks": sinks is not None, "scale": scale}
        how["is_causal"] = causal and mask is None
        return self.mark("attention", inputs, (*q.shape[:-1], v.shape[-1]), _promoted(q, k, v), **how)

    def _rope(
        self, a: mx.array, dims: int, *, traditional: bool, base: Any, scale: float, offset: Any, freqs: Any = None
    ) -> mx.array:
        inputs = [a, *(held for held in (offset, freqs) if isinstance(held, mx.array))]
        how = {"dims": dims, "traditional": traditional, "base": base, "scale": float(scale)}
        how |= {"offset": None if isinstance(offset, mx.array) else int(offset), "freqs": freqs is not None}
        return self.mark("rope", inputs, a.shape, a.dtype, **how)

    def _rms_norm(self, x: mx.array, weight: Any, eps: float) -> mx.array:
        inputs = [x] if weight is None else [x, weight]
        return self.mark("rms_norm", inputs, x.shape, _promoted(*inputs), eps=eps)

    def _layer_norm(self, x: mx.array, weight: Any, bias: Any, eps: float) -> mx.array:
        inputs = [x, *(held for held in (weight, bias) if held is not None)]
        how = {"weight": weight is not None, "bias": bias is not None, "eps": eps}
        return self.mark("layer_norm", inputs, x.shape, _promoted(*inputs), **how)


def _promoted(*arrays: mx.array) -> mx.Dtype:
    dtype = arrays[0].dtype
    for array in arrays[1:]:
        dtype = (mx.zeros((), dtype) + mx.zeros((), array.dtype)).dtype
    return dtype


def read_marker(p: Primitive) -> dict[str, Any] | None:
    """What a marker says; None for any other primitive."""
    if p.name != "CustomKernel" or _SIGN not in str(p.arguments[1]):
        return None
    return json.loads(p.arguments[1].split(_SIGN, 1)[1].split("\n", 1)[0])


def place(graph: Graph, p: Primitive, function: str, arguments: dict[str, Any]) -> Node:
    """The node that a marker stands for."""
    inputs = iter(p.tensor(graph, index) for index in range(len(p.inputs)))
    return _PLACE[function](graph, p, inputs, **arguments)


def _place_attention(
    graph: Graph, p: Primitive, inputs: Iterator[Node], masked: bool, sinks: bool, scale: float, is_causal: bool
) -> Node:
    query, key, val = (next(inputs) for _ in range(3))
    mask = next(inputs) if masked else None
    if sinks:
        how = {"attn_mask": mask, "sinks": next(inputs), "scale": scale, "is_causal": is_causal}
        return graph.call(ops.attention, query, key, val, **how, like=p.output)
    how = {"attn_mask": mask, "is_causal": is_causal, "scale": scale}
    how |= {"enable_gqa": True} if graph.shape(query)[1] != graph.shape(key)[1] else {}
    return graph.call(F.scaled_dot_product_attention, query, key, val, **how, like=p.output)


def _place_rope(
    graph: Graph,
    p: Primitive,
    inputs: Iterator[Node],
    dims: int,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | None,
    freqs: bool,
) -> Node:
    x = next(inputs)
    first = next(inputs) if offset is None else offset
    how = (dims, traditional, base, scale, first, next(inputs) if freqs else None)
    return graph.call(functions.rope, x, *how, like=p.output)


def _place_rms_norm(graph: Graph, p: Primitive, inputs: Iterator[Node], eps: float) -> Node:
    return graph.call(F.rms_norm, next(inputs), p.shape[-1:], next(inputs, None), eps, like=p.output)


def _place_layer_norm(graph: Graph, p: Primitive, inputs: Iterator[Node], weight: bool, bias: bool, eps: float) -> Node:
    x = next(inputs)
    how = (p.shape[-1:], next(inputs) if weight else None, next(inputs) if bias else None, eps)
    return graph.call(F.layer_norm, x, *how, like=p.output)


def _place_cache_write(graph: Graph, p: Primitive, inputs: Iterator[Node]) -> Node:
    cache, new, first = inputs
    if cache.op != "placeholder":
        raise CaptureError(f"what is written into is no cache of the caller: {p}")
    stop = graph.once(operator.add, first, graph.shape(new)[2], like=p.types[2])
    every = slice(None)
    graph.call(operator.setitem, cache, (every, every, slice(first, stop)), new, like=None)
    return cache


def _place_causal_mask(graph: Graph, p: Primitive, inputs: Iterator[Node], length: int, window: int | None) -> Node:
    columns = graph.once("size", next(inputs), 2, like=p.shape[-1])
    return graph.call(functions.causal_mask, columns, next(inputs), length, window, like=p.output)


def _place_window_mask(graph: Graph, p: Primitive, inputs: Iterator[Node], length: int, window: int | None) -> Node:
    first = graph.once("size", next(inputs), 2, like=p.shape[-1] - length)
    columns = graph.once(operator.add, first, length, like=p.shape[-1])
    return graph.call(functions.causal_mask, columns, first, length, window, like=p.output)


def _place_ring_write(graph: Graph, p: Primitive, inputs: Iterator[Node]) -> Node:
    return graph.call(functions.ring_write, *inputs, like=p.output)


def _place_window_append(graph: Graph, p: Primitive, inputs: Iterator[Node]) -> Node:
    node = graph.call(functions.window_append, *inputs, like=p.output)
    graph.capacities.setdefault(p.shape[2], node)
    return node


def _place_grown(graph: Graph, p: Primitive, inputs: Iterator[Node]) -> Node:
    node = graph.call(torch.cat, list(inputs), -2, like=p.output)
    graph.capacities.setdefault(p.shape[2], node)
    return node


def _place_last_tokens(graph: Graph, p: Primitive, inputs: Iterator[Node], keep: int) -> Node:
    every = slice(None)
    return graph.call(operator.getitem, next(inputs), (every, every, slice(-keep, None)), like=p.output)


_PLACE: dict[str, Callable[..., Node]] = {
    "attention": _place_attention,
    "rope": _place_rope,
    "rms_norm": _place_rms_norm,
    "layer_norm": _place_layer_norm,
    "cache_write": _place_cache_write,
    "causal_mask": _place_causal_mask,
    "window_mask": _place_window_mask,
    "ring_write": _place_ring_write,
    "window_append": _place_window_append,
    "grown": _place_grown,
    "last_tokens": _place_last_tokens,
}
