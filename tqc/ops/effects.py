"""What a torch node writes into."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from tqc.ops.value import TENSORS, example
from tqc.torch_private import pytree

_IN_PLACE_OPERATORS = {
    operator.setitem,
    *(getattr(operator, name) for name in operator.__all__ if name.startswith("i") and hasattr(operator, name[1:])),
}


def written(node: Node) -> list[Node]:
    """Tensors that a node of a dynamo graph writes into: by name (`add_`), operator (`+=`), `out=`, or schema."""
    if node.op not in ("call_function", "call_method"):
        return []
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = (name.endswith("_") and not name.startswith("_")) or node.target in _IN_PLACE_OPERATORS
    targets: list[Any] = list(node.args[:1]) if in_place or name == "__setitem__" else []
    targets += pytree.tree_leaves(node.kwargs.get("out"))
    if schema := getattr(node.target, "_schema", None):
        for index, argument in enumerate(schema.arguments):
            if argument.is_write:
                targets += pytree.tree_leaves(node.args[index : index + 1] or node.kwargs.get(argument.name))
    held = [target for target in targets if isinstance(target, Node)]
    return [target for target in held if isinstance(example(target), TENSORS)]
