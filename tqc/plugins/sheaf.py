"""Sheaf: tokens that differ from what their neighbours would predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tqc.plugins.scorer import Scorer, Span


@dataclass(frozen=True)
class Sheaf(Scorer):
    """Size of the Laplacian of keys and values along the sequence, x_i - (x_(i-1) + x_(i+1)) / 2 with equal restriction
    maps, over the mean size: what is harmonic can be told from its neighbours.

    This is what tqai computes under the paper's number (arXiv 2601.21207). The paper itself was not to be had when this
    was written, so nothing more of it is claimed.
    """

    name: ClassVar[str] = "sheaf"
    paper: ClassVar[str] = "tqai 0.4, scorer sheaf"

    def score(self, span: Span) -> Tensor:
        return self._roughness(span.keys)[..., : span.size] * self._roughness(span.values)[..., : span.size]

    @staticmethod
    def _roughness(x: Tensor) -> Tensor:
        before = torch.cat([x[..., :1, :], x[..., :-1, :]], dim=-2)
        behind = torch.cat([x[..., 1:, :], x[..., -1:, :]], dim=-2)
        return (x - (before + behind) / 2).norm(dim=-1) / x.norm(dim=-1).mean(-1, keepdim=True).clamp_min(1e-6)


PLUGIN = Sheaf
