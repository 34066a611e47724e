"""Whether a graph holds for caches of any length: their buffers are longer than what counts, and grow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from tqc import ops
from tqc.mlx_trace import functions
from tqc.mlx_trace.graph import CaptureError, Graph
from tqc.ops import example

# How far a number may be from the length of a buffer in the trace and still be taken for one that was made of it.
_NEAR = 4096


def check_lengths(graph: Graph) -> None:
    """Refuse a graph that is right for one length alone.

    Raises:
        CaptureError: for a number that is the length of a buffer, and for what is computed over a whole buffer other
            than attention under a mask that knows how much of it counts.
    """
    for node in graph.graph.nodes:
        for number in _numbers((node.args, node.kwargs)):
            if any(abs(number - size) <= _NEAR for size in graph.capacities):
                raise CaptureError(f"the length of a cache is a constant of {_name(node)}")
        over = [source for source in node.all_input_nodes if _is_long(graph, source)]
        if over and isinstance(example(node), Tensor) and not _is_long(graph, node) and not _is_masked(graph, node):
            raise CaptureError(f"{_name(node)} is computed over a whole cache without a mask of the cache's own")


def _numbers(held: Any) -> Iterator[float]:
    if isinstance(held, (tuple, list)):
        for part in held:
            yield from _numbers(part)
    elif isinstance(held, dict):
        yield from _numbers(list(held.values()))
    elif isinstance(held, slice):
        yield from _numbers((held.start, held.stop, held.step))
    elif isinstance(held, (int, float)) and not isinstance(held, bool):
        yield held


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)


def _is_long(graph: Graph, node: Node) -> bool:
    held = example(node)
    return isinstance(held, Tensor) and any(graph.is_capacity(size) for size in held.shape)


def _is_masked(graph: Graph, node: Node) -> bool:
    if graph.calls(node, F.scaled_dot_product_attention, ops.attention):
        mask = node.kwargs.get("attn_mask")
        return mask is not None and functions.causal_mask in _made_by(graph, mask)
    if not graph.calls(node, torch.matmul):
        return False
    return {torch.softmax, functions.causal_mask} <= _made_by(graph, node.args[0])


def _made_by(graph: Graph, node: Node) -> set[Any]:
    """What `node` was computed by, as far up as things are as long as a cache."""
    seen, edge = {node}, [node]
    while edge:
        more = {source for source in edge.pop().all_input_nodes if _is_long(graph, source)} - seen
        seen |= more
        edge += more
    return {held.target for held in seen}
