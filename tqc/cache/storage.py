"""The memory behind packed tensors: spare capacity, appending in place, copying on a fork."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.ops import planes
from tqc.torch_private import mark_dynamic

# Pages are added by 1/128 of what there is, and by at least 1: spare capacity stays below 0.8 % of a long cache, and
# growing copies 128 tokens' worth of codes for each one that is packed.
_GROWTH = 128
_MIN_SPARE_PAGES = 1
MIN_PAGES = 2  # a size of 1 would be a constant to dynamo


class Storage:
    """Parts of one packed tensor (see `tqc.format`) with a host copy of its state.

    `length` and `packed` mirror `state`; they are None where only the device knows them (writes at a `start` tensor).
    """

    __slots__ = ("pages", "dense", "state", "fmt", "_length", "_packed", "_readers", "__weakref__")

    def __init__(
        self, pages: Tensor, dense: Tensor, state: Tensor, fmt: PackedFormat, length: int | None, packed: int | None
    ) -> None:
        self.pages, self.dense, self.state, self.fmt = pages, dense, state, fmt
        self._length, self._packed = length, packed
        self._readers: list[tuple[weakref.ref[Any], int]] = []  # and how many tokens each reads

    @classmethod
    def allocate(
        cls, batch: int, heads: int, fmt: PackedFormat, dtype: torch.dtype, device: torch.device, tokens: int
    ) -> Storage:
        """Empty storage with room for `tokens` tokens and some more."""
        num_pages = max(MIN_PAGES, fmt.packed_tokens(tokens) // PAGE_TOKENS + _MIN_SPARE_PAGES)
        pages = torch.zeros(batch, heads, num_pages, fmt.page_bytes, dtype=torch.uint8, device=device)
        dense = torch.zeros(batch, heads, fmt.dense_rows, fmt.head_dim, dtype=dtype, device=device)
        state = torch.zeros(2, dtype=torch.int64, device=device)
        return cls(dynamic_pages(pages), dense, state, fmt, 0, 0)

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

    def _sync(self) -> None:
        self._length, self._packed = self.state.tolist()

    def forget(self) -> None:
        """Forget the host copy of the state: a kernel writes, or has written where only the device knows."""
        self._length = self._packed = None

    def is_full(self, length: int) -> bool:
        """Whether the first `length` tokens are known to be stored, as in a cache that grows."""
        return self._length is not None and length <= self._length

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + self.dense.nbytes + self.state.nbytes

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all."""
        needed = self.fmt.packed_tokens(tokens) // PAGE_TOKENS
        if needed <= self.pages.shape[2]:
            return
        batch, heads, _, page_bytes = self.pages.shape
        num_pages = needed + max(_MIN_SPARE_PAGES, needed // _GROWTH)
        pages = self.pages.new_empty(batch, heads, num_pages, page_bytes)
        used = self.packed // PAGE_TOKENS
        pages[:, :, :used] = self.pages[:, :, :used]
        self.pages = dynamic_pages(pages)

    def room_behind(self, length: int, count: int) -> Storage:
        """The storage to append `count` tokens to behind the first `length`: this one, or a copy if others read on.

        Where fewer tokens are stored, a copy with zeros up to there."""
        storage = self._with_just(length)
        storage.reserve(length + count)
        if gap := length - storage.length:
            batch, heads, _, dim = storage.dense.shape
            zeros = storage.dense.new_zeros(batch, heads, gap, dim)
            with Appending((storage,), (gap,)):
                planes.append(storage.pages, storage.dense, storage.state, zeros, None, storage.fmt.spec)
        return storage

    def copy(self, length: int) -> Storage:
        """A storage of its own with the first `length` tokens."""
        copy = Storage(
            dynamic_pages(self.pages.clone()),
            self.dense.clone(),
            self.state.clone(),
            self.fmt,
            self.length,
            self.packed,
        )
        copy.truncate(length)
        return copy

    @classmethod
    def of_rows(cls, parts: Sequence[Storage]) -> Storage:
        """One storage with the batches of all; `length` and `packed` of all are the same."""
        first, num_pages = parts[0], min(part.pages.shape[2] for part in parts)
        pages = torch.cat([part.pages[:, :, :num_pages] for part in parts])
        dense = torch.cat([part.dense for part in parts])
        return cls(dynamic_pages(pages), dense, first.state.clone(), first.fmt, first.length, first.packed)

    def select(self, rows: Tensor, length: int) -> Storage:
        """A storage of its own with the first `length` tokens of the given batch rows."""
        pages, dense = self.pages.index_select(0, rows), self.dense.index_select(0, rows)
        chosen = Storage(dynamic_pages(pages), dense, self.state.clone(), self.fmt, self.length, self.packed)
        chosen.truncate(length)
        return chosen

    def truncate(self, length: int) -> None:
        """Drop the tokens from `length` on, in place; no more are there than before."""
        if length >= self.length:
            return
        self._packed = planes.rewind(self.pages, self.dense, self.packed, length, self.fmt)
        self._length = length
        self.state.copy_(torch.tensor([self._length, self._packed]))

    def note_reader(self, tensor: Tensor, length: int) -> None:
        """Remember that `tensor`, a packed one, reads the first `length` tokens from here."""
        if len(self._readers) > 4:
            self.readers()
        self._readers.append((weakref.ref(tensor), length))

    def readers(self) -> list[Any]:
        """The packed tensors that read from here."""
        alive = [(ref, length, tensor) for ref, length in self._readers if (tensor := ref()) is not None]
        alive = [reader for reader in alive if reader[2].packed_storage is self]
        self._readers = [(ref, length) for ref, length, _ in alive]
        return [tensor for _, _, tensor in alive]

    @property
    def has_one_reader(self) -> bool:
        """Whether that is clear without a look at them."""
        return len(self._readers) == 1

    def _with_just(self, length: int) -> Storage:
        """One with these tokens and no more, where nobody reads on: this one or a copy; fewer if fewer are stored."""
        if any(reads > length for _, reads in self._readers) and any(t.shape[2] > length for t in self.readers()):
            return self.copy(length)
        if length > self.length:
            return self.copy(length)
        self.truncate(length)
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
            (None, None) if count is None else (s.length + count, s.fmt.packed_tokens(s.length + count, s.packed))
            for s, count in zip(storages, counts, strict=True)
        ]

    def __enter__(self) -> None:
        for storage in self._storages:
            storage.forget()

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            for storage, (length, packed) in zip(self._storages, self._states, strict=True):
                storage._packed, storage._length = packed, length


def dynamic_pages(pages: Tensor) -> Tensor:
    """Tell dynamo that the number of pages varies, so that growth never recompiles."""
    mark_dynamic(pages, 2)
    return pages
