"""Run a rewritten graph with the meaning of its ops: the oracle that every target is tested against."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from tqc.ops.effects import written
from tqc.ops.update import update
from tqc.ops.value import Planes


class _Interpreter(torch.fx.Interpreter):
    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.updates: dict[str, Planes] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.target is update:
            cache: Any = n.args[0]
            self.updates[cache.name] = result
        return result


def interpret(gm: GraphModule, *inputs: Any) -> tuple[Any, dict[str, Planes]]:
    """Run a graph that the passes have rewritten, without kernels, and without a change to its inputs.

    Args:
        inputs: one a placeholder: tensors, numbers, and `Planes` where the graph takes a packed cache.

    Returns:
        (what the graph returns, with `Planes` for packed caches; by the name of an input, what it has become).
    """
    targets = {target for node in gm.graph.nodes for target in written(node)}
    placeholders = gm.graph.find_nodes(op="placeholder")
    own = (x.clone() if node in targets else x for node, x in zip(placeholders, inputs, strict=True))
    interpreter = _Interpreter(gm)
    return interpreter.run(*own), interpreter.updates
