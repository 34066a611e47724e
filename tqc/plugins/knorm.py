"""Key norm: small keys get much attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tqc.plugins.scorer import Scorer, Span


@dataclass(frozen=True)
class KNorm(Scorer):
    """The smaller the norm of a key, the higher its score.

    Loses retrieval: of 16 hidden numbers none is found when half is evicted (uniform 2 bits, as large: 5).
    """

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "A Simple and Effective L2 Norm-Based Strategy (arXiv 2406.11430)"

    def score(self, span: Span) -> Tensor:
        return -span.group_keys.norm(dim=-1)


PLUGIN = KNorm
