"""Find attention that is spelled out: product, scale, softcap, mask, softmax, product, in any of the usual orders.

The match starts at a softmax over the last of three or four dimensions and walks its producers up to the product of
queries and keys, and its users down to the product with the values. Every step must be one that is known; what is not
known, but lies between two such products, makes a site with a reason. With three dimensions, batch and heads are one.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tqc.ops import example
from tqc.passes.finders.products import BADDBMM, Product, find_product, regrouped, rows_of, split_heads, strip_copies
from tqc.passes.finders.site import Attention, Mask, strip_heads
from tqc.passes.graph import argument, calls, constant, is_in_place, owns, strip_casts, writers

SOFTMAX = (torch.nn.functional.softmax, torch.softmax, "softmax")
_ADD = (operator.add, torch.add, "add", operator.iadd, "add_")
_SUB = (operator.sub, torch.sub, "sub")
_MUL = (operator.mul, torch.mul, "mul", operator.imul, "mul_")
_DIV = (operator.truediv, torch.div, "div", operator.itruediv, "div_")
_TANH = (torch.tanh, "tanh", torch.nn.functional.tanh)
_FILL = ("masked_fill", torch.masked_fill, "masked_fill_")
_WHERE = (torch.where, "where")
_FLOOR = (torch.max, torch.maximum, "max", "maximum", torch.clamp, "clamp", "clamp_min")
# What a masked score must be at most, once scaled, to be nothing beside any visible one: exp(-1e3) is zero.
_VANISHES = -1e3
_DROPOUT = (torch.nn.functional.dropout, torch.dropout)


class NotUnderstood(Exception):
    """Why a walk over scores or weights ended."""


@dataclass
class Scores:
    """What the walk up from the softmax has met.

    Attributes:
        scale: product of the factors so far: what is met next is multiplied by it before it reaches the softmax.
        grouped: nodes of four dimensions, which must agree about what is batch and what is heads.
    """

    query: Node | None = None
    key: Node | None = None
    heads: int = 0
    masks: list[Mask] = field(default_factory=list)
    scale: float = 1.0
    softcap: float = 0.0
    sinks: Node | None = None
    grouped: list[Node] = field(default_factory=list)

    def mask(self, node: Any, kind: str, scores: Node, of: Node, factor: float = 1.0) -> None:
        """`scores` is `of` with a mask, of which `factor` is taken."""
        if self.softcap:
            raise NotUnderstood("a mask comes before the softcap of the scores")
        if self.scale <= 0:
            raise NotUnderstood(f"masked scores are multiplied by {self.scale}")
        if not isinstance(node, Node) or not isinstance(example(node), Tensor):
            raise NotUnderstood("a mask is no tensor")
        if kind != "add" and example(node).dtype != torch.bool:
            raise NotUnderstood(f"a mask of places is {example(node).dtype}")
        before, after = example(of).shape[:-1], example(scores).shape[:-1]
        if len(before) != len(after) or not all(map(statically_known_true, map(operator.eq, before, after))):
            raise NotUnderstood("a mask has more batches, heads or rows than the scores")
        flat = example(node).dim() == 3 and len(after) == 2 and not statically_known_true(example(node).shape[0] == 1)
        self.masks.append(Mask(node, kind, self.scale * factor if kind == "add" else 1.0, flat))


def match_eager(node: Node) -> Attention | None:
    """softmax(scale * query @ key' + mask) @ value, from its softmax; with softcap, with attention sinks."""
    if not calls(node, *SOFTMAX) or not isinstance(example(node), Tensor) or example(node).dim() not in (3, 4):
        return None
    if argument(node, 1, "dim") not in (-1, example(node).dim() - 1):
        return None
    found = _find_values(node)
    if found is None or not _comes_from_product(node.args[0]):
        return None
    output, val, grouped, reason, dropped = found
    scores = Scores()
    try:
        _walk_up(node.args[0], scores)
        if not all(
            statically_known_true(example(held).shape[1] == scores.heads) for held in (*grouped, *scores.grouped)
        ):
            raise NotUnderstood("batch and heads are one dimension in different ways")
    except NotUnderstood as why:
        reason = reason or str(why)
    query, key = scores.query, scores.key
    if query is None or key is None:
        return Attention(output, output, output, val, reason=reason or "the scores are not those of queries and keys")
    if (scores.sinks is not None) != dropped:
        reason = reason or "a column of the weights is dropped that is not an attention sink"
    how = (tuple(scores.masks), scores.scale, scores.softcap, scores.sinks)
    site = Attention(output, query, key, val, *how, reason=reason, heads=scores.heads)
    if site.reason is None:
        strip_heads(site)
    return site


def _comes_from_product(node: Any, depth: int = 12) -> bool:
    """Whether a product of matrices lies a few steps above `node`: else the softmax is no attention."""
    if not isinstance(node, Node) or depth == 0:
        return False
    if find_product(node) or calls(node, torch.einsum):
        return True
    return any(_comes_from_product(source, depth - 1) for source in node.all_input_nodes)


def _find_values(softmax: Node) -> tuple[Node, Node, list[Node], str | None, bool] | None:
    """Walk down from the weights: (output, values, nodes that group batch and heads, why not, whether a last column was
    dropped), or None."""
    node, dropped, reason, grouped = softmax, False, None, []
    while True:
        chain = []
        for user in node.users:
            if user.op == "output":
                reason = "the attention weights are an output"
            elif is_in_place(user):
                reason = "the attention weights are written into"
            elif isinstance(example(user), Tensor):
                chain.append(user)
        products = [(user, product.right) for user in chain if (product := _weighs_values(user, node))]
        if len(products) == 1:
            if len(chain) > 1:
                reason = "the attention weights are used outside of the attention"
            output, right = products[0]
            val = split_heads(right)
            if example(val).dim() != 4:
                reason = reason or "the values are not known to be of batch, heads, tokens and head_dim"
            elif example(right).dim() == 3:
                grouped.append(val)
            return output, val, grouped, reason, dropped
        if len(chain) != 1:
            return None
        node = chain[0]
        if calls(node, *_DROPOUT):
            p, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", node.kwargs.get("train", True))
            if training and p != 0.0:
                reason = f"the attention weights are dropped out with p = {p}"
        elif calls(node, operator.getitem) and _drops_last(node.args[1]):
            dropped = True
        elif regrouped(node):
            if example(node).dim() == 4:
                grouped.append(node)
        elif not _changes_nothing(node):
            reason = f"the attention weights pass through {_name(node)}"


def _weighs_values(node: Node, weights: Node) -> Product | None:
    product = find_product(node)
    if product is None or product.left is not weights or product.of_rows or calls(node, *BADDBMM):
        return None
    same = example(product.right).dim() == example(weights).dim() == example(node).dim()
    return product if same else None


def _changes_nothing(node: Node) -> bool:
    """Whether `node` is what it was made from: a cast, a copy, or a factor of one, as dropout in eval can be."""
    if calls(node, *_MUL, *_DIV) and not is_in_place(node):
        left, right = node.args[0], argument(node, 1, "other")
        return constant(right) == 1 or (calls(node, *_MUL) and constant(left) == 1)
    return strip_casts(node) is not node or calls(node, "contiguous", "clone", torch.clone)


def _drops_last(index: Any) -> bool:
    if not isinstance(index, tuple) or index[-1] != slice(None, -1, None):
        return False
    return set(map(repr, index[:-1])) <= {"Ellipsis", repr(slice(None, None, None))}


def _walk_up(node: Any, scores: Scores) -> None:
    """Collect what was done to the product of queries and keys, from the softmax upwards."""
    walked = set()
    while True:
        walked.add(node)
        if isinstance(node, Node) and not walked.issuperset(writers(node)):
            raise NotUnderstood("the scores are written into")  # and read under the name from before
        if product := find_product(node):
            break
        node = _above(node, scores)
    if product.added is not None:
        scores.mask(product.added, "add", node, node, _factor(product.added_scale))
    scores.scale *= _factor(product.scale)
    _match_product(node, product, scores)


def _above(node: Any, scores: Scores) -> Node:
    """The scores before what `node` does to them, which is noted."""
    if not isinstance(node, Node):
        raise NotUnderstood("the scores are a constant")
    if is_in_place(node) and not owns(node):
        raise NotUnderstood("the scores are written into")
    if strip_copies(node) is not node:
        return strip_copies(node)
    if source := regrouped(node):
        scores.grouped += [held for held in (node, source) if example(held).dim() == 4]
        return source
    if calls(node, torch.cat, torch.concat):
        return _match_sinks(node, scores)
    if calls(node, *_SUB) and _is_row_maximum(node.args[1], node.args[0]):
        return node.args[0]
    if calls(node, *_ADD):
        if node.kwargs.get("alpha", 1) != 1:
            raise NotUnderstood("a mask is added with a factor")
        left, right = node.args
        if _leads_to_product(left) and _leads_to_product(right):
            raise NotUnderstood("two products of matrices are added")
        of_scores, mask = (left, right) if _leads_to_product(left) else (right, left)
        if not isinstance(mask, Node) or not isinstance(example(mask), Tensor) or not example(mask).is_floating_point():
            raise NotUnderstood("what is added to the scores is not a float tensor")
        scores.mask(mask, "add", node, of_scores)
        return of_scores
    if calls(node, *_FILL, *_WHERE):
        return _match_filled(node, scores)
    if calls(node, *_FLOOR):
        floor = argument(node, 1, "other", node.kwargs.get("min"))
        if len(node.args) + len(node.kwargs) != 2 or not _is_lowest(floor, example(node).dtype):
            raise NotUnderstood(f"the scores pass through {_name(node)}")
        return node.args[0]  # lowest is as good as minus infinity
    if calls(node, *_MUL, *_DIV):
        return _match_factor(node, scores)
    raise NotUnderstood(f"the scores pass through {_name(node)}")


def _match_filled(node: Node, scores: Scores) -> Node:
    """`masked_fill(scores, drop, lowest)`, `where(keep, scores, lowest)` or `where(drop, lowest, scores)`."""
    if calls(node, *_FILL):
        of_scores, mask, filler, kind = node.args[0], argument(node, 1, "mask"), argument(node, 2, "value"), "drop"
    else:
        if node.op == "call_method":
            of_scores, mask, filler = node.args[0], argument(node, 1, "condition"), argument(node, 2, "other")
        else:
            mask, of_scores, filler = (
                argument(node, i, name) for i, name in enumerate(("condition", "input", "other"))
            )
        kind = "keep"
        if not _leads_to_product(of_scores):
            of_scores, filler, kind = filler, of_scores, "drop"
    if not _is_lowest(filler, example(node).dtype) or (constant(filler) or 0.0) * scores.scale > _VANISHES:
        raise NotUnderstood("masked scores are not set to the lowest value")
    scores.mask(mask, kind, node, of_scores)
    return of_scores


def _factor(number: Any) -> float:
    found = constant(number)
    if found is None:
        raise NotUnderstood("the scores are scaled by a tensor")
    return found


def _match_factor(node: Node, scores: Scores) -> Node:
    """A factor: part of the scale, or of softcap * tanh(scores / softcap)."""
    divides = calls(node, *_DIV)
    left, right = node.args[0], argument(node, 1, "other")
    if not divides and constant(right) is None:
        left, right = right, left
    if not isinstance(left, Node) or constant(right) is None or node.kwargs.get("rounding_mode"):
        raise NotUnderstood("the scores are scaled by a tensor")
    factor = 1.0 / _factor(right) if divides else _factor(right)
    inner = strip_casts(left)
    if not calls(inner, *_TANH):
        scores.scale *= factor
        return left
    divided = strip_casts(inner.args[0])
    cap = None
    if calls(divided, *_DIV):
        cap = constant(argument(divided, 1, "other"))
    elif calls(divided, *_MUL) and (times := constant(argument(divided, 1, "other"))):
        cap = 1.0 / times
    if cap is None or abs(cap - factor) > 1e-6 * abs(factor):
        raise NotUnderstood("tanh of the scores is not a softcap")
    if scores.softcap:
        raise NotUnderstood("the scores have two softcaps")
    scores.softcap = factor * scores.scale
    if scores.softcap <= 0:
        raise NotUnderstood(f"the softcap of the scores is {scores.softcap}")
    return divided.args[0]


def _match_product(node: Node, product: Product, scores: Scores) -> None:
    query, key = strip_copies(product.left), rows_of(product.right, not product.of_rows)
    if (
        key is None
        or example(query).dim() != example(node).dim()
        or example(product.right).dim() != example(node).dim()
    ):
        raise NotUnderstood("the scores are not queries times transposed keys of batch, heads, tokens and head_dim")
    if example(node).dim() == 4:
        scores.heads = example(node).shape[1]
    else:
        scores.heads = example(key).shape[1]
        if not statically_known_true(example(key).shape[0] * scores.heads == example(query).shape[0]):
            raise NotUnderstood("queries and keys are of different batches or heads")
        split = split_heads(query)
        if example(split).dim() == 4 and statically_known_true(example(split).shape[1] == scores.heads):
            query = split
    scores.query, scores.key = query, key


def _match_sinks(node: Node, scores: Scores) -> Node:
    """`cat([scores, sinks.reshape(1, -1, 1, 1).expand(...)], -1)`: one more logit per head."""
    tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    behind = scores.masks or scores.softcap or scores.sinks is not None or scores.scale != 1.0 or scores.grouped
    if behind or dim not in (-1, 3) or len(tensors) != 2:
        raise NotUnderstood("the scores are concatenated with something")
    wide = strip_casts(tensors[1])
    expanded = strip_casts(wide.args[0]) if calls(wide, "expand") else wide
    heads = example(node).shape[1]
    base = strip_casts(expanded.args[0]) if calls(expanded, "reshape", "view", torch.reshape) else None
    shape = tuple(example(expanded).shape)
    if base is None or shape != (1, heads, 1, 1) or tuple(example(base).shape) != (heads,):
        raise NotUnderstood("the scores are concatenated with something that is not one sink per head")
    scores.sinks = base
    return tensors[0]


def _leads_to_product(node: Any, depth: int = 12) -> bool:
    """Whether the scores come from here rather than from the other operand of an addition."""
    if not isinstance(node, Node) or depth == 0:
        return False
    if find_product(node):
        return True
    node = strip_copies(node)
    if source := regrouped(node):
        return _leads_to_product(source, depth - 1)
    if find_product(node):
        return True
    if not calls(node, *_ADD, *_MUL, *_DIV, *_SUB, *_TANH, *_FILL, *_WHERE, *_FLOOR):
        return False
    return any(_leads_to_product(operand, depth - 1) for operand in (*node.args[:3], *node.kwargs.values()))


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
    return (
        argument(node, 1, "dim") in (-1, example(node.args[0]).dim() - 1)
        and argument(node, 2, "keepdim", False) is True
    )


def _is_lowest(filler: Any, dtype: torch.dtype) -> bool:
    number = constant(filler)
    return number is not None and number <= max(torch.finfo(dtype).min, -1e9)


def _name(node: Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
