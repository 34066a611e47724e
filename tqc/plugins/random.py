"""Random: the control that a scorer must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tqc.plugins.scorer import Scorer, Span


@dataclass(frozen=True)
class Random(Scorer):
    """A number for each position and head, the same in every run of one `seed`."""

    name: ClassVar[str] = "random"

    seed: int = 0

    def check(self) -> None:
        self.require("seed", 0 <= self.seed < 2**31, "at least 0 and below 2**31")

    def score(self, span: Span) -> Tensor:
        heads = torch.arange(span.keys.shape[1], device=span.keys.device)[:, None, None]
        place = torch.arange(span.size, device=span.keys.device)
        number = (span.first[:, None] + place + 1) * 12.9898 + heads * 78.233 + self.seed * 37.719
        noise = torch.sin(number.float()) * 43758.547
        return (noise - noise.floor()).expand(span.keys.shape[0], -1, -1, -1)


PLUGIN = Random
