"""Monitors: what is looked at, while a model generates, in one head of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tqc.plugins.plugin import Plugin


@dataclass(frozen=True)
class Moment:
    """One step of one head: the last query of each query head that looks at it, and all tokens as they came.

    Attributes:
        query: float32 [repeats, head_dim].
        output: what the packed attention gave, float32 [repeats, head_dim_v].
        keys, values: float32 [tokens, head_dim], the step's own included.
        mask: added to the scores, broadcastable to [repeats, tokens], or None.
        sinks: a logit that joins each softmax with a value of zero, [repeats], or None.
        scale, softcap: of the scores, as in `tqc.ops.attend`.
    """

    query: Tensor
    output: Tensor
    keys: Tensor
    values: Tensor
    mask: Tensor | None = None
    sinks: Tensor | None = None
    scale: float = 1.0
    softcap: float = 0.0

    def weights(self) -> Tensor:
        """Exact weights of the tokens, [repeats, tokens]."""
        scores = self.query @ self.keys.T * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.mask is not None:
            scores = scores + self.mask
        if self.sinks is None:
            return scores.softmax(-1)
        return torch.cat([scores, self.sinks[:, None].float()], -1).softmax(-1)[:, :-1]


@dataclass(frozen=True)
class Monitor(Plugin):
    """Makes a row of numbers of each step it looks at, on the device and without a look at them on the host, and says
    what a record of such rows tells when it is asked.

    Attributes:
        columns: names of the numbers.
    """

    kind: ClassVar[str] = "monitor"
    columns: ClassVar[tuple[str, ...]] = ()

    head: int = 0
    every: int = 4

    def check(self) -> None:
        self.require("head", self.head >= 0, "a head's number")
        self.require("every", self.every >= 1, "1 or more steps")

    def state(self, moment: Moment) -> tuple[Tensor, ...]:
        """What it keeps from step to step, before the first one."""
        return ()

    def observe(self, moment: Moment, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The step's row, float32 [columns], and the state behind it."""
        raise NotImplementedError

    def judge(self, record: Tensor) -> str | None:
        """What is wrong, from rows [steps, columns] on the CPU, oldest first; None if nothing is."""
        raise NotImplementedError
