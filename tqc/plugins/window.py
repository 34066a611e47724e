"""window: attention to near tokens, and what it lacked in the last computed step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tqc.plugins.step_strategy import FULL, WINDOW, Progress, StepStrategy


@dataclass(frozen=True)
class Window(StepStrategy):
    """Every n-th step computes all of attention, and keeps what a window would have lacked; the others add this to
    attention within the window. A window is a run of tokens in their order, `share` of all of them. Self-attention
    alone has windows."""

    name: ClassVar[str] = "window"
    paper: ClassVar[str] = "DiTFastAttn (arXiv 2406.08552)"

    every: int = 4
    share: float = 0.25

    def check(self) -> None:
        self.require("every", self.every >= 1, "at least 1")
        self.require("share", 0 < self.share < 1, "above 0 and below 1")

    @property
    def states(self) -> dict[str, int]:
        return {WINDOW: int(self.every > 1)}

    @property
    def window(self) -> float:
        return self.share

    def cell(self, progress: Progress) -> str:
        return WINDOW if progress.step % self.every else FULL


PLUGIN = Window
