"""Which token comes next. Needs numpy alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Sampling:
    """The most likely token at temperature 0, else a random one.

    Attributes:
        temperature: what logits are divided by.
        top_k: only the so many most likely tokens count; 0 for all.
        top_p: only the most likely tokens that together have this probability count.
        seed: of the random numbers.

    Raises:
        ValueError: for a number that is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    _random: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        self._random = np.random.default_rng(self.seed)

    def choose(self, logits: np.ndarray) -> list[int]:
        """A token for each row of `logits` [batch, vocabulary]."""
        if not self.temperature:
            return [int(token) for token in logits.argmax(-1)]
        return [self._draw(row) for row in logits.astype(np.float64)]

    def _draw(self, row: np.ndarray) -> int:
        order = np.argsort(-row, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        scaled = (row[order] - row[order[0]]) / self.temperature
        p = np.exp(scaled) / np.exp(scaled).sum()
        if self.top_p < 1:
            kept = int(np.searchsorted(np.cumsum(p), self.top_p)) + 1
            order, p = order[:kept], p[:kept] / p[:kept].sum()
        return int(self._random.choice(order, p=p))
