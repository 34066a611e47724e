"""share: attention is that of the last computed step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tqc.plugins.step_strategy import BLOCK, BY_ORDER, FULL, SHARED, Progress, StepStrategy


@dataclass(frozen=True)
class Share(StepStrategy):
    """Every n-th step is computed, and those between share its attention; with `blocks` all that a block adds."""

    name: ClassVar[str] = "share"
    paper: ClassVar[str] = "Pyramid Attention Broadcast (arXiv 2408.12588)"

    every: int = 2
    blocks: bool = False

    def check(self) -> None:
        self.require("every", self.every >= 1, "at least 1")

    @property
    def states(self) -> dict[str, int]:
        return {BLOCK if self.blocks else SHARED: int(self.every > 1)}

    def cell(self, progress: Progress) -> str:
        return BY_ORDER[self.blocks][0] if progress.step % self.every else FULL


PLUGIN = Share
