"""H2O: heavy hitters, the tokens that most attention went to so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tqc.plugins.scorer import Scorer, Span


@dataclass(frozen=True)
class H2O(Scorer):
    """Attention to a token, summed over the queries while it was in the window, of which the last `queries` count.

    Loses retrieval: of 16 hidden numbers none is found when half is evicted (uniform 2 bits, as large: 5).
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "H2O (arXiv 2306.14048)"

    queries: int = 16

    def check(self) -> None:
        self.require("queries", 1 <= self.queries <= 128, "1 to 128")

    @property
    def query_count(self) -> int:
        return self.queries

    def score(self, span: Span) -> Tensor:
        return span.group_attention().sum((-2, -3))


PLUGIN = H2O
