"""first_block: a step whose first block adds nearly what it added before adds no more than its other blocks did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tqc.plugins.step_strategy import BLOCK, BY_ORDER, FULL, Progress, StepStrategy


@dataclass(frozen=True)
class FirstBlock(StepStrategy):
    """The first block is computed in each step. While the relative changes of what it adds sum up to less than
    `threshold` since the last computed step, all other blocks add what they added there, or what a forecast of `order`
    says; else they are computed."""

    name: ClassVar[str] = "first_block"
    paper: ClassVar[str] = "First Block Cache (ParaAttention), TeaCache (arXiv 2411.19108)"
    probes: ClassVar[bool] = True

    threshold: float = 0.1
    order: int = 0

    def check(self) -> None:
        self.require("threshold", self.threshold >= 0, "at least 0")
        self.require("order", self.order in (0, 1, 2), "0, 1 or 2")

    @property
    def states(self) -> dict[str, int]:
        return {BLOCK: self.order + 1}

    def cell(self, progress: Progress) -> str:
        return BY_ORDER[True][self.order] if progress.change < self.threshold else FULL


PLUGIN = FirstBlock
