"""SNR: tokens that say much over the noise of their head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tqc.plugins.scorer import Scorer, Span


@dataclass(frozen=True)
class Snr(Scorer):
    """Energy of a token's value over what is left of it when the mean value of the group is taken away, times that of
    its key: tqai's snr looks at the step of a diffusion model, which a token does not have."""

    name: ClassVar[str] = "snr"
    paper: ClassVar[str] = "tqai 0.4, scorer snr"

    epsilon: float = 1e-6

    def check(self) -> None:
        self.require("epsilon", self.epsilon > 0, "above 0")

    def score(self, span: Span) -> Tensor:
        return self._ratio(span.group_keys) * self._ratio(span.group_values)

    def _ratio(self, x: Tensor) -> Tensor:
        noise = (x - x.mean(-2, keepdim=True)).square().mean((-1, -2)).unsqueeze(-1)
        return (x - x.mean(-2, keepdim=True)).square().mean(-1) / (noise + self.epsilon)


PLUGIN = Snr
