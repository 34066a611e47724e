"""Lyapunov: how fast steps that were alike part, a finite-time exponent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tqc.plugins.monitor import Moment, Monitor


@dataclass(frozen=True)
class Lyapunov(Monitor):
    """Of each step's attention output the nearest one among the `window` steps before it stands for a perturbed copy;
    the row is the log of how much farther apart the two are one step later. The mean of that is the largest exponent of
    a time series in finite time: log 1.3 a step for states that part by 1.3. It warns above `threshold`.

    tqai's monitor of this name has the log of one step's relative change, which is no exponent."""

    name: ClassVar[str] = "lyapunov"
    paper: ClassVar[str] = "Rosenstein, Collins, De Luca 1993"
    columns: ClassVar[tuple[str, ...]] = ("log growth",)

    every: int = 1
    window: int = 64
    apart: int = 2
    threshold: float = 0.2

    def check(self) -> None:
        super().check()
        self.require("every", self.every == 1, "1, as growth is that between two steps")
        self.require("window", self.window >= 2, "2 or more steps")
        self.require("apart", 1 <= self.apart < self.window, "1 or more, and less than window")

    def state(self, moment: Moment) -> tuple[Tensor, ...]:
        """Outputs of the last steps, newest last, NaN where there was none; the neighbour of the last one, counted from
        the end, and how far it was."""
        past = torch.full((self.window, moment.output.numel()), torch.nan, device=moment.output.device)
        return past, past.new_zeros(1, dtype=torch.int64), past.new_full((1,), torch.nan)

    def observe(self, moment: Moment, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        past, neighbour, before = state
        now = moment.output.flatten()
        distances = (past - now).norm(dim=-1)
        # What was the neighbour's number from the end is, one step on, that of the step behind it.
        growth = (distances.flip(0).gather(0, neighbour) / before).clamp_min(1e-20).log()
        old = distances.flip(0)[self.apart - 1 :]
        nearest = torch.where(old > 0, old, torch.inf).min(0, keepdim=True)
        known = torch.where(nearest.values < torch.inf, nearest.values, torch.nan)
        return growth, (torch.cat([past[1:], now[None]]), nearest.indices + self.apart - 1, known)

    def judge(self, record: Tensor) -> str | None:
        growth = record[:, 0][record[:, 0].isfinite()]
        if not len(growth) or float(growth.mean()) <= self.threshold:
            return None
        return f"steps that are alike part by a factor of {float(growth.mean().exp()):.3g} a step"


PLUGIN = Lyapunov
