"""StreamingLLM: the first tokens and the last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tqc.plugins.scorer import Scorer, Span


@dataclass(frozen=True)
class Streaming(Scorer):
    """The later a token, the higher its score: sinks and the window stay, of each group the end."""

    name: ClassVar[str] = "streaming"
    paper: ClassVar[str] = "StreamingLLM (arXiv 2309.17453)"

    def score(self, span: Span) -> Tensor:
        order = torch.arange(span.size, device=span.keys.device, dtype=torch.float32)
        return order.expand(*span.keys.shape[:-2], -1)


PLUGIN = Streaming
