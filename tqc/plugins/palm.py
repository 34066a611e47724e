"""PALM: tokens that are new to what came before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tqc.plugins.scorer import Scorer, Span


@dataclass(frozen=True)
class Palm(Scorer):
    """Distance of a key from the running mean of keys, over its own norm: novelty, as tqai's palm has it
    per call, here per token and head.

    The mean decays by `ema_decay` a token, and moves on with each group.
    """

    name: ClassVar[str] = "palm"
    paper: ClassVar[str] = "tqai 0.4, scorer palm"
    state_rows: ClassVar[int] = 1

    ema_decay: float = 0.95

    def check(self) -> None:
        self.require("ema_decay", 0 <= self.ema_decay < 1, "at least 0 and below 1")

    def score_and_update(self, span: Span, state: Tensor) -> tuple[Tensor, Tensor]:
        keys = span.group_keys
        back = torch.arange(span.size - 1, -1, -1, device=keys.device, dtype=torch.float32)
        # Mean before each token: what is left of the state, and the tokens of the group before it.
        apart = back[0] - back[None, :] - (back[0] - back[:, None])  # how many tokens row comes behind column
        weights = torch.where(apart < 0, (1 - self.ema_decay) * self.ema_decay ** (-apart - 1), 0.0)
        left = self.ema_decay ** (span.size - 1 - back).unsqueeze(-1)
        before = left * state + weights @ keys
        novelty = (keys - before).norm(dim=-1) / keys.norm(dim=-1).clamp_min(1e-6)
        after = self.ema_decay**span.size * state
        after = after + ((1 - self.ema_decay) * self.ema_decay ** back.unsqueeze(-1) * keys).sum(-2, keepdim=True)
        return novelty, after


PLUGIN = Palm
