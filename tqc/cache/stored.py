"""A packed tensor as a file holds it: the same bytes, wherever its pages and tokens lay in memory.

- `pages` come in the order of their tokens, from the first page with a token that is still held; where a preallocated
  cache has room, zeros follow. There are no spare ones.
- `dense` has all its rows (`PackedFormat.dense_rows`) once something is packed, before that one row a token, room
  included. Rows that nothing needs are zeros.
- `state` is that of the tensor itself: it ends where the tensor does, and begins there too, though the memory behind it
  may have gone on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tqc.cache.packed_tensor import PackedTensor
from tqc.cache.storage import MIN_ROWS, Storage
from tqc.format import PackedFormat

# No more tokens than this are believed to be in a tensor, or to have been in a sliding window.
MAX_TOKENS = 1 << 24
MAX_POSITION = 1 << 40


@dataclass(frozen=True)
class Stored:
    """How many tokens a stored tensor has and where they are; `fault` says whether that can be.

    Attributes:
        length: of the tensor, with the room of a preallocated cache.
        stored, packed, begin: the `state`.
    """

    fmt: PackedFormat
    length: int
    stored: int
    packed: int
    begin: int

    def fault(self) -> str | None:
        """What is wrong with the numbers; None if they fit each other."""
        fmt, keep = self.fmt, self.fmt.keep
        if not (0 <= self.stored <= self.end <= MAX_POSITION and self.length <= MAX_TOKENS):
            return f"is {self.length} tokens long and holds {self.stored - self.begin}"
        first = 0 if keep is None else max(0, self.stored - keep)
        last = 0 if keep is None else self.stored
        if not first <= self.begin <= last or self.length > (keep or MAX_TOKENS):
            dropped = f"holds {self.length} of {self.stored} tokens from {self.begin} on"
            return f"{dropped} and keeps {'all' if keep is None else f'the last {keep}'}, which cannot be"
        most = max(0, self.stored - fmt.sink_tokens)
        if self.packed % fmt.block_tokens or not fmt.packed_tokens(self.stored) <= self.packed <= most:
            return f"has {self.packed} of {self.stored} tokens that are packed, which cannot be"
        if fmt.ring_pages is not None and self.held_pages > fmt.ring_pages:
            return f"holds {self.held_pages} pages of a window that has {fmt.ring_pages}"
        return None

    @property
    def end(self) -> int:
        return self.begin + self.length

    @property
    def first_page(self) -> int:
        return max(0, self.begin - self.fmt.sink_tokens) // self.fmt.block_tokens

    @property
    def held_pages(self) -> int:
        return max(0, self.packed // self.fmt.block_tokens - self.first_page)

    @property
    def pages(self) -> int:
        """How many pages are stored."""
        return self.held_pages if self.fmt.keep else self.fmt.pages_for(self.end, self.packed)

    @property
    def num_pages(self) -> int:
        """How many there are in memory once it is loaded."""
        if self.fmt.keep is None or self.end > self.stored:
            return self.fmt.pages_for(self.end, self.packed)
        return max(self.held_pages, min(self.packed, 1))

    @property
    def rows(self) -> int:
        """How many rows of `dense` are stored."""
        return self.fmt.dense_rows if self.packed else self.fmt.rows_for(self.end)

    def slots(self, num_pages: int) -> Tensor:
        """Where the held pages lie in memory."""
        return torch.arange(self.first_page, self.first_page + self.held_pages) % max(1, num_pages)

    def needed_rows(self) -> Tensor:
        """Rows of `dense` with sinks, with tokens that are not packed (dropped ones are packed with their page), and
        with what the head needs."""
        fmt = self.fmt
        sinks = range(min(self.stored, fmt.sink_tokens))
        recent = (u % fmt.residual_window for u in range(self.packed, self.stored - fmt.sink_tokens))
        head = range(fmt.token_rows + (0 if self.packed else 1), self.rows)
        return torch.tensor([*sinks, *(fmt.sink_tokens + u for u in recent), *head], dtype=torch.int64)


def stored(x: PackedTensor) -> tuple[Stored, dict[str, Tensor]]:
    """The numbers of a tensor and its parts, on the CPU, sharing memory with no other."""
    storage = x.packed_storage
    if x.end < storage.length:
        storage = storage.copy(x.end)
    numbers = Stored(x.fmt, x.shape[2], storage.length, storage.packed, x.begin)
    batch, heads, num_pages, page_bytes = storage.pages.shape
    pages = torch.zeros(batch, heads, numbers.pages, page_bytes, dtype=torch.uint8)
    slots = numbers.slots(num_pages).to(storage.pages.device)
    pages[:, :, : numbers.held_pages] = storage.pages[:, :, slots].cpu()
    dense = torch.zeros(batch, heads, numbers.rows, x.shape[3], dtype=x.dtype)
    rows = numbers.needed_rows()
    dense[:, :, rows] = storage.dense[:, :, rows.to(storage.dense.device)].detach().cpu()
    state = torch.tensor([numbers.stored, numbers.packed, numbers.begin])
    return numbers, {"pages": pages, "dense": dense, "state": state}


def loaded(numbers: Stored, pages: Tensor, dense: Tensor, device: torch.device) -> PackedTensor:
    """The tensor of stored parts, which are copied."""
    fmt, num_pages = numbers.fmt, numbers.num_pages
    batch, heads, rows, _ = dense.shape
    placed = torch.zeros(batch, heads, num_pages, fmt.block_bytes, dtype=torch.uint8, device=device)
    placed[:, :, numbers.slots(num_pages).to(device)] = pages[:, :, : numbers.held_pages].to(device)
    held = fmt.empty_dense(batch, heads, max(MIN_ROWS, rows), dense.dtype, device)
    held[:, :, :rows] = dense.to(device)
    state = torch.tensor([numbers.stored, numbers.packed, numbers.begin], device=device)
    storage = Storage(placed, held, state, fmt, numbers.stored, numbers.packed, numbers.begin)
    return PackedTensor(storage, numbers.length, numbers.begin)


def from_version_1(dense: Tensor, numbers: Stored) -> Tensor:
    """Of `dense` as version 1 had it: a row for the centre in front, in plain formats too, and no balance."""
    fmt = numbers.fmt
    tokens = dense[:, :, 1 : 1 + min(numbers.rows, fmt.token_rows)]
    if not fmt.centred or numbers.rows < fmt.dense_rows:
        return tokens
    centre = dense[:, :, :1]
    return torch.cat([tokens, centre, torch.zeros_like(centre) + 1], dim=2)
