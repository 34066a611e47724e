"""Find the linear layers on either side of attention: the one that makes the values, the one that takes the output.

The rotation of V can be folded into their weights if nothing but attention sees the values, and nothing but the second
layer sees the output, each head as it is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tqc.config import cacheable_dtype
from tqc.ops import example
from tqc.passes.finders.cache import CacheWrite
from tqc.passes.finders.site import Attention
from tqc.passes.graph import calls

_RESHAPE = ("view", "reshape", torch.reshape)
_FULL = slice(None, None, None)


@dataclass(frozen=True)
class Projection:
    """A linear layer. Features [start, stop) of what it makes, or takes, are the vectors of the heads in order."""

    linear: Node
    start: int
    stop: int


def find_value_projection(attention: Attention, write: CacheWrite) -> Projection | str:
    """The layer that makes the new values, or why the rotation cannot be folded into one."""
    assert write.new
    node = _strip(write.new)
    if not _swaps_heads_and_tokens(node):
        return f"the values come from {_name(node)}"
    split = _strip(node.args[0])
    if not calls(split, *_RESHAPE) or not _merges_heads(split.args[0], split):
        return f"the values come from {_name(split)}"
    source = linear = split.args[0]
    start, stop = 0, example(source).shape[-1]
    if part := _features(source):  # one layer for queries, keys and values
        linear, (start, stop) = source.args[0], part
        for other in _readers(linear):
            features = _features(other)
            if other is not source and (features is None or max(start, features[0]) < min(stop, features[1])):
                return f"the values are also read by {_name(other)}"
    if not _is_linear(linear):
        return f"the values come from {_name(linear)}"
    reason = _why_read_elsewhere(source, attention, write) or _why_not_weights(weights_of(linear))
    return reason or Projection(linear, start, stop)


def find_output_projection(attention: Attention) -> Projection | str:
    """The layer that takes the output of attention, or why the rotation cannot be folded into one."""
    node = attention.output
    for fits in (
        _swaps_heads_and_tokens,
        lambda merged: calls(merged, *_RESHAPE) and _merges_heads(merged, merged.args[0]),
        _is_linear,
    ):
        readers = _readers(node)
        while len(readers) == 1 and _changes_nothing(readers[0]):
            readers = _readers(readers[0])
        if len(readers) != 1:
            return f"the output is read by {', '.join(map(_name, readers))}"
        if not fits(readers[0]):
            return f"the output goes to {_name(readers[0])}"
        node = readers[0]
    return _why_not_weights(weights_of(node)[:1]) or Projection(node, 0, example(node.args[0]).shape[-1])


def weights_of(linear: Node) -> list[Node]:
    """Weight and, if there is one, bias."""
    return [weight for weight in linear.args[1:] if isinstance(weight, Node)]


def _is_linear(node: Node) -> bool:
    return calls(node, torch.nn.functional.linear) and not node.kwargs


def _readers(node: Node) -> list[Node]:
    """Users that see more of `node` than its sizes."""
    return [user for user in node.users if not isinstance(example(user), (int, torch.SymInt, torch.Size))]


def _why_read_elsewhere(node: Node, attention: Attention, write: CacheWrite) -> str | None:
    """Why not all of what `node` holds goes straight into the cache and into attention, as its values alone."""
    while node is not attention.output:
        readers = _readers(node)
        if node is write.node:
            readers = [user for user in readers if user.op != "output" and user is not write.kept]
        if len(readers) != 1:
            return f"the values are read by {', '.join(map(_name, readers))}"
        if node in (attention.query, attention.key):
            return "the values are also queries or keys"
        node = readers[0]
    return None


def _why_not_weights(weights: list[Node]) -> str | None:
    for weight in weights:
        if weight.op == "get_attr":
            held = operator.attrgetter(str(weight.target))(weight.graph.owning_module)
        elif weight.op == "placeholder" and isinstance(example(weight), torch.nn.Parameter):
            held = example(weight)
        else:
            return f"a weight is no parameter but comes from {_name(weight)}"
        if not isinstance(held, Tensor) or not cacheable_dtype(held.dtype):
            return f"a weight is {getattr(held, 'dtype', held)}"
    return None


def _strip(node: Node) -> Node:
    while _changes_nothing(node):
        node = node.args[0]
    return node


def _changes_nothing(node: Node) -> bool:
    """Whether `node` is what it was made from, or a copy."""
    if calls(node, *_RESHAPE):
        before, after = example(node.args[0]).shape, example(node).shape
        return len(before) == len(after) and all(map(statically_known_true, map(operator.eq, before, after)))
    return calls(node, "contiguous")


def _swaps_heads_and_tokens(node: Node) -> bool:
    """Whether `node` makes [a, c, b, d] of [a, b, c, d]."""
    if calls(node, "transpose", torch.transpose):
        return example(node).dim() == 4 and {dim % 4 for dim in node.args[1:]} == {1, 2}
    if calls(node, "permute", torch.permute):
        order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return [dim % 4 for dim in order] == [0, 2, 1, 3]
    return False


def _merges_heads(flat: Node, split: Node) -> bool:
    """Whether these are the same vectors, [batch, tokens, heads * head_dim] and [batch, tokens, heads, head_dim]."""
    if example(flat).dim() != 3 or example(split).dim() != 4:
        return False
    (batch, tokens, features), (*outer, heads, head_dim) = example(flat).shape, example(split).shape
    same = statically_known_true(batch == outer[0]) and statically_known_true(tokens == outer[1])
    return same and isinstance(features, int) and features == heads * head_dim


def _features(node: Node) -> tuple[int, int] | None:
    """(start, stop) of `x[..., start:stop]`, None for anything else."""
    if not calls(node, operator.getitem) or not isinstance(node.args[1], tuple):
        return None
    *others, last = node.args[1]
    if others not in ([Ellipsis], [_FULL, _FULL]) or not isinstance(last, slice) or last.step not in (None, 1):
        return None
    start, stop, _ = last.indices(example(node.args[0]).shape[-1])
    return start, stop


def _name(node: Node) -> str:
    if node.op in ("placeholder", "output"):
        return f"an {'input' if node.op == 'placeholder' else 'output'} of the graph"
    return str(getattr(node.target, "__name__", node.target))
