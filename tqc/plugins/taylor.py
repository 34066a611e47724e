"""taylor: attention is forecast from the last computed steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tqc.plugins.step_strategy import BLOCK, BY_ORDER, FULL, SHARED, Progress, StepStrategy


@dataclass(frozen=True)
class Taylor(StepStrategy):
    """The first `warmup` steps and every n-th behind them are computed; in those between attention (with `blocks` all
    that a block adds) goes on as the polynomial through the last order + 1 computed steps. TaylorSeer's own second
    difference is a backward one, which misses curves that this one meets."""

    name: ClassVar[str] = "taylor"
    paper: ClassVar[str] = "TaylorSeer (arXiv 2503.06923)"

    every: int = 3
    order: int = 1
    warmup: int = 3
    blocks: bool = False

    def check(self) -> None:
        self.require("every", self.every >= 1, "at least 1")
        self.require("order", self.order in (0, 1, 2), "0, 1 or 2")
        self.require("warmup", self.warmup >= 1, "at least 1")

    @property
    def states(self) -> dict[str, int]:
        return {BLOCK if self.blocks else SHARED: self.order + 1 if self.every > 1 else 0}

    def cell(self, progress: Progress) -> str:
        behind = progress.step - self.warmup + 1
        return FULL if behind <= 0 or behind % self.every == 0 else BY_ORDER[self.blocks][self.order]


PLUGIN = Taylor
