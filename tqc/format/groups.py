"""Groups: tokens that leave the window together and share the pages of their group, some of them evicted.

Where a format has groups, an entry of `pages` is a *block*: what is kept of one group of tokens. Each head sorts the
tokens of a group by score; the first ones go to the pages of the first tier, the next to those of the second, and those
for which there is no page are evicted. So every page holds 32 tokens of one width, and sizes depend on no data.

A block is its pages, tier by tier, and then one byte for each kept token, its place in the group. Within a tier tokens
are in the order of their positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

PAGE_TOKENS = 32
# A place is a byte.
MAX_GROUP = 256
_TIERS = re.compile(r"group(\d+)=(\d+x\d+(?:\+\d+x\d+)*)")
_SCORED = re.compile(r"scored(\d+)x(\d+)\+(\d+)=([^:]+)")


@dataclass(frozen=True)
class Groups:
    """What becomes of a group of tokens.

    Attributes:
        tokens: of a group, a multiple of 32, at most 256.
        tiers: (pages, bits of a code) of each tier, the first for the tokens of highest score.
        scorer: what scores them, as `tqc.plugins` writes it; of keys alone, values follow them.
        queries: how many of the last queries `dense` of the keys holds for the scorer.
        repeats: query heads to a head of keys.
        state_rows: rows of `dense` that the scorer keeps for itself.
    """

    tokens: int
    tiers: tuple[tuple[int, int], ...]
    scorer: str = ""
    queries: int = 0
    repeats: int = 1
    state_rows: int = 0

    def __post_init__(self) -> None:
        if not PAGE_TOKENS <= self.tokens <= MAX_GROUP or self.tokens % PAGE_TOKENS:
            raise ValueError(
                f"a group must be {PAGE_TOKENS} to {MAX_GROUP} tokens, a multiple of 32; got {self.tokens}"
            )
        if not self.tiers or any(pages < 1 or not 1 <= bits <= 8 for pages, bits in self.tiers):
            raise ValueError(f"tiers must be one or more of (pages, bits), bits from 1 to 8; got {self.tiers}")
        if self.kept > self.tokens:
            raise ValueError(f"tiers of {self.kept} tokens are more than the {self.tokens} of a group")
        if min(self.queries, self.state_rows) < 0 or self.repeats < 1:
            raise ValueError(f"rows of a scorer must not be negative: {self}")

    @cached_property
    def kept(self) -> int:
        """How many tokens of a group are kept."""
        return PAGE_TOKENS * sum(pages for pages, _ in self.tiers)

    @property
    def evicts(self) -> bool:
        return self.kept < self.tokens

    @cached_property
    def rows(self) -> int:
        """Rows of `dense` that the scorer needs: those of queries, head by head, then its own."""
        return self.repeats * self.queries + self.state_rows

    @cached_property
    def code_bits(self) -> float:
        """Mean width of a code, evicted tokens counted as 0."""
        return sum(pages * bits for pages, bits in self.tiers) * PAGE_TOKENS / self.tokens

    def __str__(self) -> str:
        tiers = "+".join(f"{pages}x{bits}" for pages, bits in self.tiers)
        scored = f":scored{self.queries}x{self.repeats}+{self.state_rows}={self.scorer}" if self.scorer else ""
        return f"group{self.tokens}={tiers}{scored}"

    @staticmethod
    def parse(parts: list[str]) -> Groups | None:
        """Take the parts that `str` wrote off the front of `parts`; None if there are none. Raises ValueError."""
        if not parts or not (found := _TIERS.fullmatch(parts[0])):
            return None
        parts.pop(0)
        tiers = tuple((int(pages), int(bits)) for pages, bits in (tier.split("x") for tier in found[2].split("+")))
        scored = _SCORED.fullmatch(parts[0]) if parts else None
        if not scored:
            return Groups(int(found[1]), tiers)
        parts.pop(0)
        queries, repeats, rows = (int(scored[i]) for i in (1, 2, 3))
        return Groups(int(found[1]), tiers, scored[4], queries, repeats, rows)
