"""What becomes of tokens that leave the window: the options `strategy`, `keep`, `tiers` and `scorer` as groups of a
format (see `tqc.format.groups`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

from tqc.format.groups import MAX_GROUP, PAGE_TOKENS, Groups
from tqc.plugins import make
from tqc.plugins.monitor import Monitor
from tqc.plugins.plugin import nearest, parse
from tqc.plugins.scorer import Scorer

EVICT, TIERED = "evict", "tiered"
STRATEGIES = (EVICT, TIERED)
# As good as attention by the divergence, and hidden numbers survive: benchmarks/results/plugins.json.
DEFAULT_SCORER = "keydiff"
DEFAULT_KEEP = 0.5
MAX_PAGES = MAX_GROUP // PAGE_TOKENS
# By code bits, what `budget_bits` stands for: pages and bits of each tier, of groups of four pages; the best of those
# that were measured (benchmarks/results/plugins.json).
BUDGETS = {2.0: "1x4+2x2/4", 2.5: "1x4+3x2/4", 3.0: "2x4+2x2/4"}
DEFAULT_TIERS = BUDGETS[2.5]
_TIERS = re.compile(r"(\d+x\d+(?:\+\d+x\d+)*)/(\d+)")


@dataclass(frozen=True)
class Strategy:
    """A strategy with what it needs.

    Attributes:
        pages: of tokens in a group.
        tiers: (pages, bits) of each tier, the bits None where they are those of keys and of values.
        scorer: which tokens go first.
    """

    name: str
    pages: int
    tiers: tuple[tuple[int, int | None], ...]
    scorer: Scorer

    @property
    def least_window(self) -> int:
        """The smallest residual_window that it works with."""
        needed = PAGE_TOKENS * self.pages + max(self.scorer.query_count - 1, 0)
        return -(-needed // PAGE_TOKENS) * PAGE_TOKENS

    @property
    def tiers_text(self) -> str:
        """As the option `tiers` has it, without widths that the tiers do not say."""
        tiers = "+".join(f"{pages}" if bits is None else f"{pages}x{bits}" for pages, bits in self.tiers)
        return f"{tiers}/{self.pages}"

    def groups(self, bits: int, repeats: int | None) -> Groups:
        """Groups of keys whose heads have `repeats` query heads, or of values where it is None.

        Args:
            bits: of a code, where the tiers do not say.
        """
        tiers = tuple((pages, width or bits) for pages, width in self.tiers)
        tokens = PAGE_TOKENS * self.pages
        if repeats is None:
            return Groups(tokens, tiers)
        return Groups(tokens, tiers, str(self.scorer), self.scorer.query_count, repeats, self.scorer.state_rows)


def make_strategy(
    strategy: Any, scorer: Any, scorer_kwargs: Any, keep: Any, tiers: Any, budget_bits: float | None
) -> Strategy | None:
    """The strategy that options describe, None where they name none.

    Raises:
        ValueError, TypeError: naming the option, its value and what is allowed.
    """
    others = {"scorer": scorer, "scorer_kwargs": scorer_kwargs or None, "keep": keep, "tiers": tiers}
    if strategy is None:
        if given := next((name for name, value in others.items() if value is not None), None):
            raise ValueError(f"{given} needs a strategy ({', '.join(STRATEGIES)}); got {others[given]!r} and none")
        return None
    if strategy not in STRATEGIES:
        raise ValueError(
            f"strategy must be one of {', '.join(STRATEGIES)}, or None; got {strategy!r}{nearest(strategy, STRATEGIES)}"
        )
    named = DEFAULT_SCORER if scorer is None else scorer
    made = cast(Scorer, make(Scorer.kind, named, cast("Mapping[str, Any] | None", scorer_kwargs)))
    if strategy == EVICT:
        if tiers is not None:
            raise ValueError(f"tiers are for strategy {TIERED!r}; {EVICT!r} takes keep. Got {tiers!r}")
        pages, kept = _share(DEFAULT_KEEP if keep is None else keep)
        return Strategy(EVICT, pages, ((kept, None),), made)
    if keep is not None:
        raise ValueError(f"keep is for strategy {EVICT!r}; {TIERED!r} takes tiers or budget_bits. Got {keep!r}")
    if tiers is not None and budget_bits is not None:
        raise ValueError(f"tiers and budget_bits cannot both be given: tiers {tiers!r} have their bits")
    return Strategy(TIERED, *_parse(tiers if tiers is not None else _affordable(budget_bits)), made)


def make_monitor(text: Any) -> Monitor | None:
    """The monitor that the option names, with parameters in parentheses or none. Raises ValueError, TypeError."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise TypeError(f"monitor must be a name as 'fidelity' or 'fidelity(head=1)'; got {text!r}")
    name, parameters = parse(text) if "(" in text else (text, {})
    return cast(Monitor, make(Monitor.kind, name, parameters))


def _share(keep: Any) -> tuple[int, int]:
    """Pages of tokens in a group, and how many of them are kept."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise TypeError(f"keep must be a number, got {keep!r}")
    shares = {Fraction(kept, pages) for pages in range(2, MAX_PAGES + 1) for kept in range(1, pages)}
    found = [share for share in shares if abs(share - keep) < 0.005]
    if not found:
        allowed = ", ".join(str(share) for share in sorted(shares))
        raise ValueError(f"keep must be one of {allowed} (whole pages of a group); got {keep!r}")
    return found[0].denominator, found[0].numerator


def _affordable(budget_bits: float | None) -> str:
    if budget_bits is None:
        return DEFAULT_TIERS
    fitting = [bits for bits in BUDGETS if bits <= budget_bits]
    if not fitting:
        raise ValueError(f"budget_bits must be at least {min(BUDGETS)} for strategy {TIERED!r}, got {budget_bits}")
    return BUDGETS[max(fitting)]


def _parse(tiers: Any) -> tuple[int, tuple[tuple[int, int | None], ...]]:
    found = _TIERS.fullmatch(tiers) if isinstance(tiers, str) else None
    parts = tuple((int(n), int(bits)) for n, bits in (part.split("x") for part in found[1].split("+"))) if found else ()
    pages = int(found[2]) if found else 0
    right = found and 1 <= pages <= MAX_PAGES and all(n and 1 <= bits <= 8 for n, bits in parts)
    if not right or sum(n for n, _ in parts) > pages:
        raise ValueError(
            f"tiers must read as 1x4+2x2/4 (of each 4 pages of tokens one of 4 bits, two of 2 bits, and the rest "
            f"evicted), of at most {MAX_PAGES} pages; got {tiers!r}"
        )
    return pages, parts
