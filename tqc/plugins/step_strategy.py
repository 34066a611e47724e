"""Strategies of diffusion transformers: what a denoising step computes, and what it takes from the steps before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tqc.plugins.plugin import Plugin

FULL = "full"
# What attention gave, from the last computed step, or forecast from the last two or three.
SHARED, LINEAR, QUADRATIC = "shared", "linear", "quadratic"
# Attention to near tokens, and what it lacked in the last computed step.
WINDOW = "window"
# What a whole block adds to its input, likewise.
BLOCK, BLOCK_LINEAR, BLOCK_QUADRATIC = "block", "block_linear", "block_quadratic"
BY_ORDER = {False: (SHARED, LINEAR, QUADRATIC), True: (BLOCK, BLOCK_LINEAR, BLOCK_QUADRATIC)}
CELLS = (FULL, *BY_ORDER[False], WINDOW, *BY_ORDER[True])


@dataclass(frozen=True)
class Progress:
    """Where a generation stands before a step.

    Attributes:
        step: its number, from 0.
        ahead: steps since the last computed one, which the next is one of.
        gap: steps between the last two computed ones.
        errors: what forecasts of order 0, 1 and 2 would have missed of the last computed step, relative to it; as many
            as there were states for.
        change: for strategies that probe, the relative changes of what the first block adds, summed up since the last
            computed step.
        weight: of this step's error, around 1.
    """

    step: int
    ahead: int = 1
    gap: int = 1
    errors: tuple[float, ...] = ()
    change: float = float("inf")
    weight: float = 1.0


@dataclass(frozen=True)
class StepStrategy(Plugin):
    """Says for each step what its layers do, one of `CELLS`. What it asks for is computed where there is no state yet.

    Attributes:
        measures: whether `Progress.errors` are to be measured, which costs a pass over the states of computed steps.
        probes: whether the first block is to be computed before it decides, for `Progress.change`.
    """

    kind: ClassVar[str] = "strategy"
    measures: ClassVar[bool] = False
    probes: ClassVar[bool] = False

    @property
    def states(self) -> dict[str, int]:
        """How many computed steps' states it reads, by what they are of: `SHARED`, `WINDOW` or `BLOCK`."""
        raise NotImplementedError

    @property
    def window(self) -> float:
        """Share of the tokens that a query sees in a window; 0 where there are none."""
        return 0.0

    def cell(self, progress: Progress) -> str:
        raise NotImplementedError
