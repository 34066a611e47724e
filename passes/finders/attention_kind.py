"""What an attention site of a diffusion transformer attends to: itself, the prompt, or both."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from tqc.ops import TENSORS, example
from tqc.passes.finders.site import Attention
from tqc.passes.graph import argument, calls, rearranges

SELF = "self"  # queries and keys are of the same tokens
JOINT = "joint"  # of tokens and the prompt in one sequence
CROSS = "cross"  # of tokens and of something else
KINDS = (SELF, JOINT, CROSS)

_PROJECTIONS = (torch.nn.functional.linear, torch.nn.functional.conv1d, torch.nn.functional.conv2d)
_CAT = (torch.cat, torch.concat)
_MODULATION = (
    *(operator.add, operator.mul, "add", "mul", torch.add, torch.mul),
    *(torch.nn.functional.layer_norm, torch.nn.functional.rms_norm, torch.rms_norm),
)


def attention_kind(site: Attention) -> str:
    """Told by what the projections of queries and keys read: one tensor, several, or not the same.

    A sequence that was put together of two (`cat` in front of the projections, with norm and modulation between) is
    joint. In doubt a site is joint or cross, which strategies share less of.
    """
    of_query, of_key = _projected(site.query), _projected(site.key)
    if not of_query or of_query != of_key:
        return CROSS
    return JOINT if len(of_query) > 1 or _joined(next(iter(of_query))) else SELF


def _projected(node: Node) -> set[Node]:
    """The tensors whose projections lead to `node`."""
    found, seen, waiting = set(), set(), [node]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if calls(node, *_PROJECTIONS):
            found.add(_source(node))
        else:
            waiting += [held for held in node.all_input_nodes if isinstance(example(held), (*TENSORS, tuple, list))]
            waiting += [user.args[2] for user in node.users if _stores(user, node)]
    return found


def _source(projection: Node) -> Node:
    """What it projects; of two in a row, as a LoRA's are, what the first does."""
    node: Node = argument(projection, 0, "input")
    inner = node
    while calls(inner, torch.nn.functional.dropout) or (inner.args and rearranges(inner)):
        inner = inner.args[0]
    return _source(inner) if calls(inner, *_PROJECTIONS) else node


def _stores(user: Node, node: Node) -> bool:
    """Whether `user` is `node[...] = tensor`, which is how rotary embeddings may be spelled."""
    return calls(user, operator.setitem) and user.args[0] is node and isinstance(user.args[2], Node)


def _joined(node: Any) -> bool:
    while isinstance(node, Node):
        if calls(node, *_CAT):
            return argument(node, 1, "dim", 0) in (1, -2)
        if not (calls(node, *_MODULATION) or rearranges(node)) or calls(node, operator.getitem):
            return False
        node = argument(node, 0, "input")
    return False
