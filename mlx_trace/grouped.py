"""Attention as MLX spells it out: the query heads of one key head are a dimension of their own.

`matmul(q[b, h, r, n, d], k[b, h, 1, d, c])`, scale, softcap, mask, softmax, `matmul(.., v[b, h, 1, c, d])`. Gemma 2 is
written so, and `mx.fast.scaled_dot_product_attention` becomes it where the device has no kernel. The four-dimensional
spelling is the passes' own business.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from tqc import ops
from tqc.mlx_trace.graph import Graph
from tqc.ops import example
from tqc.torch_private import MODULE_STACK

_RESHAPES = (torch.reshape, torch.unflatten, torch.flatten)


def fuse_grouped_attention(graph: Graph) -> int:
    """Put one call of attention where it is spelled out over five dimensions; how often.

    Before:
        scores = tanh(matmul(q.reshape(b, h, r, n, d), k.unsqueeze(2).mT) / cap) * cap
        out = matmul(softmax(where(mask, scores, lowest)), v.unsqueeze(2)).reshape(b, h * r, n, d)
    After:
        out = tqc.ops.attention(q, k, v, mask, softcap=cap)
    """
    found = 0
    for softmax in list(graph.graph.nodes):
        if graph.calls(softmax, torch.softmax) and len(graph.shape(softmax)) == 5:
            found += _fuse(graph, softmax)
    return found


def _fuse(graph: Graph, softmax: Node) -> bool:
    weighed = _only_user(softmax)
    if weighed is None or not graph.calls(weighed, torch.matmul) or weighed.args[0] is not softmax:
        return False
    output = _only_user(weighed)
    if output is None or not graph.calls(output, *_RESHAPES):
        return False
    value = _ungrouped(graph, weighed.args[1])
    node, mask = _unmasked(graph, softmax.args[0])
    node, softcap = _uncapped(graph, node)
    scale = 1.0
    while graph.calls(node, operator.mul) and isinstance(node.args[1], float):
        scale *= node.args[1]
        node = node.args[0]
    if not graph.calls(node, torch.matmul) or value is None:
        return False
    query, transposed = node.args
    key = _ungrouped(graph, transposed.args[0]) if _swaps_last(graph, transposed) else None
    if key is None or not graph.calls(query, *_RESHAPES):
        return False
    query = query.args[0]
    batch, heads, _, head_dim = graph.shape(key)
    shape = graph.shape(query)
    repeats = graph.shape(softmax)[2]
    if len(shape) != 4 or (shape[0], shape[1], shape[3]) != (batch, heads * repeats, head_dim):
        return False
    if graph.shape(output) != (*shape[:3], graph.shape(value)[3]) or (mask and len(graph.shape(mask)) > 2):
        return False
    like = (graph.shape(output), example(output).dtype)
    with graph.graph.inserting_before(output):
        if softcap:
            how: dict[str, Any] = {"attn_mask": mask, "scale": scale, "softcap": softcap}
            fused = graph.call(ops.attention, query, key, value, **how, like=like)
        else:
            how = {"attn_mask": mask, "scale": scale, "enable_gqa": True}
            fused = graph.call(F.scaled_dot_product_attention, query, key, value, **how, like=like)
    fused.meta[MODULE_STACK] = softmax.meta.get(MODULE_STACK)
    output.replace_all_uses_with(fused)
    return True


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _ungrouped(graph: Graph, node: Any) -> Node | None:
    """[b, h, c, d] of [b, h, 1, c, d], or of that repeated."""
    node = node.args[0] if graph.is_broadcast(node) else node
    return node.args[0] if graph.calls(node, torch.unsqueeze) and node.args[1] == 2 else None


def _swaps_last(graph: Graph, node: Any) -> bool:
    return graph.calls(node, torch.permute) and tuple(node.args[1]) == (0, 1, 2, 4, 3)


def _unmasked(graph: Graph, node: Any) -> tuple[Any, Node | None]:
    """The scores before a mask, and the mask."""
    if graph.calls(node, torch.where):
        mask, scores, lowest = node.args
        if isinstance(lowest, float) and lowest <= torch.finfo(example(node).dtype).min:
            return scores, _plain(graph, mask)
    if graph.calls(node, operator.add) and isinstance(node.args[1], Node):
        return node.args[0], _plain(graph, node.args[1])
    return node, None


def _plain(graph: Graph, mask: Node) -> Node:
    """A mask before it was repeated for batch and heads."""
    while graph.is_broadcast(mask) or graph.calls(mask, torch.unflatten):
        mask = mask.args[0]
    return mask


def _uncapped(graph: Graph, node: Any) -> tuple[Any, float]:
    """The scores before `tanh(scores / cap) * cap`, and the cap; 0 without."""
    if not graph.calls(node, operator.mul) or not graph.calls(node.args[0], torch.tanh):
        return node, 0.0
    cap, divided = node.args[1], node.args[0].args[0]
    if graph.calls(divided, operator.truediv) and divided.args[1] == cap and isinstance(cap, float):
        return divided.args[0], cap
    return node, 0.0
