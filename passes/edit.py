"""Changing graphs: what every pass does when it puts a node in another's place."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tqc.ops import Op, attention, example, set_example, update
from tqc.passes.finders.flex_attention import FLEX
from tqc.passes.finders.site import Attention
from tqc.passes.graph import owns
from tqc.torch_private import FakeTensor, detect_fake_mode

# What may go once nothing reads it: ops without effects that lead from a cache to attention. In-place ops go
# where what they write into goes with them.
_PURE_METHODS = {
    *("reshape", "view", "expand", "transpose", "permute", "contiguous", "unsqueeze", "repeat_interleave", "size"),
    *(
        "to",
        "type",
        "type_as",
        "float",
        "masked_fill",
        "max",
        "softmax",
        "matmul",
        "bmm",
        "baddbmm",
        "where",
        "flatten",
    ),
    *("maximum", "clamp", "clamp_min", "clone", "roll", "add", "sub", "mul", "div", "tanh", "swapaxes", "swapdims"),
}
_PURE_FUNCTIONS = {
    getattr,
    operator.getitem,
    torch.ops.aten.mT,
    torch.cat,
    torch.concat,
    torch.tensor,
    torch.repeat_interleave,
    torch.reshape,
    torch.transpose,
    torch.unsqueeze,
    torch.zeros,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.einsum,
    torch.where,
    torch.full,
    torch.max,
    torch.maximum,
    torch.clamp,
    torch.tanh,
    torch.nn.functional.softmax,
    torch.nn.functional.dropout,
    torch.nn.functional.scaled_dot_product_attention,
    attention,
    operator.add,
    operator.mul,
    operator.sub,
    operator.truediv,
    operator.matmul,
    torch.add,
    torch.sub,
    torch.mul,
    torch.div,
    torch.masked_fill,
    torch.permute,
    torch.flatten,
    torch.clone,
    torch.roll,
    torch.softmax,
    torch.dropout,
    FLEX,
}


def erase_unused(gm: GraphModule) -> None:
    """Erase what nothing reads any more: the way from a cache to attention, and arithmetic on sizes, on which regions
    would depend for nothing."""
    gm.graph.eliminate_dead_code(is_impure_node=lambda node: not _may_go(node))


def _may_go(node: Node) -> bool:
    if isinstance(example(node), (int, torch.SymInt, torch.SymBool)) and node.op in ("call_function", "call_method"):
        return True
    if isinstance(node.target, Op):
        return node.target is not update
    if owns(node):
        return True
    pure = _PURE_METHODS if node.op == "call_method" else _PURE_FUNCTIONS if node.op == "call_function" else ()
    return node.target in pure


def insert(graph: Graph, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Node:
    """Call a function, a method by its name, or an op of the dialect where the graph stands; its example is computed
    from those of its arguments."""
    node = graph.create_node("call_method" if isinstance(target, str) else "call_function", target, args, kwargs)
    set_example(node, _example_of(node))
    return node


def _example_of(node: Node) -> Any:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), example)
    with fake_mode(node.graph):
        if isinstance(node.target, Op):
            return node.target.fake_of(node)
        if isinstance(node.target, str):
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)


def size(graph: Graph, tensor: Node, dim: int) -> Node | int:
    """Size of a tensor: a number, or a node where it is symbolic."""
    held = example(tensor).shape[dim]
    return held if isinstance(held, int) else insert(graph, "size", tensor, dim)


def query_of(graph: Graph, attention: Attention) -> Node:
    """The queries of a site, [batch, query_heads, n, head_dim]."""
    query = attention.query
    if example(query).dim() == 4:
        return query
    return insert(graph, "reshape", query, (-1, attention.heads, size(graph, query, 1), size(graph, query, 2)))


def update_input(cache: Node, new: Node) -> None:
    """Say at the end of the graph what an input has become."""
    with cache.graph.inserting_before(cache.graph.output_node()):
        insert(cache.graph, update, cache, new)


class _Inserting(torch.fx.proxy.GraphAppendingTracer):
    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        set_example(node, _example_of(node))
        return node


def inline(graph: Graph, function: Callable[..., Any], *args: Any) -> Node:
    """The ops that `function` calls, where the graph stands; arguments that are no nodes are constants."""
    tracer = _Inserting(graph)
    return function(*(torch.fx.Proxy(arg, tracer) if isinstance(arg, Node) else arg for arg in args)).node


def fake_mode(graph: Graph) -> Any:
    """The mode of the graph's own examples, if it has any; the one of the tracing context may be another."""
    examples = (example(node) for node in graph.nodes)
    found = next((held.fake_mode for held in examples if isinstance(held, FakeTensor)), None)
    return found or detect_fake_mode(()) or contextlib.nullcontext()
