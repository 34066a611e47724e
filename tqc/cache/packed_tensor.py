"""Packed tensors: what packs and extends them, and the ops that they answer without being decoded."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from tqc.cache.decoded import Decoded
from tqc.cache.storage import Append, Scored, Storage
from tqc.cache.subclass import PACKED_ANEW as _PACKED_ANEW
from tqc.cache.subclass import (
    SCORES,
    PackedTensor,
    decoded_view,
    handles,
    rewrite,
    select_rows,
    view_of_all,
)
from tqc.cache.views import family, hold, view, writable
from tqc.format import PackedFormat
from tqc.format.quantizer import fold
from tqc.ops import planes
from tqc.ops.library import ops as library

log = logging.getLogger(__name__)
aten = torch.ops.aten


@handles(aten.cat.default)
def _cat(tensors: list[Tensor], dim: int = 0) -> Any:
    first, *rest = [t for t in tensors if t.shape != (0,)]  # which `cat` ignores
    if not isinstance(first, PackedTensor) or any(t.dtype != first.dtype or t.dim() != 4 for t in rest):
        return NotImplemented
    if not rest:
        return _clone(first)
    if dim in (0, -4):
        return _cat_rows([first, *rest])
    if dim not in (2, -2) or any(t.shape[:2] != first.shape[:2] or t.shape[3] != first.shape[3] for t in rest):
        return NotImplemented
    if any(t.device != first.device for t in rest):
        return NotImplemented
    if first.fmt.groups:
        raise NotImplementedError(f"tokens are appended to a cache by compiled calls alone where {SCORES}")
    new = torch.cat([t.dequantize() if isinstance(t, PackedTensor) else t for t in rest], dim=2)
    end = first.end + new.shape[2]
    if first.fmt.keep is not None and first.begin < first.room_behind(0).first_left(end):
        log.warning("a sliding window is concatenated with %d tokens, more than it has room for: dense", new.shape[2])
        return NotImplemented
    storage = extend(first, fold(new, first.fmt)).packed_storage
    return PackedTensor(storage, end - first.begin, first.begin)  # a window may have dropped some, and holds them yet


def _cat_rows(tensors: list[Any]) -> Any:
    """Batches behind each other; they must agree in which tokens are packed."""
    alike = {
        (t.shape[1:], t.device, t.fmt, t.begin, t._stored()) if isinstance(t, PackedTensor) else None for t in tensors
    }
    if len(alike) > 1 or None in alike:
        return NotImplemented
    parts = [t.packed_storage.copy(t._stored()) for t in tensors]
    for part in parts:  # rings of pages get one size
        part.reserve(part.length)
    if len({(part.packed, part.begin, part.fmt.keep and part.pages.shape[2]) for part in parts}) > 1:
        return NotImplemented
    return PackedTensor(Storage.of_rows(parts), tensors[0].shape[2], tensors[0].begin)


def extend(
    past: PackedTensor,
    new: Tensor,
    append: Append = library.append,
    query: Tensor | None = None,
    scored: Scored = (),
) -> PackedTensor:
    """`past` with the tokens of `new`, [batch, heads, n, head_dim], behind it; in place where nobody reads further.

    Here and below, new tokens come as the format holds them: rotated where it is folded; `query` and `scored` are as in
    `Storage.holding`.
    """
    count = new.shape[2]
    storage = past.room_behind(count)
    storage.balance(new, query)
    storage.append(new, count, None, append, query, scored)
    return PackedTensor.up_to(storage, past.end + count)


def pack(
    new: Tensor,
    fmt: PackedFormat,
    append: Append = library.append,
    query: Tensor | None = None,
    scored: Scored = (),
) -> PackedTensor:
    """Pack dense keys or values, [batch, heads, n, head_dim]."""
    return PackedTensor.up_to(Storage.holding(new, fmt, new.shape[2], append, query, scored), new.shape[2])


@handles(aten.slice.Tensor)
def _slice(x: PackedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    start, end, _ = slice(start, end).indices(x.shape[dim])
    if step != 1:
        return NotImplemented
    if start == 0 and end == x.shape[dim]:
        return view_of_all(x)
    if dim in (2, -2) and start == 0 and end > 0:
        if reason := planes.why_not_rewound(x.packed_storage.packed, x.begin + end, x.fmt):
            raise NotImplementedError(reason)
        return view(x, PackedTensor(x.packed_storage, end, x.begin))
    if dim in (2, -2) and x.fmt.keep is not None and start < end == x.shape[2]:  # the window goes on
        return view(x, PackedTensor(x.packed_storage, end - start, x.begin + start))
    if dim in (0, -4):
        return view(x, select_rows(x, torch.arange(start, max(start, end), device=x.device)))
    return NotImplemented


@handles(aten.split.Tensor)
def _split(x: PackedTensor, size: int, dim: int = 0) -> Any:
    count = x.shape[dim]
    return (
        _split_with_sizes(x, [min(size, count - at) for at in range(0, max(count, 1), size)], dim)
        if size
        else NotImplemented
    )


@handles(aten.split_with_sizes.default)
def _split_with_sizes(x: PackedTensor, sizes: list[int], dim: int = 0) -> Any:
    if dim not in (0, -4) or sum(sizes) != x.shape[0]:
        return NotImplemented
    rows = torch.arange(x.shape[0], device=x.device).split(sizes)
    return [view(x, select_rows(x, part)) for part in rows]


@handles(aten.index_select.default)
def _index_select(x: PackedTensor, dim: int, index: Tensor) -> Any:
    return select_rows(x, index) if dim in (0, -4) else NotImplemented


@handles(aten.index.Tensor)
def _index(x: PackedTensor, indices: list[Tensor | None]) -> Any:
    rows, *others = indices
    if rows is None or rows.dim() != 1 or any(index is not None for index in others):
        return NotImplemented
    if rows.dtype == torch.bool:
        return select_rows(x, rows.nonzero().flatten()) if len(rows) == x.shape[0] else NotImplemented
    if rows.dtype not in (torch.int64, torch.int32):
        return NotImplemented
    return select_rows(x, torch.where(rows < 0, rows + x.shape[0], rows))


@handles(aten.select.int)
def _select(x: PackedTensor, dim: int, index: int) -> Any:
    if dim not in (0, -4) or not -x.shape[0] <= index < x.shape[0] or x.fmt.evicts:
        return NotImplemented
    rows = select_rows(x, torch.tensor([index % x.shape[0]], device=x.device))
    return decoded_view(x, rows.dequantize()[0], rows)


@handles(aten.stack.default)
def _stack(tensors: list[Any], dim: int = 0) -> Any:
    if dim not in (0, -5) or any(x.dim() != 4 or x.shape[0] != 1 for x in tensors):
        return NotImplemented
    rows = _cat_rows(tensors)
    return rows if rows is NotImplemented or rows.fmt.evicts else Decoded.of(rows.dequantize()[:, None], rows)


@handles(aten.repeat.default)
def _repeat(x: PackedTensor, repeats: list[int]) -> Any:
    if len(repeats) != 4 or list(repeats[1:]) != [1, 1, 1]:
        return NotImplemented
    return select_rows(x, torch.arange(x.shape[0], device=x.device).repeat(repeats[0]))


@handles(aten.clone.default)
def _clone(x: PackedTensor, *, memory_format: Any = None) -> PackedTensor:
    return PackedTensor(x.packed_storage.copy(x._stored()), x.shape[2], x.begin)


@handles(aten._to_copy.default)
def _to_copy(x: PackedTensor, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    if dtype not in (None, x.dtype):
        return NotImplemented
    s = x.packed_storage.copy(x._stored())
    device = device or x.device
    pages, dense, state = (part.to(device) for part in (s.pages, s.dense, s.state))
    return PackedTensor(Storage(pages, dense, state, s.fmt, s.length, s.packed, s.begin), x.shape[2], x.begin)


@handles(aten.zero_.default)
def _zero_(x: PackedTensor) -> PackedTensor:
    members = family(x)
    if any(member.end > x.end for member in members):
        rewrite(x, torch.Tensor.zero_)
    else:
        storage = writable(x)
        storage.clear()
        hold(members, storage)
    return x


@handles(aten.fill_.Scalar, aten.fill_.Tensor)
def _fill_(x: PackedTensor, value: Any) -> PackedTensor:
    if not value:
        return _zero_(x)
    rewrite(x, lambda dense: dense.fill_(value))
    return x


@handles(aten.copy_.default)
def _copy_(x: PackedTensor, source: Tensor, non_blocking: bool = False) -> PackedTensor:
    if isinstance(source, PackedTensor) and _takes_over(x, source):
        hold(family(x), _to_copy(source, device=x.device).packed_storage)
    else:
        log.warning(_PACKED_ANEW)
        rewrite(x, lambda dense: dense.copy_(source))
    return x


def _takes_over(x: PackedTensor, source: PackedTensor) -> bool:
    """Whether `source` may be copied into `x` and its views as it is packed."""
    same = (x.fmt, x.shape, x.dtype) == (source.fmt, source.shape, source.dtype)
    return same and all(member.shape[2] <= x.shape[2] for member in family(x))


@handles(aten.index_copy_.default)
def _index_copy_(x: PackedTensor, dim: int, index: Tensor, source: Tensor) -> Any:
    source = source.dequantize() if isinstance(source, PackedTensor) else source
    if dim in (2, -2) and len(index) and source.shape == (*x.shape[:2], len(index), x.shape[3]):
        first, end = int(index[0]), int(index[0]) + len(index)
        consecutive = index.tolist() == list(range(first, end))
        if consecutive and (first < 0 or end > x.shape[2]):
            raise IndexError(f"positions from {first} on are outside of a cache of {x.shape[2]} tokens")
        held = max(member._stored() for member in family(x)) - x.begin
        if consecutive and source.dtype == x.dtype and end >= held and not x.fmt.groups:
            writable(x)
            write_at(x, fold(source, x.fmt), index + x.begin)
            return x
        log.warning(_PACKED_ANEW)
        rewrite(x, lambda old: old.index_copy_(2, index, source), max(held, int(index.max()) + 1))
    else:
        rewrite(x, lambda old: old.index_copy_(dim, index, source))
    return x


def write_at(x: PackedTensor, new: Tensor, start: Tensor, append: Append = library.append) -> None:
    """Write into a preallocated packed tensor, in place: tokens at `start[0]`, `start[0] + 1`, ...; what is stored
    behind them is dropped, and nobody else may read there (see `writable`)."""
    x.packed_storage.append(new, None, start, append)
