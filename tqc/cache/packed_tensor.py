"""The tensor type that a user's own cache object holds in place of dense keys or values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tqc.cache.storage import Appending, Storage
from tqc.format import PackedFormat
from tqc.format.quantizer import fold
from tqc.ops.library import ops as library
from tqc.torch_private import (
    DYNAMIC_SIZES,
    FakeTensor,
    arguments_of,
    disabled_torch_function,
    make_wrapper_subclass,
    no_views,
    pytree,
)

aten = torch.ops.aten
Append = Callable[..., None]
_LENGTH = {2}  # the dimension that varies in a growing cache


class PackedTensor(torch.Tensor):
    """Keys or values of one layer, [batch, num_key_value_heads, length, head_dim], packed.

    It answers to shape, dtype and device like the dense tensor it stands for. Concatenation along the length appends
    in place where nobody else reads further (else it copies first); prefixes, batch selection and repetition,
    `clone`, `to(device)` and `zero_` stay packed. Every other op sees dense values; one that would write into them
    raises.

    A wrapper subclass: `pages`, `dense` and `state` (see `tqc.format`) are its inner tensors.
    """

    packed_storage: Storage

    @staticmethod
    def __new__(cls, storage: Storage, length: int) -> PackedTensor:
        batch, heads, _, dim = storage.dense.shape
        return make_wrapper_subclass(cls, (batch, heads, length, dim), storage.dense.dtype, storage.dense.device)

    def __init__(self, storage: Storage, length: int) -> None:
        self.packed_storage = storage
        storage.view(self)
        if storage.is_full(length):
            setattr(self, DYNAMIC_SIZES, _LENGTH)

    __torch_function__ = disabled_torch_function

    @property
    def pages(self) -> Tensor:
        return self.packed_storage.pages

    @property
    def dense(self) -> Tensor:
        return self.packed_storage.dense

    @property
    def state(self) -> Tensor:
        return self.packed_storage.state

    @property
    def fmt(self) -> PackedFormat:
        return self.packed_storage.fmt

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return ["pages", "dense", "state"], self.packed_storage.fmt.spec

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], spec: str, outer_size: Any, outer_stride: Any) -> PackedTensor:
        storage = Storage(inner["pages"], inner["dense"], inner["state"], PackedFormat.parse(spec), None, None)
        return PackedTensor(storage, outer_size[2])

    # Methods below are overridden where dispatch comes too late: autograd would make the whole tensor the base of each
    # prefix and keep it alive, so that appending to a cropped cache had to copy; `repeat_interleave` decomposes.
    def __getitem__(self, index: Any) -> Tensor:
        with no_views():
            return super().__getitem__(index)

    def __setitem__(self, index: Any, new: Any) -> None:
        if isinstance(index, tuple) and len(index) in (3, 4) and isinstance(new, Tensor):
            full, positions = slice(None), index[2]
            if isinstance(positions, slice) and positions.step in (None, 1):
                positions = torch.arange(*positions.indices(self.shape[2]), device=self.device)
            if all(isinstance(part, slice) and part == full for part in (*index[:2], *index[3:])):
                if isinstance(positions, Tensor) and positions.dim() == 1 and new.shape[2:3] == positions.shape:
                    self.index_copy_(2, positions, new.expand(*self.shape[:2], *new.shape[2:]))
                    return
        raise NotImplementedError(f"{index} would write into a packed tensor; call .dequantize() first")

    def repeat_interleave(  # type: ignore[override]
        self, repeats: Any, dim: int | None = None, *, output_size: int | None = None
    ) -> Tensor:
        if dim != 0 or not isinstance(repeats, int):
            return super().repeat_interleave(repeats, dim, output_size=output_size)
        return _select_rows(self, torch.arange(self.shape[0], device=self.device).repeat_interleave(repeats))

    def dequantize(self) -> Tensor:
        """Dense copy, [batch, heads, length, head_dim] in this tensor's dtype."""
        return library.read(self.pages, self.dense, self.state, self.shape[2], self.fmt.spec)

    def packed_nbytes(self) -> int:
        """Bytes held: codes, scales, centres, sinks, window and spare capacity."""
        return self.packed_storage.nbytes

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, format={self.fmt})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedTensor:
        memo[id(self)] = result = PackedTensor(self.packed_storage.copy(self._stored()), self.shape[2])
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a packed tensor is not pickled: save the cache with tqc.save_cache(cache, path)")

    def _stored(self) -> int:
        """How many of the tokens are stored; fewer than the length in a preallocated cache."""
        return min(self.shape[2], self.packed_storage.length)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and not _is_fake(args):
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func is aten.detach.default:
            return PackedTensor(args[0].packed_storage, args[0].shape[2])
        arguments = arguments_of(func)
        named = {**dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}
        for argument in arguments:
            written = pytree.tree_leaves(named.get(argument.name)) if argument.is_write else ()
            if any(isinstance(value, PackedTensor) for value in written):
                if _is_fake(args):  # being traced: `read_cache` gives the op dense tokens
                    return args[0]
                raise NotImplementedError(f"{func} would write into a packed tensor; call .dequantize() first")
        args, kwargs = pytree.tree_map_only(PackedTensor, PackedTensor.dequantize, (args, kwargs))
        return func(*args, **kwargs)


