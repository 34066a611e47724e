"""Where the tokens of a packed cache lie, counted on the host: a program gets rows and slots as arrays of numbers.

`docs/format.md` says which token is where. Here those rules become indices, so that a captured program gathers and
scatters rows without a branch: the same program serves every length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tqc.format import PAGE_TOKENS, PackedFormat


@dataclass(frozen=True)
class Placement:
    """The state of a packed cache: how many tokens came, how many of them are packed, the first that is held.

    Attributes:
        fmt: a format with these sinks, window and tokens to keep; the rest of it does not count.
    """

    fmt: PackedFormat
    length: int = 0
    packed: int = 0
    begin: int = 0

    @staticmethod
    def empty(fmt: PackedFormat) -> Placement:
        """No tokens: the same for formats that place them alike."""
        return Placement(PackedFormat(8, 1, False, fmt.sink_tokens, fmt.residual_window, keep=fmt.keep))

    @property
    def held(self) -> int:
        return self.length - self.begin

    def behind(self, count: int) -> Placement:
        """The state once `count` more tokens are stored."""
        end = self.length + count
        return replace(
            self,
            length=end,
            packed=self.fmt.packed_tokens(end, self.packed),
            begin=self.fmt.first_held(end, self.begin),
        )

    def pages(self) -> int:
        """How many pages there must be."""
        return self.fmt.pages_for(self.length, self.packed)

    def opens(self, count: int) -> bool:
        """Whether `count` more tokens bring the first page, and with it the centre and the balance of each head."""
        return not self.packed and self.behind(count).packed > 0

    def positions(self, num_pages: int) -> np.ndarray:
        """The position of the token in each place, -1 where there is none: int32 [token_rows + num_pages * 32], first
        the rows of `dense`, then the pages as they lie in memory."""
        fmt = self.fmt
        made = np.full(fmt.token_rows + num_pages * PAGE_TOKENS, -1, np.int32)
        sinks = np.arange(self.begin, min(fmt.sink_tokens, self.length))
        made[sinks] = sinks
        recent = np.arange(max(self.packed, self.begin - fmt.sink_tokens), self.length - fmt.sink_tokens)
        made[fmt.sink_tokens + recent % fmt.residual_window] = fmt.sink_tokens + recent
        coded = np.arange(max(0, self.begin - fmt.sink_tokens), self.packed)
        if len(coded):
            made[fmt.token_rows + coded % (num_pages * PAGE_TOKENS)] = fmt.sink_tokens + coded
        return made

    def rows_behind(self, count: int, skip: int = 0) -> np.ndarray:
        """Which of [rows of `dense`, new tokens] each row holds once `count` tokens are stored, those behind the first
        `skip`: int32 [token_rows]."""
        fmt, after = self.fmt, self.behind(count)
        made = np.arange(fmt.token_rows, dtype=np.int32)
        fresh = np.arange(self.length, after.length)
        fresh = fresh[(fresh < fmt.sink_tokens) | (fresh >= fmt.sink_tokens + after.packed)]
        ring = fmt.sink_tokens + (fresh - fmt.sink_tokens) % fmt.residual_window
        made[np.where(fresh < fmt.sink_tokens, fresh, ring)] = fmt.token_rows + skip + fresh - self.length
        return made

    def packs(self, count: int, skip: int = 0) -> np.ndarray:
        """Which of [rows of `dense`, new tokens] are packed when these tokens are stored, in order: int32 [a multiple
        of 32]."""
        fmt = self.fmt
        u = np.arange(self.packed, self.behind(count).packed)
        first = self.length - fmt.sink_tokens  # the packed index of the first new token
        return np.where(u < first, fmt.sink_tokens + u % fmt.residual_window, fmt.token_rows + u - first).astype(
            np.int32
        )

    def slots(self, count: int, num_pages: int) -> np.ndarray:
        """Which of the pages that storing `count` tokens completes are kept, and where they go: int32 [2, pages]."""
        pages = np.arange(self.packed, self.behind(count).packed, PAGE_TOKENS) // PAGE_TOKENS
        kept = pages[-num_pages:] if num_pages else pages
        return np.stack([kept - self.packed // PAGE_TOKENS, kept % max(1, num_pages)]).astype(np.int32)
