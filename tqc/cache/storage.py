"""The memory behind packed tensors: spare capacity, appending in place, copying on a fork."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.ops.planes import rewind

if TYPE_CHECKING:
    from tqc.cache.packed_tensor import PackedTensor

# Pages are added by 1/128 of what there is, and by at least 1: spare capacity stays below 0.8 % of a long cache, and
# growing copies 128 tokens' worth of codes for each one that is packed.
_GROWTH = 128
_MIN_SPARE_PAGES = 1
_MIN_PAGES = 2  # a size of 1 would be a constant to dynamo


class Storage:
    """Parts of one packed tensor (see `tqc.format`) with a host copy of its state.

    `length` and `packed` mirror `state`; they are None where only the device knows them (writes at a `start` tensor).
    """

    __slots__ = ("pages", "dense", "state", "fmt", "_length", "_packed", "_views", "__weakref__")

    def __init__(
        self, pages: Tensor, dense: Tensor, state: Tensor, fmt: PackedFormat, length: int | None, packed: int | None
    ) -> None:
        self.pages, self.dense, self.state, self.fmt = pages, dense, state, fmt
        self._length, self._packed = length, packed
        self._views: list[weakref.ref[PackedTensor]] = []

    @classmethod
    def allocate(
        cls, batch: int, heads: int, fmt: PackedFormat, dtype: torch.dtype, device: torch.device, tokens: int
    ) -> Storage:
        """Empty storage with room for `tokens` tokens and some more."""
        num_pages = max(_MIN_PAGES, fmt.packed_tokens(tokens) // PAGE_TOKENS + _MIN_SPARE_PAGES)
        pages = torch.zeros(batch, heads, num_pages, fmt.page_bytes, dtype=torch.uint8, device=device)
        dense = torch.zeros(batch, heads, fmt.dense_rows, fmt.head_dim, dtype=dtype, device=device)
        state = torch.zeros(2, dtype=torch.int64, device=device)
        return cls(_dynamic_pages(pages), dense, state, fmt, 0, 0)

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

    def written_on_device(self) -> None:
        """Forget the host copy of the state: a kernel wrote at a position that only the device knows."""
        self._length = self._packed = None

    def appended(self, count: int) -> None:
        """Advance the host copy of the state after `count` tokens were appended."""
        self._packed = self.fmt.packed_tokens(self.length + count, self.packed)
        self._length = self.length + count

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
        self.pages = _dynamic_pages(pages)

    def copy(self, length: int) -> Storage:
        """A storage of its own with the first `length` tokens."""
        copy = Storage(
            _dynamic_pages(self.pages.clone()),
            self.dense.clone(),
            self.state.clone(),
            self.fmt,
            self.length,
            self.packed,
        )
        copy.truncate(length)
        return copy

    def select(self, rows: Tensor, length: int) -> Storage:
        """A storage of its own with the first `length` tokens of the given batch rows."""
        pages, dense = self.pages.index_select(0, rows), self.dense.index_select(0, rows)
        chosen = Storage(_dynamic_pages(pages), dense, self.state.clone(), self.fmt, self.length, self.packed)
        chosen.truncate(length)
        return chosen

    def truncate(self, length: int) -> None:
        """Drop the tokens from `length` on, in place."""
        if length == self.length:
            return
        self._packed = rewind(self.pages, self.dense, self.packed, length, self.fmt)
        self._length = length
        self.state.copy_(torch.tensor([self._length, self._packed]))

    def view(self, tensor: PackedTensor) -> None:
        """Remember that `tensor` reads from here."""
        if len(self._views) > 4:
            self._views = [ref for ref in self._views if ref() is not None]
        self._views.append(weakref.ref(tensor))

    def writable(self, length: int) -> Storage:
        """The storage to append to behind the first `length` tokens: this one, or a copy if others read further."""
        if length == self.length:
            return self
        alive = [tensor for ref in self._views if (tensor := ref()) is not None]
        if any(tensor.shape[2] > length for tensor in alive):
            return self.copy(length)
        self.truncate(length)
        return self


def _dynamic_pages(pages: Tensor) -> Tensor:
    """Tell dynamo that the number of pages varies, so that growth never recompiles."""
    torch._dynamo.maybe_mark_dynamic(pages, 2)
    return pages
