"""The memory behind packed tensors: spare capacity, appending in place, copying on a fork."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tqc.format import PackedFormat
from tqc.ops import planes
from tqc.torch_private import mark_dynamic, no_views

# Of the pages of a long cache 1/128 are spare, so that growing copies 128 tokens' worth of codes for each one that is
# packed. A short one has few spare pages and rows, so that it takes hardly more than a dense one.
_GROWTH = 128
_FEW_PAGES = 8
_FEW_ROWS = 64
# A size of 1 would be a constant to dynamo.
MIN_ROWS = 2


Append = Callable[..., None]
# (`score`, `state_rows`) of `tqc.ops.pack`, or nothing where the format has no groups.
Scored = tuple[Tensor, Tensor | None] | tuple[()]


class Storage:
    """Parts of one packed tensor (see `tqc.format`) with a host copy of its state.

    `length`, `packed` and `begin` mirror `state`; they are None where only the device knows them (writes at a `start`
    tensor). Lengths here are positions: tokens that a sliding window has dropped count.

    Attributes:
        codes: the bytes of `pages` as dynamo sees them, [batch, heads, bytes]: 0 or 1 pages would be constants to it.
        watch: what a monitor keeps of it (`tqc.cache.watch`); a copy has none.
    """

    _pages: Tensor | None
    codes: Tensor
    __slots__ = (
        *("_pages", "codes", "_dense", "state", "fmt", "watch"),
        *("_length", "_packed", "_begin", "_readers", "__weakref__"),
    )

    def __init__(
        self,
        pages: Tensor,
        dense: Tensor,
        state: Tensor,
        fmt: PackedFormat,
        length: int | None,
        packed: int | None,
        begin: int | None,
    ) -> None:
        self.fmt, self.state = fmt, state
        self.pages, self.dense = pages, dense
        self._length, self._packed, self._begin = length, packed, begin
        self.watch: Any = None
        self._readers: list[tuple[weakref.ref[Any], int]] = []  # and where what each reads ends

    @classmethod
    def allocate(
        cls, batch: int, heads: int, fmt: PackedFormat, dtype: torch.dtype, device: torch.device, tokens: int
    ) -> Storage:
        """Empty storage with room for `tokens` tokens."""
        pages = torch.zeros(batch, heads, fmt.pages_for(tokens), fmt.block_bytes, dtype=torch.uint8, device=device)
        dense = fmt.empty_dense(batch, heads, max(MIN_ROWS, fmt.rows_for(tokens)), dtype, device)
        return cls(pages, dense, torch.zeros(3, dtype=torch.int64, device=device), fmt, 0, 0, 0)

    @classmethod
    def holding(
        cls,
        new: Tensor,
        fmt: PackedFormat,
        tokens: int,
        append: Append,
        query: Tensor | None = None,
        scored: Scored = (),
    ) -> Storage:
        """Storage with room for `tokens` tokens that holds those of `new`; `query` and `scored` are `query` and
        (`score`, `state_rows`) of `tqc.ops.pack`."""
        batch, heads, count, _ = new.shape
        storage = cls.allocate(batch, heads, fmt, new.dtype, new.device, tokens)
        storage.balance(new, query)
        storage.append(new, count, None, append, query, scored)
        return storage

    @property
    def pages(self) -> Tensor:
        if self._pages is None:
            batch, heads, count = self.codes.shape
            page_bytes = self.fmt.block_bytes
            self._pages = self.codes.view(batch, heads, count // page_bytes, page_bytes)
        return self._pages

    @pages.setter
    def pages(self, pages: Tensor) -> None:
        """Of a tensor that is being traced, `codes` may be given: what dynamo has to know of pages takes it long."""
        if pages.dim() == 3:
            self._pages, self.codes = None, pages
            return
        self._pages = pages
        # Dynamo guards which inputs are one tensor, and of views the sizes of what they are views of: a tensor for each
        # cache, and no views.
        empty = not pages.shape[2]
        with no_views():
            self.codes = (
                _no_codes(pages.shape, pages.device, pages.is_inference()).detach() if empty else pages.flatten(2)
            )
        mark_dynamic(self.codes, 2)

    @property
    def dense(self) -> Tensor:
        return self._dense

    @dense.setter
    def dense(self, dense: Tensor) -> None:
        self._dense = dense
        mark_dynamic(dense, 2)

    @property
    def length(self) -> int:
        if self._length is None:
            self._sync()
        return self._length  # type: ignore[return-value]

    @property
    def packed(self) -> int:
        if self._packed is None:
            self._sync()
        return self._packed  # type: ignore[return-value]

    @property
    def begin(self) -> int:
        """The first token that is held."""
        if self.fmt.keep is None:
            return 0
        if self._begin is None:
            self._sync()
        return self._begin  # type: ignore[return-value]

    def _sync(self) -> None:
        self._length, self._packed, self._begin = self.state.tolist()

    def forget(self) -> None:
        """Forget the host copy of the state: a kernel writes, or has written where only the device knows."""
        self._length = self._packed = self._begin = None

    def is_full(self, length: int) -> bool:
        """Whether the first `length` tokens are known to be stored, as in a cache that grows."""
        return self._length is not None and length <= self._length

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + self.dense.nbytes + self.state.nbytes

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all."""
        needed, present = self.fmt.pages_for(tokens), self.pages.shape[2]
        if needed > present:
            spare = 0 if needed < _FEW_PAGES else max(1, needed // _GROWTH)
            batch, heads, _, page_bytes = self.pages.shape
            number = min(needed + spare, self.fmt.ring_pages or needed + spare)
            pages, last = self.pages.new_empty(batch, heads, number, page_bytes), self.packed // self.fmt.block_tokens
            if last <= present:
                pages[:, :, :last] = self.pages[:, :, :last]
            else:
                held = torch.arange(last - present, last, device=pages.device)
                pages[:, :, held % number] = self.pages[:, :, held % present]
            self.pages = pages
        if self.fmt.rows_for(tokens) > self.dense.shape[2]:
            spare = max(1, tokens // 8) if tokens < _FEW_ROWS else tokens // 24
            self._grow_dense(self.fmt.rows_for(tokens) if tokens + spare > self.fmt.token_rows else tokens + spare)

    def _grow_dense(self, rows: int) -> None:
        batch, heads, present, _ = self.dense.shape
        dense = self.fmt.empty_dense(batch, heads, rows, self.dense.dtype, self.dense.device)
        dense[:, :, :present] = self.dense
        self.dense = dense

    def room_behind(self, begin: int, end: int, count: int) -> Storage:
        """The storage to append `count` tokens to behind those from `begin` to `end`: this one, or a copy if others
        read on, or if they would lose what a sliding window drops.

        Where fewer tokens are stored, a copy with zeros up to there."""
        storage = self._with_just(end)
        if storage is self and (begin < self.begin or (self.fmt.keep is not None and self._loses(end + count))):
            storage = self.copy(end)
        storage.start_at(begin)
        storage.reserve(end + count)
        if (gap := end - storage.length) and self.fmt.groups:
            raise NotImplementedError("a cache with groups of tokens has no gap in it that could be filled")
        if gap:
            batch, heads, _, dim = storage.dense.shape
            zeros = storage.dense.new_zeros(batch, heads, gap, dim)
            storage.append(zeros, gap, None, planes.append)
        return storage

    def keep_last(self, keep: int) -> None:
        """Let a preallocated cache be a sliding window from now on; its pages lie where those of one do."""
        if self.fmt.keep != keep:
            self.fmt = replace(self.fmt, keep=keep)

    def _loses(self, end: int) -> bool:
        """Whether tokens that are still read are lost on the way to position `end`."""
        first = self.first_left(end)
        return first > 0 and any(tensor.begin < first for tensor in self.readers())

    def first_left(self, end: int) -> int:
        """Before which position tokens are lost on the way to `end`: pages take the place of theirs, or they leave the
        ring for a page that is not stored, since the window has passed it; 0 if none is."""
        packed = self.fmt.packed_tokens(end, self.packed)
        size = self.fmt.block_tokens
        lost = packed // size - max(self.pages.shape[2], self.fmt.pages_for(end))
        passed = min(packed, self.fmt.first_held(end, self.begin) - self.fmt.sink_tokens) // size
        if passed > self.packed // size:
            lost = max(lost, passed)
        return self.fmt.sink_tokens + lost * size if lost > 0 else 0

    def append(
        self,
        new: Tensor,
        count: int | None,
        start: Tensor | None,
        append: Append,
        query: Tensor | None = None,
        scored: Scored = (),
    ) -> None:
        """Append tokens for which there is room by a kernel; `count` is how many, or None where only the device knows
        their position. `query` and `scored` are as in `holding`."""
        stored = self._length
        with Appending((self,), (count,)):
            append(self.pages, self.dense, self.state, new, start, self.fmt.spec, *scored[:1])
            self.remember(stored, query, scored)

    def remember(self, stored: int | None, query: Tensor | None, scored: Scored) -> None:
        """Keep what the scorer of the groups needs later; `stored` is how many tokens there were before."""
        if scored and scored[1] is not None and query is not None and stored is not None:
            planes.remember(self.dense, stored, query, scored[1], self.fmt)

    def state_behind(self, count: int) -> tuple[int, int, int]:
        """Length, packed and begin once `count` more tokens are stored."""
        end = self.length + count
        return end, self.fmt.packed_tokens(end, self.packed), self.fmt.first_held(end, self.begin)

    def packs(self, count: int | None) -> bool:
        """Whether `count` more tokens push some out of the window of a cache that grows."""
        return count is not None and self.state_behind(count)[1] > self.packed

    def opens(self, count: int | None) -> bool:
        """Whether `count` more tokens bring the first page of a cache that grows and whose heads have a balance."""
        return self.fmt.centred and count is not None and not self.packed and self.state_behind(count)[1] > 0

    def balance(self, new: Tensor, query: Tensor | None) -> None:
        """Choose the balance of keys for which there is room by now, where the first page is about to be packed."""
        if not self.packed:
            planes.choose_balance(self.dense, self.begin, self.length, new, query, self.fmt)

    def copy(self, end: int) -> Storage:
        """A storage of its own with the tokens before position `end`."""
        parts = self.pages.clone(), self.dense.clone(), self.state.clone()
        copy = Storage(*parts, self.fmt, self.length, self.packed, self.begin)
        copy.truncate(end)
        return copy

    @classmethod
    def of_rows(cls, parts: Sequence[Storage]) -> Storage:
        """One storage with the batches of all, whose states are the same."""
        first, num_pages = parts[0], min(part.pages.shape[2] for part in parts)
        rows = min(part.dense.shape[2] for part in parts)
        pages = torch.cat([part.pages[:, :, :num_pages] for part in parts])
        dense = torch.cat([part.dense[:, :, :rows] for part in parts])
        return cls(pages, dense, first.state.clone(), first.fmt, first.length, first.packed, first.begin)

    def select(self, rows: Tensor, end: int) -> Storage:
        """A storage of its own with the tokens before position `end` of the given batch rows."""
        pages, dense = self.pages.index_select(0, rows), self.dense.index_select(0, rows)
        chosen = Storage(pages, dense, self.state.clone(), self.fmt, self.length, self.packed, self.begin)
        chosen.truncate(end)
        return chosen

    def truncate(self, end: int) -> None:
        """Drop the tokens from position `end` on, in place; no more are there than before."""
        if end >= self.length:
            return
        if reason := planes.why_not_rewound(self.packed, end, self.fmt):
            raise NotImplementedError(reason)
        self._packed = planes.rewind(self.pages, self.dense, self.packed, end, self.fmt)
        self._length = end
        self._write_state()

    def clear(self) -> None:
        """Drop all tokens, in place."""
        self.truncate(0)
        self.start_at(0)

    def start_at(self, begin: int) -> None:
        if begin != self.begin:
            self._begin = begin
            self._write_state()

    def _write_state(self) -> None:
        self.state.copy_(torch.tensor([self.length, self.packed, self.begin]))

    def state_from(self, begin: int) -> Tensor:
        """The state as a tensor whose first token is `begin` sees it: one that a sliding window may have left."""
        if begin == self.begin:
            return self.state
        state = self.state.clone()
        state[2] = begin
        return state

    def note_reader(self, tensor: Tensor, end: int) -> None:
        """Remember that `tensor`, a packed one, reads tokens up to position `end` from here."""
        if len(self._readers) > 4:
            self.readers()
        noted = weakref.ref(tensor)  # one and the same for a tensor
        self._readers = [reader for reader in self._readers if reader[0] is not noted]
        self._readers.append((noted, end))

    def readers(self) -> list[Any]:
        """The packed tensors that read from here."""
        alive = [(ref, end, tensor) for ref, end in self._readers if (tensor := ref()) is not None]
        alive = [reader for reader in alive if reader[2].packed_storage is self]
        self._readers = [(ref, end) for ref, end, _ in alive]
        return [tensor for _, _, tensor in alive]

    @property
    def has_one_reader(self) -> bool:
        """Whether that is clear without a look at them."""
        return len(self._readers) == 1

    def _with_just(self, end: int) -> Storage:
        """One with the tokens before position `end` and no more, where nobody reads on: this one or a copy; fewer if
        fewer are stored."""
        if any(read > end for _, read in self._readers) and any(tensor.end > end for tensor in self.readers()):
            return self.copy(end)
        if end > self.length:
            return self.copy(end)
        self.truncate(end)
        return self


class Appending:
    """Tokens on their way into storages that have room for them: the one place where a host copy of a state advances.

        with Appending(storages, counts):
            ...  # kernels append to each of them

    While kernels write, no host copy is believed; so whatever is raised, and wherever, the state that counts is the one
    on the device.

    Args:
        counts: how many tokens each storage gets behind its own; None where only the device knows at which position.
    """

    __slots__ = ("_storages", "_states")

    def __init__(self, storages: Sequence[Storage], counts: Sequence[int | None]) -> None:
        self._storages = storages
        self._states = [
            (None, None, None) if count is None else storage.state_behind(count)
            for storage, count in zip(storages, counts, strict=True)
        ]

    def __enter__(self) -> None:
        for storage in self._storages:
            storage.forget()

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            for storage, state in zip(self._storages, self._states, strict=True):
                storage._length, storage._packed, storage._begin = state


@cache
def _no_codes(shape: torch.Size, device: torch.device, inference: bool) -> Tensor:
    """The bytes that stand for the pages of all caches that have none; `inference_mode` has tensors of its own."""
    batch, heads, _, page_bytes = shape
    with torch.inference_mode(inference):
        return torch.zeros(batch, heads, page_bytes, dtype=torch.uint8, device=device)
