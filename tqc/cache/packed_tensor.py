"""The tensor type that a user's own cache object holds in place of dense keys or values."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tqc.cache.decoded import Decoded, written_by
from tqc.cache.storage import Append, Scored, Storage
from tqc.cache.views import Views, family, hold, view, writable
from tqc.format import PackedFormat
from tqc.format.quantizer import fold
from tqc.ops import planes
from tqc.ops.library import ops as library
from tqc.torch_private import (
    DYNAMIC_SIZES,
    FakeTensor,
    disabled_torch_function,
    is_view_op,
    make_wrapper_subclass,
    no_views,
    pytree,
)

log = logging.getLogger(__name__)
aten = torch.ops.aten
_LENGTH = {2}  # the dimension that varies in a growing cache
_SCORES = "a scorer sorts its tokens, which needs the queries of attention"
_PACKED_ANEW = "a packed tensor is written elsewhere than at its end: each such write packs it anew, slowly"


class PackedTensor(torch.Tensor):
    """Keys or values of one layer, [batch, num_key_value_heads, length, head_dim], packed.

    It answers to shape, dtype and device like the dense tensor it stands for; where it is longer than what is stored,
    the rest are zeros. Concatenation along the length appends in place where nobody else reads further (else it copies
    first); prefixes, batch selection, splitting and repetition, `clone` and `to(device)` stay packed, and so it does
    when it is written by `index_copy_`, an index, `zero_`, `fill_` or `copy_`. Such a write shows in its packed views,
    and is refused while some of them hold copies (rows, and parts that are decoded). Every other op sees dense values;
    one that would write into them raises.

    Pickled it is dense, so that a module whose buffers are packed is saved as any other.

    A wrapper subclass: the bytes of its pages, `dense` and `state` (see `tqc.format`) are its inner tensors.

    Attributes:
        begin: how many tokens before its own a sliding window has dropped.
    """

    packed_storage: Storage
    begin: int
    views: Views | None = None

    @staticmethod
    def __new__(cls, storage: Storage, length: int, begin: int = 0) -> PackedTensor:
        batch, heads, _, dim = storage.dense.shape
        return make_wrapper_subclass(cls, (batch, heads, length, dim), storage.dense.dtype, storage.dense.device)

    def __init__(self, storage: Storage, length: int, begin: int = 0) -> None:
        self.packed_storage, self.begin = storage, begin
        storage.note_reader(self, begin + length)
        if storage.is_full(begin + length):
            setattr(self, DYNAMIC_SIZES, _LENGTH)

    @classmethod
    def up_to(cls, storage: Storage, end: int) -> PackedTensor:
        """All tokens of a storage before position `end`."""
        return cls(storage, end - storage.begin, storage.begin)

    __torch_function__ = disabled_torch_function

    @property
    def pages(self) -> Tensor:
        return self.packed_storage.pages

    @property
    def dense(self) -> Tensor:
        return self.packed_storage.dense

    @property
    def codes(self) -> Tensor:
        return self.packed_storage.codes

    @property
    def state(self) -> Tensor:
        return self.packed_storage.state_from(self.begin)

    @property
    def end(self) -> int:
        """Position behind the last token, those that were dropped being counted."""
        return self.begin + self.shape[2]

    @property
    def fmt(self) -> PackedFormat:
        return self.packed_storage.fmt

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return ["codes", "dense", "state"], self.packed_storage.fmt.spec

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], spec: str, outer_size: Any, outer_stride: Any) -> PackedTensor:
        parts = (inner["codes"], inner["dense"], inner["state"])
        return PackedTensor(Storage(*parts, PackedFormat.parse(spec), None, None, 0), outer_size[2])

    # Methods below are overridden where dispatch comes too late: autograd would make the whole tensor the base of each
    # prefix and keep it alive, so that appending to a cropped cache had to copy; `repeat_interleave` decomposes.
    def __getitem__(self, index: Any) -> Tensor:
        with no_views():
            return super().__getitem__(index)

    def __setitem__(self, index: Any, new: Any) -> None:
        if _is_fake((self,)):  # being traced: `read_cache` gives the write dense tokens
            super().__setitem__(index, new)
            return
        full, positions = slice(None), index[2] if isinstance(index, tuple) and len(index) in (3, 4) else None
        if isinstance(positions, slice) and positions.step in (None, 1):
            positions = torch.arange(*positions.indices(self.shape[2]), device=self.device)
        if isinstance(positions, Tensor) and positions.dim() == 1 and isinstance(new, Tensor) and new.dim() == 4:
            along_length = all(isinstance(part, slice) and part == full for part in (*index[:2], *index[3:]))
            counts = positions.dtype == torch.int64 and bool((positions >= 0).all())
            if along_length and counts and new.shape[2] == len(positions):
                self.index_copy_(2, positions, new.expand(*self.shape[:2], *new.shape[2:]).to(self.dtype))
                return
        log.warning(_PACKED_ANEW)
        rewrite(self, lambda dense: dense.__setitem__(index, new))

    def repeat_interleave(  # type: ignore[override]
        self, repeats: Any, dim: int | None = None, *, output_size: int | None = None
    ) -> Tensor:
        if dim != 0 or not isinstance(repeats, int):
            return super().repeat_interleave(repeats, dim, output_size=output_size)
        return _select_rows(self, torch.arange(self.shape[0], device=self.device).repeat_interleave(repeats))

    @property
    def evicted_tokens(self) -> int:
        """How many of its tokens each head has evicted."""
        groups = self.fmt.groups
        if groups is None:
            return 0
        packed = min(self.packed_storage.packed, max(0, self.end - self.fmt.sink_tokens))
        return packed // groups.tokens * (groups.tokens - groups.kept)

    def whole(self, what: str) -> PackedTensor:
        """Itself, where all of its tokens are held.

        Raises:
            NotImplementedError: if some were evicted, so that `what` would take zeros for them.
        """
        if self.fmt.evicts and not _is_fake((self,)) and self.packed_storage.packed:
            raise NotImplementedError(
                f"{what} would take zeros for tokens that were evicted from this cache; .dequantize() gives them so"
            )
        return self

    def dequantize(self) -> Tensor:
        """Dense copy, [batch, heads, length, head_dim] in this tensor's dtype; zeros where tokens were evicted."""
        return library.read(self.codes, self.dense, self.state, self.shape[2], self.fmt.spec)

    def packed_nbytes(self) -> int:
        """Bytes held: codes, scales, centres, sinks, window and spare capacity."""
        return self.packed_storage.nbytes

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, format={self.fmt})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedTensor:
        memo[id(self)] = result = PackedTensor(self.packed_storage.copy(self._stored()), self.shape[2], self.begin)
        return result

    def __copy__(self) -> Tensor:
        return self.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        self.whole("pickle")
        log.warning("a packed tensor is pickled as a dense one; tqc.save_cache(cache, path) keeps a cache packed")
        return self.dequantize().__reduce_ex__(protocol)

    def _stored(self) -> int:
        """Position behind the last token that is stored; before the end in a preallocated cache."""
        return min(self.end, self.packed_storage.length)

    def room_behind(self, count: int) -> Storage:
        """Storage to append `count` tokens to, see `Storage.room_behind`."""
        return self.packed_storage.room_behind(self.begin, self.end, count)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0], PackedTensor | list) and not _is_fake(args):
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in (aten.detach.default, aten.alias.default):
            return _view_of_all(args[0])
        traced = _is_fake(args)
        if any(isinstance(value, PackedTensor) for value in written_by(func, args, kwargs)):
            if traced:  # `read_cache` gives the op dense tokens
                return args[0]
            raise NotImplementedError(f"{func} would write into a packed tensor; call .dequantize() first")
        given = args
        args, kwargs = pytree.tree_map_only(PackedTensor, lambda x: x.whole(f"{func}").dequantize(), (args, kwargs))
        result = func(*args, **kwargs)
        return _decoded(given[0], result) if is_view_op(func) and not traced else result


