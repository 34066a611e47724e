"""Capture a model of mlx-lm as an FX graph in the vocabulary that the passes know."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import torch
from torch.fx import GraphModule, Node

from tqc.mlx_trace.caches import Kind, kind_of, leaves, rebuilt
from tqc.mlx_trace.graph import CaptureError, Graph, Primitive, type_of
from tqc.mlx_trace.grouped import fuse_grouped_attention
from tqc.mlx_trace.layouts import check
from tqc.mlx_trace.lengths import check_lengths
from tqc.mlx_trace.markers import Trace, place, read_marker
from tqc.mlx_trace.packed_kind import Growing
from tqc.mlx_trace.primitives import translate
from tqc.ops.effects import written
from tqc.torch_private import MODULE_STACK


@dataclass
class Captured:
    """A program for calls of one batch and length.

    Attributes:
        gm: the graph. Its placeholders have the path of what they stand for in `meta["path"]`; it returns logits and
            what has become of each cache.
        inputs: paths of what a call gives, in order: "tokens", "offset", an "index" for each size of full windows,
            arrays of caches.
        weights: everything else that placeholders stand for, by path.
        kinds: how each cache takes part.
    """

    gm: GraphModule
    inputs: list[str]
    weights: dict[str, mx.array]
    kinds: list[Kind]


def capture(model: nn.Module, caches: list[Any], batch: int, length: int, growing: Collection[int] = ()) -> Captured:
    """The program of `model(tokens, cache=caches)` for tokens [batch, length]; neither is changed.

    Args:
        growing: which caches, by their number, are packed or shall be.

    Raises:
        CaptureError: for what cannot be captured, with the reason.
    """
    check()
    kinds = [Growing(cache) if at in growing else kind_of(cache, length) for at, cache in enumerate(leaves(caches))]
    _learn(model, caches, kinds, batch, length)
    groups = list(dict.fromkeys(kind.signature for kind in kinds))
    for kind in kinds:
        kind.size = 1_000_003 * (groups.index(kind.signature) + 1) if kind.shapes and kind.name != "arrays" else 0
        kind.shapes = [
            ((*shape[:2], kind.size, shape[3]) if kind.size else shape, dtype) for shape, dtype in kind.shapes
        ]
    rounds = [f"index.{at}" for at, group in enumerate(groups) if _of(kinds, group).goes_round]
    states = [f"cache.{at}.{part}" for at, kind in enumerate(kinds) for part in range(len(kind.shapes))]
    weights = dict(_arrays(model, "", set()))
    mx.eval(list(weights.values()))
    trace = Trace()

    def program(tokens: mx.array, offset: mx.array, *arrays: mx.array) -> list[mx.array]:
        given = iter(arrays)
        indices = {name: next(given) for name in rounds}
        traced = [
            kind.traced(
                trace,
                [next(given) for _ in kind.shapes],
                offset,
                indices.get(f"index.{groups.index(kind.signature)}"),
            )
            for kind in kinds
        ]
        held = {id(array): next(given) for array in weights.values()}
        logits = _copied(model, held, trace, "", {})(tokens, cache=rebuilt(caches, iter(traced)))
        if not isinstance(logits, mx.array):
            raise CaptureError(f"the model gives a {type(logits).__name__}, not an array of logits")
        return [logits, *(array for kind, cache in zip(kinds, traced, strict=True) for array in _made(kind, cache))]

    scalar = mx.array(0, mx.int32)
    batched = any(isinstance(kind, Growing) and kind.batched for kind in kinds)
    offset = mx.zeros((batch,), mx.int32) if batched else scalar
    examples = [mx.zeros((batch, length), mx.int32), offset, *(scalar for _ in rounds)]
    examples += [mx.zeros(shape, dtype) for kind in kinds for shape, dtype in kind.shapes]
    records: list[dict[str, Any]] = []
    with trace.marking():
        try:
            mx.export_function(records.append, program, *examples, *weights.values())
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(_why(error)) from error
    paths = ["tokens", "offset", *rounds, *states]
    sizes = {kind.size: f"cache.{at}.0" for at, kind in reversed(list(enumerate(kinds))) if kind.size}
    gm, constants = build_graph(records, paths, list(weights), sizes, type(model))
    return Captured(gm, paths, {**weights, **constants}, kinds)


def _of(kinds: list[Kind], signature: Any) -> Kind:
    return next(kind for kind in kinds if kind.signature == signature)


def _made(kind: Kind, traced: Any) -> list[mx.array]:
    return kind.made(traced) if kind.results else []


def _learn(model: nn.Module, caches: list[Any], kinds: list[Kind], batch: int, length: int) -> None:
    """See what shapes the model's caches have: from those that hold something, else from a call that is not run."""
    held = list(leaves(caches))
    if any(cache is not None and cache.empty() for cache in held):
        fresh = [kind.fresh() for kind in kinds]
        try:
            model(mx.zeros((batch, length), mx.int32), cache=rebuilt(caches, iter(fresh)))
        except Exception as error:
            raise CaptureError(f"the model does not run on caches of its own: {error}") from error
        held = fresh
    for kind, cache in zip(kinds, held, strict=True):
        if cache is not None:
            kind.learn(cache)


