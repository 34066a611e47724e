"""Scorers: which tokens of a group that leaves the recent window are worth their bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tqc.plugins.plugin import Plugin


@dataclass(frozen=True)
class Span:
    """Groups of tokens on their way out of the window, with what came behind each of them.

    All tensors are float32, and whatever dims stand before the named ones are (batch, heads, groups).

    Attributes:
        keys, values: [..., tokens, head_dim], as the cache got them (keys with their rotary embedding): first the
            `size` tokens to be scored, then all that came behind them, up to the one that pushes the group out.
        sinks: keys of the first tokens of the text, [..., sinks, head_dim], which stay whatever their score.
        queries: the last ones, of the last tokens in `keys`, [..., repeats, queries, head_dim]; `repeats` query heads
            look at one head of keys.
        first: number of each group's first token behind the sinks, int64 [groups].
        size: how many tokens a group has.
        scale: of the scores of attention.
    """

    keys: Tensor
    values: Tensor
    sinks: Tensor
    queries: Tensor
    first: Tensor
    size: int
    scale: float

    @property
    def group_keys(self) -> Tensor:
        """Keys of the tokens to be scored, [..., size, head_dim]."""
        return self.keys[..., : self.size, :]

    @property
    def group_values(self) -> Tensor:
        return self.values[..., : self.size, :]

    def group(self, index: int) -> Span:
        """One group alone."""
        one = slice(index, index + 1)
        parts = {name: getattr(self, name)[:, :, one] for name in ("keys", "values", "sinks", "queries")}
        return replace(self, **parts, first=self.first[one])

    def attention(self) -> Tensor:
        """Weights of `queries` on sinks and on those of `keys` that they see: [..., repeats, queries, sinks + tokens].

        What has left the window before is not there, so the weights of a query sum to one over these tokens."""
        count, tokens = self.queries.shape[-2], self.keys.shape[-2]
        keys = torch.cat([self.sinks, self.keys], dim=-2).unsqueeze(-3)
        scores = self.queries @ keys.transpose(-1, -2) * self.scale
        column = torch.arange(scores.shape[-1], device=scores.device) - self.sinks.shape[-2]
        position = torch.arange(tokens - count, tokens, device=scores.device)[:, None]
        return scores.masked_fill(column > position, -torch.inf).softmax(-1)

    def group_attention(self) -> Tensor:
        """Weights of `queries` on the tokens to be scored: [..., repeats, queries, size]."""
        first = self.sinks.shape[-2]
        return self.attention()[..., first : first + self.size]


@dataclass(frozen=True)
class Scorer(Plugin):
    """Scores tokens: the higher, the more exactly a token is kept. Only the order within a group counts.

    A subclass has `score`, or, with `state_rows`, `score_and_update`. Both are pure functions of tensors whose shapes
    depend on no data, in ops that ONNX and MLX can express.

    Attributes:
        state_rows: rows of head_dim that it keeps from one group to the next, for each head, in the cache's dtype;
            zeros at first.
    """

    kind: ClassVar[str] = "scorer"
    state_rows: ClassVar[int] = 0

    @property
    def query_count(self) -> int:
        """How many of the last queries it looks at. The cache holds as many."""
        return 0

    def score(self, span: Span) -> Tensor:
        """Scores of the tokens of each group, [..., size]."""
        raise NotImplementedError

    def score_and_update(self, span: Span, state: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the tokens of one group, [batch, heads, 1, size], and the state behind it.

        Args:
            state: float32 [batch, heads, 1, state_rows, head_dim].
        """
        raise NotImplementedError

    def scores(self, span: Span, state: Tensor, leaving: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scores of all groups, [batch, heads, groups, size], and the state behind those that leave.

        Args:
            state: [batch, heads, state_rows, head_dim].
            leaving: bool [groups], the first ones or none; all if None.
        """
        if not self.state_rows:
            return self.score(span), state
        found, now = [], state.float().unsqueeze(2)
        for index in range(span.keys.shape[2]):
            score, after = self.score_and_update(span.group(index), now)
            # As it is held between calls, so that it does not matter how groups are split over them.
            after = after.to(state.dtype).float()
            now = after if leaving is None else torch.where(leaving[index], after, now)
            found.append(score)
        return torch.cat(found, dim=2), now.squeeze(2).to(state.dtype)