def _decoded(of: PackedTensor, result: Any, packed: PackedTensor | None = None) -> Any:
    """Dense values as views of `of`."""
    parts = Decoded.of(result, packed)
    for part in (parts,) if isinstance(parts, Tensor) else parts:
        view(of, part)
    return parts


def _is_fake(args: Any) -> bool:
    return any(isinstance(t.dense, FakeTensor) for t in pytree.arg_tree_leaves(*args) if isinstance(t, PackedTensor))


_HANDLERS: dict[Any, Callable[..., Any]] = {}


def _handles(*ops: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS.update(dict.fromkeys(ops, function))
        return function

    return register


@_handles(aten.cat.default)
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
    if any(t.device != first.device for t in rest) or first.fmt.keep is not None:
        return NotImplemented
    if first.fmt.groups:
        raise NotImplementedError(f"tokens are appended to a cache by compiled calls alone where {_SCORES}")
    new = torch.cat([t.dequantize() if isinstance(t, PackedTensor) else t for t in rest], dim=2)
    return extend(first, fold(new, first.fmt))


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


@_handles(aten.slice.Tensor)
def _slice(x: PackedTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    start, end, _ = slice(start, end).indices(x.shape[dim])
    if step != 1:
        return NotImplemented
    if start == 0 and end == x.shape[dim]:
        return _view_of_all(x)
    if dim in (2, -2) and start == 0 and end > 0:
        if reason := planes.why_not_rewound(x.packed_storage.packed, x.begin + end, x.fmt):
            raise NotImplementedError(reason)
        return view(x, PackedTensor(x.packed_storage, end, x.begin))
    if dim in (0, -4):
        return view(x, _select_rows(x, torch.arange(start, max(start, end), device=x.device)))
    return NotImplemented


def _view_of_all(x: PackedTensor) -> PackedTensor:
    return view(x, PackedTensor(x.packed_storage, x.shape[2], x.begin))


@_handles(aten.split.Tensor)
def _split(x: PackedTensor, size: int, dim: int = 0) -> Any:
    count = x.shape[dim]
    return (
        _split_with_sizes(x, [min(size, count - at) for at in range(0, max(count, 1), size)], dim)
        if size
        else NotImplemented
    )


@_handles(aten.split_with_sizes.default)
def _split_with_sizes(x: PackedTensor, sizes: list[int], dim: int = 0) -> Any:
    if dim not in (0, -4) or sum(sizes) != x.shape[0]:
        return NotImplemented
    rows = torch.arange(x.shape[0], device=x.device).split(sizes)
    return [view(x, _select_rows(x, part)) for part in rows]


@_handles(aten.index_select.default)
def _index_select(x: PackedTensor, dim: int, index: Tensor) -> Any:
    return _select_rows(x, index) if dim in (0, -4) else NotImplemented


@_handles(aten.index.Tensor)
def _index(x: PackedTensor, indices: list[Tensor | None]) -> Any:
    rows, *others = indices
    if rows is None or rows.dim() != 1 or any(index is not None for index in others):
        return NotImplemented
    if rows.dtype == torch.bool:
        return _select_rows(x, rows.nonzero().flatten()) if len(rows) == x.shape[0] else NotImplemented
    if rows.dtype not in (torch.int64, torch.int32):
        return NotImplemented
    return _select_rows(x, torch.where(rows < 0, rows + x.shape[0], rows))


@_handles(aten.select.int)
def _select(x: PackedTensor, dim: int, index: int) -> Any:
    if dim not in (0, -4) or not -x.shape[0] <= index < x.shape[0] or x.fmt.evicts:
        return NotImplemented
    rows = _select_rows(x, torch.tensor([index % x.shape[0]], device=x.device))
    return _decoded(x, rows.dequantize()[0], rows)


@_handles(aten.stack.default)
def _stack(tensors: list[Any], dim: int = 0) -> Any:
    if dim not in (0, -5) or any(x.dim() != 4 or x.shape[0] != 1 for x in tensors):
        return NotImplemented
    rows = _cat_rows(tensors)
    return rows if rows is NotImplemented or rows.fmt.evicts else Decoded.of(rows.dequantize()[:, None], rows)


@_handles(aten.repeat.default)
def _repeat(x: PackedTensor, repeats: list[int]) -> Any:
    if len(repeats) != 4 or list(repeats[1:]) != [1, 1, 1]:
        return NotImplemented
    return _select_rows(x, torch.arange(x.shape[0], device=x.device).repeat(repeats[0]))


def _select_rows(x: PackedTensor, rows: Tensor) -> PackedTensor:
    return PackedTensor(x.packed_storage.select(rows.to(x.device), x._stored()), x.shape[2], x.begin)


@_handles(aten.clone.default)
def _clone(x: PackedTensor, *, memory_format: Any = None) -> PackedTensor:
    return PackedTensor(x.packed_storage.copy(x._stored()), x.shape[2], x.begin)


@_handles(aten._to_copy.default)
def _to_copy(x: PackedTensor, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    if dtype not in (None, x.dtype):
        return NotImplemented
    s = x.packed_storage.copy(x._stored())
    device = device or x.device
    pages, dense, state = (part.to(device) for part in (s.pages, s.dense, s.state))
    return PackedTensor(Storage(pages, dense, state, s.fmt, s.length, s.packed, s.begin), x.shape[2], x.begin)


@_handles(aten.zero_.default)
def _zero_(x: PackedTensor) -> PackedTensor:
    if x.fmt.keep is not None or any(member.end > x.end for member in family(x)):
        rewrite(x, torch.Tensor.zero_)
    else:
        writable(x).truncate(0)
    return x


@_handles(aten.fill_.Scalar, aten.fill_.Tensor)
def _fill_(x: PackedTensor, value: Any) -> PackedTensor:
    if not value:
        return _zero_(x)
    rewrite(x, lambda dense: dense.fill_(value))
    return x


@_handles(aten.copy_.default)
def _copy_(x: PackedTensor, source: Tensor, non_blocking: bool = False) -> PackedTensor:
    if isinstance(source, PackedTensor) and _takes_over(x, source):
        hold(family(x), _to_copy(source, device=x.device).packed_storage)
    else:
        rewrite(x, lambda dense: dense.copy_(source))
    return x


def _takes_over(x: PackedTensor, source: PackedTensor) -> bool:
    """Whether `source` may be copied into `x` and its views as it is packed."""
    same = (x.fmt, x.shape, x.dtype) == (source.fmt, source.shape, source.dtype)
    return same and all(member.shape[2] <= x.shape[2] for member in family(x))


@_handles(aten.index_copy_.default)
def _index_copy_(x: PackedTensor, dim: int, index: Tensor, source: Tensor) -> Any:
    source = source.dequantize() if isinstance(source, PackedTensor) else source
    if dim in (2, -2) and len(index) and source.shape == (*x.shape[:2], len(index), x.shape[3]):
        first, end = int(index[0]), int(index[0]) + len(index)
        consecutive = index.tolist() == list(range(first, end))
        if consecutive and (first < 0 or end > x.shape[2]):
            raise IndexError(f"positions from {first} on are outside of a cache of {x.shape[2]} tokens")
        held = max(member._stored() for member in family(x)) - x.begin
        if consecutive and source.dtype == x.dtype and end >= held and x.fmt.keep is None and not x.fmt.groups:
            writable(x)
            write_at(x, fold(source, x.fmt), index)
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


def rewrite(x: PackedTensor, write: Callable[[Tensor], Any], stored: int | None = None, kernels: Any = library) -> None:
    """Write in any way: decode `x` and its views, write, and pack them anew; nothing has changed if `write` raises.

    Slow, and it codes the same tokens again.

    Args:
        write: gets the dense tokens that it shall write into.
        stored: behind how many tokens there are none but zeros; all may be others if None.
    """
    members = family(x)
    if x.fmt.groups:
        raise NotImplementedError(f"a cache is not written elsewhere than at its end where {_SCORES}")
    length = max(member.shape[2] for member in members)
    dense = kernels.read(x.pages, x.dense, x.state, length, x.fmt.spec)
    write(dense[:, :, : x.shape[2]])
    tokens = fold(dense if stored is None else dense[:, :, :stored], x.fmt)
    hold(members, Storage.holding(tokens, x.fmt, length, kernels.append))
