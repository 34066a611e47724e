"""Find attention that is spelled out: matmul, scale, softcap, mask, softmax, matmul, in any of the usual orders.

The match starts at a softmax over the last of four dimensions and walks its producers up to the product of queries and
keys, and its users down to the product with the values. Every step must be one that is known; what is not known, but
lies between two such products, makes a site with a reason.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from tqc.ops import example
from tqc.passes.finders.site import Attention, Mask, strip_heads
from tqc.passes.graph import argument, calls, is_in_place, strip_casts

SOFTMAX = (torch.nn.functional.softmax, torch.softmax, "softmax")
MATMUL = (torch.matmul, operator.matmul, "matmul")
_ADD = (operator.add, torch.add, "add")
_SUB = (operator.sub, torch.sub, "sub")
_MUL = (operator.mul, torch.mul, "mul")
_DIV = (operator.truediv, torch.div, "div")
_TANH = (torch.tanh, "tanh", torch.nn.functional.tanh)
_DROPOUT = (torch.nn.functional.dropout,)


class NotUnderstood(Exception):
    """Why a walk over scores or weights ended."""


@dataclass
class Scores:
    """What the walk up from the softmax has met."""

    query: Node | None = None
    key: Node | None = None
    masks: list[Mask] = field(default_factory=list)
    scale: float = 1.0
    softcap: float = 0.0
    sinks: Node | None = None
    # How far up: 0 below masks, 1 among masks, 2 at the softcap, 3 at the scale.
    stage: int = 0

    def enter(self, stage: int, what: str) -> None:
        if stage < self.stage:
            raise NotUnderstood(f"{what} comes before the scale or the softcap of the scores")
        self.stage = stage


def match_eager(node: Node) -> Attention | None:
    """softmax(scale * query @ key' + mask) @ value, from its softmax; with softcap, with attention sinks."""
    if not calls(node, *SOFTMAX) or not isinstance(example(node), Tensor) or example(node).dim() != 4:
        return None
    if argument(node, 1, "dim") not in (-1, 3):
        return None
    found = _find_values(node)
    if found is None or not _comes_from_matmul(node.args[0]):
        return None
    output, val, reason, dropped = found
    scores = Scores()
    try:
        _walk_up(node.args[0], scores)
    except NotUnderstood as why:
        reason = reason or str(why)
    query, key = scores.query, scores.key
    if query is None or key is None:
        return Attention(output, output, output, val, reason=reason or "the scores are not those of queries and keys")
    if (scores.sinks is not None) != dropped:
        reason = reason or "a column of the weights is dropped that is not an attention sink"
    site = Attention(
        output, query, key, val, tuple(scores.masks), scores.scale, scores.softcap, scores.sinks, reason=reason
    )
    if site.reason is None:
        strip_heads(site)
    return site


def _comes_from_matmul(node: Any, depth: int = 12) -> bool:
    """Whether a product of matrices lies a few steps above `node`: else the softmax is no attention."""
    if not isinstance(node, Node) or depth == 0:
        return False
    if calls(node, *MATMUL, torch.bmm, torch.baddbmm, torch.einsum, "bmm", "baddbmm"):
        return True
    return any(_comes_from_matmul(source, depth - 1) for source in node.all_input_nodes)


def _find_values(softmax: Node) -> tuple[Node, Node, str | None, bool] | None:
    """Walk down from the weights: (output, values, why not, whether a last column was dropped), or None."""
    node, dropped, reason = softmax, False, None
    while True:
        chain = []
        for user in node.users:
            if user.op == "output":
                reason = "the attention weights are an output"
            elif is_in_place(user):
                reason = "the attention weights are written into"
            elif isinstance(example(user), Tensor):
                chain.append(user)
        products = [user for user in chain if calls(user, *MATMUL) and user.args[0] is node]
        if len(products) == 1 and example(products[0]).dim() == 4:
            if len(chain) > 1:
                reason = "the attention weights are used outside of the attention"
            return products[0], strip_casts(products[0].args[1]), reason, dropped
        if len(chain) != 1:
            return None
        node = chain[0]
        if calls(node, *_DROPOUT):
            p, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
            if training and p != 0.0:
                reason = f"the attention weights are dropped out with p = {p}"
        elif calls(node, operator.getitem) and _drops_last(node.args[1]):
            dropped = True
        elif strip_casts(node) is node and not calls(node, "contiguous"):
            reason = f"the attention weights pass through {_name(node)}"


def _drops_last(index: Any) -> bool:
    if not isinstance(index, tuple) or index[-1] != slice(None, -1, None):
        return False
    return set(map(repr, index[:-1])) <= {"Ellipsis", repr(slice(None, None, None))}


def _walk_up(node: Any, scores: Scores) -> None:
    """Collect what was done to the product of queries and keys, from the softmax upwards."""
    node = strip_casts(node)
    if not isinstance(node, Node):
        raise NotUnderstood("the scores are a constant")
    if calls(node, *MATMUL):
        _match_product(node, scores)
    elif calls(node, torch.cat, torch.concat):
        _match_sinks(node, scores)
    elif calls(node, *_SUB) and _is_row_maximum(node.args[1], node.args[0]):
        _walk_up(node.args[0], scores)
    elif calls(node, *_ADD):
        if node.kwargs.get("alpha", 1) != 1:
            raise NotUnderstood("a mask is added with a factor")
        left, right = node.args
        if _leads_to_product(left) and _leads_to_product(right):
            raise NotUnderstood("two products of matrices are added")
        of_scores, mask = (left, right) if _leads_to_product(left) else (right, left)
        scores.enter(1, "a mask")
        if not isinstance(mask, Node) or not isinstance(example(mask), Tensor) or not example(mask).is_floating_point():
            raise NotUnderstood("what is added to the scores is not a float tensor")
        scores.masks.append(Mask(mask, "add"))
        _walk_up(of_scores, scores)
    elif calls(node, "masked_fill", torch.masked_fill):
        scores.enter(1, "a mask")
        if not _is_minus_infinity(argument(node, 2, "value"), example(node).dtype):
            raise NotUnderstood("masked scores are not set to the lowest value")
        scores.masks.append(Mask(argument(node, 1, "mask"), "drop"))
        _walk_up(node.args[0], scores)
    elif calls(node, *_MUL, *_DIV):
        _match_factor(node, scores)
    else:
        raise NotUnderstood(f"the scores pass through {_name(node)}")


def _match_factor(node: Node, scores: Scores) -> None:
    """A factor: part of the scale, or of softcap * tanh(scores / softcap)."""
    divides = calls(node, *_DIV)
    left, right = node.args[0], argument(node, 1, "other")
    if isinstance(left, (int, float)) and not divides:
        left, right = right, left
    if isinstance(right, bool) or not isinstance(right, (int, float)) or node.kwargs.get("rounding_mode"):
        raise NotUnderstood("the scores are scaled by a tensor")
    inner = strip_casts(left)
    if calls(inner, *_TANH) and not divides:
        divided = strip_casts(inner.args[0])
        if calls(divided, *_DIV):
            cap = argument(divided, 1, "other")
        elif calls(divided, *_MUL) and isinstance(argument(divided, 1, "other"), float):
            cap = 1.0 / argument(divided, 1, "other")
        else:
            cap = None
        if not isinstance(cap, (int, float)) or abs(cap - right) > 1e-6 * abs(right):
            raise NotUnderstood("tanh of the scores is not a softcap")
        scores.enter(2, "a softcap")
        if scores.softcap:
            raise NotUnderstood("the scores have two softcaps")
        scores.softcap = float(right)
        _walk_up(divided.args[0], scores)
        return
    scores.enter(3, "a scale")
    scores.scale *= 1.0 / right if divides else right
    _walk_up(left, scores)


def _match_product(node: Node, scores: Scores) -> None:
    query, transposed = node.args[0], argument(node, 1, "other")
    transposed = strip_casts(transposed)
    key = None
    if calls(transposed, "transpose", torch.transpose, "swapaxes"):
        dims = {d % 4 for d in transposed.args[1:3] if isinstance(d, int)}
        key = transposed.args[0] if dims == {2, 3} else None
    elif calls(transposed, "permute", torch.permute):
        order = transposed.args[1] if isinstance(transposed.args[1], (tuple, list)) else transposed.args[1:]
        key = transposed.args[0] if tuple(d % 4 for d in order) == (0, 1, 3, 2) else None
    elif calls(transposed, getattr) and transposed.args[1] in ("mT",):
        key = transposed.args[0]
    if key is None or example(query).dim() != 4 or example(key).dim() != 4:
        raise NotUnderstood("the scores are not queries times transposed keys of four dimensions")
    scores.query, scores.key = strip_casts(query), strip_casts(key)


def _match_sinks(node: Node, scores: Scores) -> None:
    """`cat([scores, sinks.reshape(1, -1, 1, 1).expand(...)], -1)`: one more logit per head."""
    tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if scores.stage or scores.sinks is not None or dim not in (-1, 3) or len(tensors) != 2:
        raise NotUnderstood("the scores are concatenated with something")
    wide = strip_casts(tensors[1])
    expanded = strip_casts(wide.args[0]) if calls(wide, "expand") else wide
    heads = example(node).shape[1]
    base = strip_casts(expanded.args[0]) if calls(expanded, "reshape", "view", torch.reshape) else None
    shape = tuple(example(expanded).shape)
    if base is None or shape != (1, heads, 1, 1) or tuple(example(base).shape) != (heads,):
        raise NotUnderstood("the scores are concatenated with something that is not one sink per head")
    scores.sinks = base
    _walk_up(tensors[0], scores)


def _leads_to_product(node: Any, depth: int = 8) -> bool:
    """Whether the scores come from here rather than from the other operand of an addition."""
    node = strip_casts(node)
    if not isinstance(node, Node) or depth == 0:
        return False
    if calls(node, *MATMUL):
        return True
    if not calls(node, *_ADD, *_MUL, *_DIV, *_SUB, *_TANH, "masked_fill", torch.masked_fill):
        return False
    return any(_leads_to_product(operand, depth - 1) for operand in node.args[:2])


def _is_row_maximum(node: Any, of: Any) -> bool:
    """`of.max(dim=-1, keepdim=True).values`, which a softmax does not notice; detached or not."""
    node = strip_casts(node)
    if calls(node, "detach"):
        node = node.args[0]
    if calls(node, operator.getitem) and node.args[1] == 0:
        node = node.args[0]
    if calls(node, getattr) and node.args[1] == "values":
        node = node.args[0]
    if not calls(node, "max", torch.max, "amax", torch.amax) or strip_casts(node.args[0]) is not strip_casts(of):
        return False
    return argument(node, 1, "dim") in (-1, 3) and argument(node, 2, "keepdim", False) is True


def _is_minus_infinity(filler: Any, dtype: torch.dtype) -> bool:
    return isinstance(filler, (int, float)) and filler <= max(torch.finfo(dtype).min, -1e9)


def _name(node: Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