def _why(error: Exception) -> str:
    missing = re.search(r"Unable to (?:get state for|serialize) primitive (\w+)", str(error))
    if missing:
        return f"MLX exports no {missing[1]}"
    return f"the model cannot be traced with an array as the caches' offset: {type(error).__name__}: {error}"


def _arrays(held: Any, path: str, seen: set[int]) -> Iterator[tuple[str, mx.array]]:
    """Every array of a module, each once, those that are no parameter included, with its path."""
    if id(held) in seen:
        return
    if isinstance(held, mx.array):
        seen.add(id(held))
        yield path, held
    elif isinstance(held, (nn.Module, dict, list, tuple)):
        seen.add(id(held))
        parts = list(held.items()) if isinstance(held, dict) else list(enumerate(held))
        parts += list(vars(held).items()) if isinstance(held, nn.Module) else []
        for name, part in parts:
            yield from _arrays(part, f"{path}.{name}" if path else str(name), seen)


def _copied(held: Any, arrays: dict[int, mx.array], trace: Trace, path: str, memo: dict[int, Any]) -> Any:
    """A copy of a module with other arrays, which tells the trace when it is called. The model itself, which other
    threads may be calling, is not touched."""
    if isinstance(held, mx.array):
        return arrays.get(id(held), held)
    if id(held) in memo:
        return memo[id(held)]
    if isinstance(held, nn.Module):
        told: Any = _told(type(held), trace, path)
        copy = memo[id(held)] = told.__new__(told)
        dict.update(copy, {name: _copied(part, arrays, trace, _join(path, name), memo) for name, part in held.items()})
        vars(copy).update(
            {name: _copied(part, arrays, trace, _join(path, name), memo) for name, part in vars(held).items()}
        )
        return copy
    if type(held) in (list, tuple):
        return type(held)(_copied(part, arrays, trace, _join(path, at), memo) for at, part in enumerate(held))
    if type(held) is dict:
        return {name: _copied(part, arrays, trace, _join(path, name), memo) for name, part in held.items()}
    return held


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)


def _told(cls: type, trace: Trace, path: str) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        trace.modules.append(path)
        try:
            return cls.__call__(self, *args, **kwargs)
        finally:
            trace.modules.pop()

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def build_graph(
    records: list[dict[str, Any]], paths: list[str], weights: list[str], sizes: dict[int, str], model: type
) -> tuple[GraphModule, dict[str, mx.array]]:
    """The graph of what `mx.export_function` told its callback.

    Args:
        paths: of the inputs but for the weights, which follow them.
        sizes: paths of caches by the size of their third dimension.

    Returns:
        The graph and the constants of the program, by the path of their placeholders.

    Raises:
        CaptureError: for a primitive that is not understood.
    """
    told = {record["type"]: record for record in records if record["type"] != "primitive"}
    graph = Graph()
    env: dict[str, Any] = {}
    near: dict[str, str] = {}
    for at, (path, described) in enumerate(zip([*paths, *weights], told["inputs"]["inputs"], strict=True)):
        is_weight = at >= len(paths)
        env[described[0]] = node = graph.placeholder(path, type_of(described), is_weight)
        near[described[0]] = path.rpartition(".")[0] if is_weight else ""
        graph.capacities |= {size: node for size, cache in sizes.items() if cache == path}
    constants: dict[str, mx.array] = {}
    for name, array in told["constants"]["constants"]:
        if array.ndim == 0:
            env[name] = array.item()
        else:
            path = f"constant.{len(constants)}"
            constants[path] = array
            env[name] = graph.placeholder(path, type_of(array), True)
    spent: set[str] = set()
    for record in records:
        if record["type"] != "primitive":
            continue
        names = [described[0] for described in record["inputs"]]
        p = Primitive(
            record["name"],
            list(record["arguments"]),
            [env[name] for name in names],
            [type_of(described) for described in record["inputs"]],
            [type_of(described) for described in record["outputs"]],
            next((near[name] for name in reversed(names) if near.get(name)), ""),
        )
        if marker := read_marker(p):
            p.near = marker["module"]
            made: list[Any] = [place(graph, p, marker["function"], marker["arguments"])]
        else:
            made = translate(graph, p)
        if spent.intersection(names) and not (marker and marker["function"].endswith("mask")):
            raise CaptureError(f"a cache is read as it was before it was written: {p}")
        if marker and marker["function"] == "cache_write":
            spent.add(names[0])
        for described, value in zip(record["outputs"], made, strict=True):
            env[described[0]], near[described[0]] = value, p.near
            if isinstance(value, Node) and value.op != "placeholder":
                value.meta.setdefault(MODULE_STACK, {"": ("", model), p.near: (p.near, model)})
    outputs = tuple(_output(graph, env[name], (shape, dtype)) for name, shape, dtype in told["outputs"]["outputs"])
    graph.graph.output(outputs)
    fuse_grouped_attention(graph)
    graph.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or written(node))
    for node in graph.graph.find_nodes(op="placeholder"):
        if not node.users and graph.is_weight(node):
            graph.graph.erase_node(node)
    check_lengths(graph)
    return GraphModule(torch.nn.Module(), graph.graph), constants


def _output(graph: Graph, value: Any, described: Any) -> Node:
    shape, dtype = type_of((None, *described))
    return value if isinstance(value, Node) else graph.call(torch.full, shape, value, dtype=dtype, like=(shape, dtype))
