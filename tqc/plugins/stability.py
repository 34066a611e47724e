"""Stability: whether attention goes on to be as spread as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tqc.plugins.monitor import Moment, Monitor


@dataclass(frozen=True)
class Stability(Monitor):
    """Entropy of the head's weights over the most that it can be, log of the tokens. It warns where the mean of the
    last `recent` looks is off the mean of those before by the share `threshold`."""

    name: ClassVar[str] = "stability"
    paper: ClassVar[str] = "tqai 0.4, monitor stability"
    columns: ClassVar[tuple[str, ...]] = ("entropy",)

    every: int = 1
    recent: int = 10
    threshold: float = 0.3

    def check(self) -> None:
        super().check()
        self.require("recent", self.recent >= 1, "1 or more")
        self.require("threshold", self.threshold > 0, "above 0")

    def observe(self, moment: Moment, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        weights = moment.weights()
        most = torch.tensor(float(max(2, weights.shape[-1]))).log()
        entropy = -torch.special.xlogy(weights, weights).sum(-1).mean() / most
        return entropy[None], state

    def judge(self, record: Tensor) -> str | None:
        before, recent = record[: -self.recent, 0], record[-self.recent :, 0]
        if len(before) < self.recent:
            return None
        moved = float(recent.mean() / before.mean().clamp_min(1e-20) - 1)
        if abs(moved) <= self.threshold:
            return None
        return f"the entropy of attention {'rose' if moved > 0 else 'fell'} by {abs(moved):.0%} in {self.recent} looks"


PLUGIN = Stability
