"""delta: attention goes on in a line while the line met what was computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tqc.plugins.step_strategy import BLOCK, BY_ORDER, FULL, SHARED, Progress, StepStrategy


@dataclass(frozen=True)
class Delta(StepStrategy):
    """A closed loop: each computed step tells what the forecasts from the steps before would have missed of it, over
    all layers. While the best one, of order `ORDER` or less, is expected to miss less than `threshold`, and for `limit`
    steps at most, attention (with `blocks` all that a block adds) is that forecast; else the step is computed. What is
    missed grows with the (order + 1)-th power of the steps ahead. tqai's delta compared true neighbours, which no
    decoder has."""

    name: ClassVar[str] = "delta"
    paper: ClassVar[str] = "QuantSparse (arXiv 2509.23681); tqai 0.4, strategy delta"
    measures: ClassVar[bool] = True
    ORDER: ClassVar[int] = 1

    threshold: float = 0.1
    limit: int = 4
    blocks: bool = False

    def check(self) -> None:
        self.require("threshold", self.threshold >= 0, "at least 0")
        self.require("limit", self.limit >= 1, "at least 1")

    @property
    def states(self) -> dict[str, int]:
        return {BLOCK if self.blocks else SHARED: self.ORDER + 1}

    def cell(self, progress: Progress) -> str:
        missed = [
            error * (progress.ahead / progress.gap) ** (order + 1)
            for order, error in enumerate(progress.errors[: self.ORDER + 1])
        ]
        if not missed or progress.ahead > self.limit or min(missed) * progress.weight >= self.threshold:
            return FULL
        return BY_ORDER[self.blocks][missed.index(min(missed))]


PLUGIN = Delta
