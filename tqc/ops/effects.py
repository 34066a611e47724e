"""What a torch node writes into."""

from __future__ import annotations

import operator
from types import FunctionType
from typing import Any

from torch.fx import Node

from tqc.ops.value import TENSORS, example
from tqc.torch_private import pytree

# `iadd`, but also `iand`, whose other form is `and_`.
_IN_PLACE = {
    n for n in operator.__all__ if n[0] == "i" and (hasattr(operator, n[1:]) or hasattr(operator, f"{n[1:]}_"))
}
_IN_PLACE_OPERATORS = {operator.setitem, *(getattr(operator, name) for name in _IN_PLACE)}
_IN_PLACE_METHODS = {"__setitem__", *(f"__{name}__" for name in _IN_PLACE)}


def written(node: Node) -> list[Node]:
    """Tensors that a node of a dynamo graph writes into: by name (`add_`), operator (`+=`), `inplace=True`, `out=`, or
    schema."""
    if node.op not in ("call_function", "call_method"):
        return []
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_METHODS
    targets: list[Any] = []
    if in_place or node.target in _IN_PLACE_OPERATORS or _told_inplace(node):
        targets += pytree.tree_leaves(node.args[:1] or node.kwargs.get("input"))
    targets += pytree.tree_leaves(node.kwargs.get("out"))
    if schema := getattr(node.target, "_schema", None):
        for index, argument in enumerate(schema.arguments):
            if argument.is_write:
                targets += pytree.tree_leaves(node.args[index : index + 1] or node.kwargs.get(argument.name))
    held = [target for target in targets if isinstance(target, Node)]
    return [target for target in held if isinstance(example(target), TENSORS)]


def _told_inplace(node: Node) -> bool:
    """Whether a function has a true argument `inplace`, as those of `torch.nn.functional` have."""
    code = node.target.__code__ if isinstance(node.target, FunctionType) else None
    names = code.co_varnames[: code.co_argcount] if code else ()
    position = names.index("inplace") if "inplace" in names else len(node.args)
    return bool(node.kwargs.get("inplace") or any(node.args[position : position + 1]))
