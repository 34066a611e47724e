"""Fisher proxy at run time: large values. Not a Fisher information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tqc.plugins.scorer import Scorer, Span


@dataclass(frozen=True)
class Fisher(Scorer):
    """Mean square of a token's key times that of its value, as tqai's runtime proxy has it: a norm under another name.
    No gradient is in it, and no paper says that it ranks tokens."""

    name: ClassVar[str] = "fisher"
    paper: ClassVar[str] = "tqai 0.4, scorer fisher"

    def score(self, span: Span) -> Tensor:
        return span.group_keys.square().mean(-1) * span.group_values.square().mean(-1)


PLUGIN = Fisher
