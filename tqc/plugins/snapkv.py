"""SnapKV: what the last queries look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tqc.plugins.scorer import Scorer, Span


@dataclass(frozen=True)
class SnapKV(Scorer):
    """Attention of the last `queries` queries to a token, summed, then the most of `kernel` neighbours; times the norm
    of its value if `by_value`.

    Loses retrieval: what the text is about now stays, and of 16 hidden numbers none is found when half is evicted
    (uniform 2 bits, as large: 5).
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV (arXiv 2404.14469)"

    queries: int = 16
    kernel: int = 5
    by_value: bool = True

    def check(self) -> None:
        self.require("queries", 1 <= self.queries <= 128, "1 to 128")
        self.require("kernel", 1 <= self.kernel <= 31 and self.kernel % 2 == 1, "an odd number from 1 to 31")

    @property
    def query_count(self) -> int:
        return self.queries

    def score(self, span: Span) -> Tensor:
        mass = span.group_attention().sum((-2, -3))
        if self.by_value:
            mass = mass * span.group_values.norm(dim=-1)
        flat = mass.flatten(0, -2).unsqueeze(1)
        pooled = torch.nn.functional.max_pool1d(flat, self.kernel, stride=1, padding=self.kernel // 2)
        return pooled.reshape(mass.shape)


PLUGIN = SnapKV
