"""Expected attention: what queries like the last ones will look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tqc.plugins.scorer import Scorer, Span


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """exp(mean . k + k' variance k / 2), the mean exponential of a score under Gaussian queries, times the norm of the
    value (`epsilon` is added to it before).

    The paper takes mean and covariance of queries before the rotary embedding and turns them ahead. Here they are of
    the last `queries` as they came, with the variance of each channel alone, and shared by the query heads of a head.

    Loses retrieval: of 16 hidden numbers none is found when half is evicted (uniform 2 bits, as large: 5).
    """

    name: ClassVar[str] = "expected_attention"
    paper: ClassVar[str] = "Expected Attention (arXiv 2510.00636)"

    queries: int = 16
    epsilon: float = 0.02

    def check(self) -> None:
        self.require("queries", 2 <= self.queries <= 128, "2 to 128")
        self.require("epsilon", self.epsilon >= 0, "at least 0")

    @property
    def query_count(self) -> int:
        return self.queries

    def score(self, span: Span) -> Tensor:
        queries = span.queries * span.scale
        mean, variance = queries.mean(-2, keepdim=True), queries.var(-2, keepdim=True)
        keys = span.group_keys.unsqueeze(-3)
        logits = (keys * mean).sum(-1) + (keys.square() * variance).sum(-1) / 2
        weights = logits.softmax(-1).mean(-2)
        return (weights + self.epsilon / span.size) * span.group_values.norm(dim=-1)


PLUGIN = ExpectedAttention
