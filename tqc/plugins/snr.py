"""SNR: tokens that say much over the noise of their head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tqc.plugins.scorer import Scorer, Span


@dataclass(frozen=True)
class Snr(Scorer):
    """Energy of a token's value over what is left of it when the mean value of the group is taken away, times that of
    its key: tqai's snr looks at the step of a diffusion model, which a token does not have. Steps of diffusion models
    are weighed by how far they go from noise to signal."""

    name: ClassVar[str] = "snr"
    paper: ClassVar[str] = "tqai 0.4, scorer snr"

    epsilon: float = 1e-6

    def check(self) -> None:
        self.require("epsilon", self.epsilon > 0, "above 0")

    def score(self, span: Span) -> Tensor:
        return self._ratio(span.group_keys) * self._ratio(span.group_values)

    @staticmethod
    def step_weights(sigmas: Tensor) -> Tensor:
        """Weights of the errors of denoising steps, 1 in the mean, float32 [steps]: an error counts by how far its step
        moves the sample, brought to the scale of the data.

        Args:
            sigmas: noise over signal before each step and behind the last, float32 [steps + 1].
        """
        moved = torch.asinh(sigmas.float()).diff().abs()
        return moved / moved.mean().clamp_min(1e-12)

    def _ratio(self, x: Tensor) -> Tensor:
        noise = (x - x.mean(-2, keepdim=True)).square().mean((-1, -2)).unsqueeze(-1)
        return (x - x.mean(-2, keepdim=True)).square().mean(-1) / (noise + self.epsilon)


PLUGIN = Snr
