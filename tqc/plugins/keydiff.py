"""KeyDiff: keys unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tqc.plugins.scorer import Scorer, Span


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """The less a key points where the mean of all unit keys so far points, the higher its score."""

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "KeyDiff (arXiv 2504.15364)"
    state_rows: ClassVar[int] = 1  # mean of the groups before, which counts as the number of tokens in a span

    decay: float = 0.9

    def check(self) -> None:
        self.require("decay", 0 <= self.decay < 1, "at least 0 and below 1")

    def score_and_update(self, span: Span, state: Tensor) -> tuple[Tensor, Tensor]:
        unit = torch.nn.functional.normalize(span.keys, dim=-1)
        mean = self.decay * state + (1 - self.decay) * unit.mean(-2, keepdim=True)
        anchor = torch.nn.functional.normalize(mean, dim=-1)
        return -(unit[..., : span.size, :] * anchor).sum(-1), mean


PLUGIN = KeyDiff
