"""Block-sparse attention's saliency: tokens far from the centroid of their block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tqc.plugins.scorer import Scorer, Span


@dataclass(frozen=True)
class Bsa(Scorer):
    """Distance of a key from the mean of its block of `block` tokens, over the norm of that mean."""

    name: ClassVar[str] = "bsa"
    paper: ClassVar[str] = "Bidirectional sparse attention (arXiv 2509.01085)"

    block: int = 16

    def check(self) -> None:
        self.require("block", self.block in (2, 4, 8, 16, 32), "2, 4, 8, 16 or 32")

    def score(self, span: Span) -> Tensor:
        blocks = span.group_keys.unflatten(-2, (-1, self.block))
        centroid = blocks.mean(-2, keepdim=True)
        return ((blocks - centroid).norm(dim=-1) / centroid.norm(dim=-1).clamp_min(1e-6)).flatten(-2)


PLUGIN = Bsa
