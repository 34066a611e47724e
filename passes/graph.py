"""Small questions about FX nodes, asked by every pass. Graphs are dynamo's: torch functions and tensor methods."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
from torch.fx import Graph, Node

from tqc.ops import TENSORS, example
from tqc.ops.effects import written
from tqc.torch_private import MODULE_STACK


def calls(node: Any, *targets: Any) -> bool:
    """Whether `node` calls one of `targets`: functions, or names of tensor methods."""
    if not isinstance(node, Node):
        return False
    return node.op in ("call_function", "call_method") and node.target in targets


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def layer_name(node: Node) -> str:
    """Path of the module that a node was traced in, such as `model.layers.3.self_attn`."""
    stack = node.meta.get(MODULE_STACK)
    if not stack:
        return node.name
    path = list(stack.values())[-1][0]
    return str(path).removeprefix("L['self'].").removeprefix("L['self']")


# As dynamo spells the children of the module that it was called with.
_MODULES = re.compile(r"(?:__dict__\['_modules'\]|_modules)\['([^']+)'\]")


def module_path(node: Node) -> str:
    """`layer_name` as `named_modules` of the compiled module has it; "" where the node belongs to none."""
    return _MODULES.sub(r"\1", layer_name(node)) if node.meta.get(MODULE_STACK) else ""


def layer_numbers(node: Node) -> tuple[int, ...]:
    """The numbers in the path of the module that a node was traced in: 3 of `model.layers.3.self_attn`."""
    path = layer_name(node) if node.meta.get(MODULE_STACK) else ""
    return tuple(map(int, re.findall(r"(?:^|[.\['])(\d+)(?=[.\]']|$)", path)))


def model_name(graph: Graph) -> str:
    """Class of the outermost module that a graph was traced in."""
    stacks = (node.meta.get(MODULE_STACK) for node in graph.nodes)
    outermost = next((list(stack.values())[0][1] for stack in stacks if stack), "a function")
    return str(getattr(outermost, "__name__", outermost)).rsplit(".", 1)[-1]


def strip_repeat(node: Node, heads: int) -> tuple[Node, int]:
    """Undo `repeat_kv`: the node before its heads were repeated, and how often each was.

    Knows `unsqueeze`/`[:, :, None]` then `expand` then `reshape`, and `repeat_interleave` along the heads. Where the
    chain does anything else, the node itself and 1 are returned.

    Args:
        heads: query heads; a repetition must lead to just as many.
    """
    shape = example(node).shape
    if len(shape) != 4 or shape[1] != heads:
        return node, 1
    if calls(node, torch.repeat_interleave, "repeat_interleave"):
        repeats, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
        return (node.args[0], repeats) if dim in (1, -3) and isinstance(repeats, int) else (node, 1)
    if not calls(node, "reshape", "view", torch.reshape):
        return node, 1
    expand = node.args[0]
    if not calls(expand, "expand", torch.Tensor.expand):
        return node, 1
    insert = expand.args[0]
    if calls(insert, operator.getitem):
        full = slice(None, None, None)
        index = insert.args[1]
        inserted = (
            isinstance(index, tuple)
            and index[:3] == (full, full, None)
            and set(map(repr, index[3:])) <= {repr(full), "Ellipsis"}
        )
    else:
        inserted = calls(insert, "unsqueeze", torch.unsqueeze) and argument(insert, 1, "dim") in (2, -3)
    if not inserted:
        return node, 1
    source = insert.args[0]
    before, spread = example(source), example(expand)
    if not isinstance(before, TENSORS) or before.dim() != 4 or spread.dim() != 5:
        return node, 1
    if before.shape[1] * spread.shape[2] != heads or tuple(spread.shape[3:]) != tuple(shape[2:]):
        return node, 1
    return source, int(spread.shape[2])


# Makes tensors of its own, which alias no other.
_ARITHMETIC = {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.matmul, torch.bmm, torch.baddbmm),
    *("add", "sub", "mul", "div", "matmul", "bmm", "baddbmm", "masked_fill"),
    *(torch.masked_fill, torch.where, "where", torch.tanh, "tanh", torch.einsum),
    *(torch.max, torch.maximum, torch.clamp, "max", "maximum", "clamp", "clamp_min", torch.roll, "roll"),
}
_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
_VIEWS = {
    *(
        "view",
        "transpose",
        "unsqueeze",
        "squeeze",
        "narrow",
        "permute",
        "expand",
        "select",
        "detach",
        "unbind",
        "chunk",
        "flatten",
        "unflatten",
        "swapaxes",
        "swapdims",
    ),
}
_VIEW_FUNCTIONS = {operator.getitem, torch.transpose, torch.narrow, torch.unsqueeze, torch.select, torch.permute}


def rearranges(node: Node) -> bool:
    """Whether `node` holds the same elements as its first argument: a view, a copy, a repetition or another dtype."""
    if node.op == "call_method":
        return node.target in _VIEWS | _CASTS | {"reshape", "contiguous", "repeat_interleave"}
    functions = (*_VIEW_FUNCTIONS, torch.ops.aten.mT, torch.reshape, torch.flatten, torch.repeat_interleave)
    return calls(node, *functions) or (calls(node, getattr) and node.args[1] == "mT")


def strip_casts(node: Any) -> Any:
    """The node before it was converted to another floating dtype on the same device."""
    while isinstance(node, Node) and node.op == "call_method" and node.target in _CASTS:
        before, after = example(node.args[0]), example(node)
        if not isinstance(before, TENSORS) or not before.is_floating_point() or not after.is_floating_point():
            break
        if before.device != after.device:
            break
        node = node.args[0]
    return node


# Types of what can be asked of a tensor without a look at its elements.
MEASURES = (int, torch.SymInt, torch.Size, torch.dtype, torch.device)


def is_in_place(node: Node) -> bool:
    """Whether `node` writes into a tensor."""
    return bool(written(node))


def owns(node: Node) -> bool:
    """Whether `node` writes in place into what arithmetic has just made, or a view of it, and nothing else reads."""
    target = node.args[0] if node.args else None
    if not isinstance(target, Node) or written(node) != [target]:
        return False
    reader = node
    while set(target.users) == {reader} and target.args and rearranges(target):
        reader, target = target, target.args[0]
    alone = isinstance(target, Node) and set(target.users) == {reader}
    return alone and (calls(target, *_ARITHMETIC) or (is_in_place(target) and owns(target)))


def constant(held: Any) -> float | None:
    """A number, or that of a tensor which holds just one and is made of a number in the graph; None for others."""
    if isinstance(held, (int, float)):
        return None if isinstance(held, bool) else float(held)
    node = strip_casts(held)
    if not isinstance(node, Node) or not isinstance(example(node), torch.Tensor) or example(node).dim():
        return None
    if calls(node, torch.tensor, torch.scalar_tensor):
        return constant(argument(node, 0, "data"))
    if calls(node, torch.full, "new_full", torch.full_like):
        return constant(argument(node, 2 if node.target == "new_full" else 1, "fill_value"))
    return constant(argument(node, 1, "data")) if calls(node, "new_tensor") else None


def writers(node: Node) -> list[Node]:
    """Nodes that write into the tensor of `node`, directly or through a view."""
    found = []
    for user in node.users:
        if node in written(user):
            found += [user, *writers(user)]
        elif isinstance(example(user), TENSORS) and rearranges(user):  # which may be a view
            found += writers(user)
    return found
