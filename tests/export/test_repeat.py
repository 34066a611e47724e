"""Layers that are alike in a graph: one stays, others become calls, and unlike ones are left alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import symbolic_trace

from tqc.export.repeat import outline


class Layers(torch.nn.Module):
    """Layers with a weight each; `scales` make layers that differ unlike."""

    def __init__(self, scales: tuple[float, ...]) -> None:
        super().__init__()
        self.scales = scales
        for number in range(len(scales)):
            self.register_buffer(f"weight{number}", torch.full((4, 4), 0.1 * (number + 1)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        kept = []
        for number, scale in enumerate(self.scales):
            y = x @ getattr(self, f"weight{number}")
            kept.append(y)
            x = torch.nn.functional.softmax(y * scale, dim=-1)
        return (x * 2.0, *kept)


def kinds(scales: tuple[float, ...]) -> list[str]:
    gm = symbolic_trace(Layers(scales))
    outline(gm)
    return [node.target.function for node in gm.graph.nodes if hasattr(node.target, "function")]


def test_like_layers_become_calls_of_one() -> None:
    assert kinds((1.0,) * 4) == ["enter_0", "leave_0", "repeat_0", "repeat_0", "repeat_0"]


def test_unlike_layers_stay() -> None:
    assert kinds((1.0, 2.0, 3.0)) == []
    assert kinds((1.0, 2.0, 1.0)) == ["enter_0", "leave_0", "repeat_0"]


def test_a_repeat_takes_what_its_own_layer_took() -> None:
    gm = symbolic_trace(Layers((1.0,) * 3))
    outline(gm)
    calls = {node.target.function: node for node in gm.graph.nodes if hasattr(node.target, "function")}
    names = [operand.name for operand in calls["repeat_0"].args]
    assert names[1] == "weight2" and len(names) == len(calls["enter_0"].args) == 2
    before = calls["repeat_0"].args[0]
    assert before.args[0].target.function == "repeat_0"  # what the layer before it returned
    assert not any(node.op == "call_function" and not node.users for node in gm.graph.nodes)
