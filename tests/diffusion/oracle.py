"""Strategies in plain torch: attention or blocks replaced while the model runs, by values that are kept by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

SDPA = torch.nn.functional.scaled_dot_product_attention


def newton(points: list[tuple[int, Tensor]], step: int) -> Tensor:
    """The polynomial through points (step, value), the newest first, by divided differences."""
    steps = [at for at, _ in points]
    column, total, factor = [value for _, value in points], points[0][1].clone(), 1.0
    for order in range(1, len(points)):
        column = [(column[i] - column[i + 1]) / (steps[i] - steps[i + order]) for i in range(len(column) - 1)]
        factor *= step - steps[order - 1]
        total = total + factor * column[0]
    return total


def near_by_mask(query: Tensor, key: Tensor, value: Tensor, width: int) -> Tensor:
    """Attention of runs of `width` tokens to their own and the neighbouring ones."""
    run = torch.arange(query.shape[-2]) // width
    return SDPA(query, key, value, attn_mask=(run[:, None] - run[None, :]).abs() <= 1)


class Attention(TorchFunctionMode):
    """Self-attention by `decide(step)`: "full", "near", or ("forecast", order).

    Attributes:
        width: of a run of a window.
        computed: how many sites were computed in full, by step.
    """

    def __init__(self, decide: Callable[[int], Any], width: int = 0) -> None:
        super().__init__()
        self.decide, self.width, self.computed = decide, width, []
        self.points: dict[int, list[tuple[int, Tensor]]] = {}
        self.lacked: dict[int, Tensor] = {}
        self.step, self.site = -1, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not SDPA:
            return func(*args, **kwargs)
        query, key, value = (kwargs.pop(n, a) for n, a in zip(("query", "key", "value"), (*args, None, None, None)))  # noqa: B905
        if query.shape[-2] != key.shape[-2]:
            return SDPA(query, key, value, *args[3:], **kwargs)
        site, what = self.site, self.decide(self.step)
        self.site += 1
        if what == "near":
            return near_by_mask(query, key, value, self.width) + self.lacked[site]
        points = self.points.setdefault(site, [])
        if what != "full":
            return newton(points[: what[1] + 1], self.step)
        out = SDPA(query, key, value, *args[3:], **kwargs)
        self.computed[-1] += 1
        points.insert(0, (self.step, out))
        if self.width:
            self.lacked[site] = out - near_by_mask(query, key, value, self.width)
        return out

    def call(self, model: Any, **given: Any) -> Tensor:
        self.step, self.site = self.step + 1, 0
        self.computed.append(0)
        with self:
            return model(**given)[0]


class Blocks:
    """A transformer whose blocks add what `decide(step, layer)` says: "full", or ("forecast", order)."""

    def __init__(self, model: Any, blocks: Any, decide: Callable[[int, int], Any]) -> None:
        self.model, self.blocks, self.decide, self.step = model, list(blocks), decide, -1
        self.points: list[list[tuple[int, Tensor]]] = [[] for _ in self.blocks]

    def call(self, **given: Any) -> Tensor:
        self.step += 1
        originals = [block.forward for block in self.blocks]
        for layer, original in enumerate(originals):
            self.blocks[layer].forward = self._forward(layer, original)
        try:
            return self.model(**given)[0]
        finally:
            for block in self.blocks:
                del block.forward

    def _forward(self, layer: int, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            hidden = args[0] if args else kwargs["hidden_states"]
            what = self.decide(self.step, layer)
            if what != "full":
                return hidden + newton(self.points[layer][: what[1] + 1], self.step)
            out = original(*args, **kwargs)
            self.points[layer].insert(0, (self.step, out - hidden))
            return out

        return forward