def _is_fake(args: Any) -> bool:
    return any(isinstance(t.pages, FakeTensor) for t in pytree.arg_tree_leaves(*args) if isinstance(t, PackedTensor))


_HANDLERS: dict[Any, Callable[..., Any]] = {}


def _handles(*ops: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS.update(dict.fromkeys(ops, function))
        return function

    return register


@_handles(aten.cat.default)
def _cat(tensors: list[Tensor], dim: int = 0) -> Any:
    first, *rest = tensors
    if dim not in (2, -2) or not isinstance(first, PackedTensor) or any(isinstance(t, PackedTensor) for t in rest):
        return NotImplemented
    if any(t.dtype != first.dtype or t.shape[:2] != first.shape[:2] for t in rest):
        return NotImplemented
    return extend(first, fold(torch.cat(rest, dim=2), first.fmt))


def extend(past: PackedTensor, new: Tensor, append: Append = library.append) -> PackedTensor:
    """`past` with the tokens of `new`, [batch, heads, n, head_dim], behind it; in place where nobody reads further.

    Here and below, new tokens come as the format holds them: rotated where it is folded.
    """
    length, count = past.shape[2], new.shape[2]
    storage = past.packed_storage.room_behind(length, count)
    _append(storage, new, count, None, append)
    return PackedTensor(storage, length + count)


def pack(new: Tensor, fmt: PackedFormat, append: Append = library.append) -> PackedTensor:
    """Pack dense keys or values, [batch, heads, n, head_dim]."""
    return PackedTensor(pack_storage(new, fmt, new.shape[2], append), new.shape[2])


def pack_storage(new: Tensor, fmt: PackedFormat, tokens: int, append: Append = library.append) -> Storage:
    """Storage with room for `tokens` tokens that holds those of `new`."""
    batch, heads, count, _ = new.shape
    storage = Storage.allocate(batch, heads, fmt, new.dtype, new.device, tokens)
    _append(storage, new, count, None, append)
    return storage


def _append(storage: Storage, new: Tensor, count: int | None, start: Tensor | None, append: Append) -> None:
    with Appending((storage,), (count,)):
        append(storage.pages, storage.dense, storage.state, new, start, storage.fmt.spec)


@_handles(aten.slice.Tensor)
def _slice(x: PackedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    size = x.shape[dim]
    start = 0 if start is None else max(start + size if start < 0 else start, 0)
    end = size if end is None else min(end + size if end < 0 else end, size)
    if step != 1:
        return NotImplemented
    if start == 0 and end == size:
        return PackedTensor(x.packed_storage, x.shape[2])
    if dim in (2, -2) and start == 0 and 0 < end <= x.packed_storage.length:
        return PackedTensor(x.packed_storage, end)
    if dim == 0:
        return _select_rows(x, torch.arange(start, max(start, end), device=x.device))
    return NotImplemented


@_handles(aten.index_select.default)
def _index_select(x: PackedTensor, dim: int, index: Tensor) -> Any:
    return _select_rows(x, index) if dim == 0 else NotImplemented


@_handles(aten.index.Tensor)
def _index(x: PackedTensor, indices: list[Tensor | None]) -> Any:
    rows, *others = indices
    if rows is None or rows.dim() != 1 or any(index is not None for index in others):
        return NotImplemented
    return _select_rows(x, rows.nonzero().flatten() if rows.dtype == torch.bool else rows)


@_handles(aten.repeat.default)
def _repeat(x: PackedTensor, repeats: list[int]) -> Any:
    if len(repeats) != 4 or list(repeats[1:]) != [1, 1, 1]:
        return NotImplemented
    return _select_rows(x, torch.arange(x.shape[0], device=x.device).repeat(repeats[0]))


def _select_rows(x: PackedTensor, rows: Tensor) -> PackedTensor:
    return PackedTensor(x.packed_storage.select(rows.to(x.device), x._stored()), x.shape[2])


@_handles(aten.clone.default)
def _clone(x: PackedTensor, *, memory_format: Any = None) -> PackedTensor:
    return PackedTensor(x.packed_storage.copy(x._stored()), x.shape[2])


@_handles(aten._to_copy.default)
def _to_copy(x: PackedTensor, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    if dtype not in (None, x.dtype):
        return NotImplemented
    s = x.packed_storage.copy(x._stored())
    moved = Storage(s.pages.to(device), s.dense.to(device), s.state.to(device), s.fmt, s.length, s.packed)
    return PackedTensor(moved, x.shape[2])


@_handles(aten.zero_.default)
def _zero_(x: PackedTensor) -> PackedTensor:
    x.packed_storage.truncate(0)
    return x


@_handles(aten.index_copy_.default)
def _index_copy_(x: PackedTensor, dim: int, index: Tensor, source: Tensor) -> Any:
    first = int(index[0])
    if dim not in (2, -2) or index.tolist() != list(range(first, first + len(index))):
        return NotImplemented
    if first < 0 or first + len(index) > x.shape[2]:
        raise IndexError(f"positions from {first} on are outside of a cache of {x.shape[2]} tokens")
    write_at(x, fold(source, x.fmt), index)
    return x


def write_at(x: PackedTensor, new: Tensor, start: Tensor, append: Append = library.append) -> None:
    """Write into a preallocated packed tensor, in place: tokens at `start[0]`, `start[0] + 1`, ..."""
    _append(x.packed_storage, new, None, start, append)
