"""A graph that the passes have rewritten, with calls on MLX arrays in place of the ops of the dialect."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tqc import ops
from tqc.mlx_trace import functions
from tqc.mlx_trace.attention import attend
from tqc.mlx_trace.graph import CaptureError
from tqc.mlx_trace.packed import append, in_order, mask_in_order
from tqc.ops import Op, example, is_packed
from tqc.ops.effects import written


class Call(functools.partial):
    """A function of arrays with some arguments that are known, as the target of a node."""

    @property
    def __name__(self) -> str:
        return self.func.__name__

    @property
    def __module__(self) -> str:  # type: ignore[override]
        return self.func.__module__


def realize(gm: GraphModule) -> None:
    """Replace `attend` and `extend`, in place.

    Before:
        mask = causal_mask(size(k_cache) + 4, size(k_cache), 4, window)
        out = tqai.attend(query, k_cache, v_cache, key, value, attn_mask=mask, scale=...)
        keys = tqai.extend(k_cache, key, query=query)
    After:
        out = attend(query, k_cache, v_cache, key, value, sinks)       with the scale and the window in the call
        keys = append(k_cache, key, query)

    And for what is computed from a packed cache:
        keys = tqai.extend(k_cache, key); dense = tqai.read(keys)
    becomes
        keys = append(k_cache, key, None); dense = in_order(k_cache, key)

    Raises:
        CaptureError: for an op, or a mask, that programs of MLX have no call for.
    """
    for node in list(gm.graph.nodes):
        if not isinstance(node.target, Op):
            continue
        arguments = node.target.arguments(node)
        if node.target is ops.attend:
            operands, call = _attend(arguments)
        elif node.target is ops.extend:
            operands, call = [arguments[name] for name in ("cache", "new", "query")], Call(append)
        elif node.target is ops.read and (extended := _extended(arguments["cache"])):
            operands, call = extended, Call(in_order)
        else:
            raise CaptureError(f"MLX runs no tqai.{node.target.__name__} in a captured program")
        with gm.graph.inserting_before(node):
            made = gm.graph.create_node("call_function", call, tuple(operands))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        gm.graph.erase_node(node)
    _erase_unused(gm)
    for node in gm.graph.find_nodes(op="call_function", target=functions.causal_mask):
        columns, first, length, window = node.args
        if isinstance(first, Node) and first.target == "size" and is_packed(cache := first.args[0]):
            node.target, node.args = Call(mask_in_order, length=length, window=window), (cache,)
    _erase_unused(gm)
    for node in gm.graph.find_nodes(op="call_method", target="size"):
        if is_packed(node.args[0]):
            raise CaptureError(f"the length of a packed cache is asked for by {next(iter(node.users)).name}")


def _erase_unused(gm: GraphModule) -> None:
    gm.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or written(node))


def _extended(node: Any) -> list[Any] | None:
    """A cache and its new tokens, of `append`."""
    made = isinstance(node.target, Call) and node.target.func is append
    return list(node.args[:2]) if made else None


def _attend(arguments: dict[str, Any]) -> tuple[list[Any], Call]:
    if arguments["key"] is None or arguments["positions"] is not None or arguments["return_lse"]:
        raise CaptureError("MLX attends to a packed cache only together with the tokens of the call")
    operands = [arguments[name] for name in ("query", "keys", "values", "key", "value", "sinks")]
    window = _window(arguments["attn_mask"], arguments["keys"])
    return operands, Call(attend, scale=arguments["scale"], softcap=arguments["softcap"], window=window)


def _window(mask: Any, cache: Node) -> int | None:
    """The window of a mask that a cache made itself."""
    while isinstance(mask, Node) and mask.target in (torch.unsqueeze, "unsqueeze", "expand"):
        mask = mask.args[0]
    if not isinstance(mask, Node) or mask.target is not functions.causal_mask:
        raise CaptureError("attention to a packed cache is under a mask that the cache did not make")
    columns, first, length, window = mask.args
    grown = isinstance(columns, Node) and columns.target is operator.add and columns.args[0] is first
    if not grown or first.target != "size" or not is_packed(first.args[0]):
        raise CaptureError("attention to a packed cache is under the mask of another cache")
    return None if window is not None and length == 1 and window > (example(cache).fmt.keep or window) else window
