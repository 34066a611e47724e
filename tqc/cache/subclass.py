"""The tensor type that a user's own cache object holds in place of dense keys or values."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tqc.cache.decoded import Decoded, written_by
from tqc.cache.storage import Storage
from tqc.cache.views import Views, family, hold, view
from tqc.format import PackedFormat
from tqc.format.quantizer import fold
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
PACKED_ANEW = "a packed tensor is written elsewhere than at its end: each such write packs it anew, slowly"
SCORES = "a scorer sorts its tokens, which needs the queries of attention"


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
        if is_fake((self,)):  # being traced: `read_cache` gives the write dense tokens
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
        log.warning(PACKED_ANEW)
        rewrite(self, lambda dense: dense.__setitem__(index, new))

    def repeat_interleave(  # type: ignore[override]
        self, repeats: Any, dim: int | None = None, *, output_size: int | None = None
    ) -> Tensor:
        if dim != 0 or not isinstance(repeats, int):
            return super().repeat_interleave(repeats, dim, output_size=output_size)
        return select_rows(self, torch.arange(self.shape[0], device=self.device).repeat_interleave(repeats))

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
        if self.fmt.evicts and not is_fake((self,)) and self.packed_storage.packed:
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
        handler = HANDLERS.get(func)
        if handler is not None and isinstance(args[0], PackedTensor | list) and not is_fake(args):
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in (aten.detach.default, aten.alias.default):
            return view_of_all(args[0])
        traced = is_fake(args)
        if any(isinstance(value, PackedTensor) for value in written_by(func, args, kwargs)):
            if traced:  # `read_cache` gives the op dense tokens
                return args[0]
            raise NotImplementedError(f"{func} would write into a packed tensor; call .dequantize() first")
        given = args
        args, kwargs = pytree.tree_map_only(PackedTensor, lambda x: x.whole(f"{func}").dequantize(), (args, kwargs))
        result = func(*args, **kwargs)
        return decoded_view(given[0], result) if is_view_op(func) and not traced else result


def is_fake(args: Any) -> bool:
    return any(isinstance(t.dense, FakeTensor) for t in pytree.arg_tree_leaves(*args) if isinstance(t, PackedTensor))


HANDLERS: dict[Any, Callable[..., Any]] = {}


def handles(*ops: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        HANDLERS.update(dict.fromkeys(ops, function))
        return function

    return register


def decoded_view(of: PackedTensor, result: Any, packed: PackedTensor | None = None) -> Any:
    """Dense values as views of `of`."""
    parts = Decoded.of(result, packed)
    for part in (parts,) if isinstance(parts, Tensor) else parts:
        view(of, part)
    return parts


def view_of_all(x: PackedTensor) -> PackedTensor:
    return view(x, PackedTensor(x.packed_storage, x.shape[2], x.begin))


def select_rows(x: PackedTensor, rows: Tensor) -> PackedTensor:
    return PackedTensor(x.packed_storage.select(rows.to(x.device), x._stored()), x.shape[2], x.begin)


def rewrite(x: PackedTensor, write: Callable[[Tensor], Any], stored: int | None = None, kernels: Any = library) -> None:
    """Write in any way: decode `x` and its views, write, and pack them anew; nothing has changed if `write` raises.

    Slow, and it codes the same tokens again.

    Args:
        write: gets the dense tokens that it shall write into.
        stored: behind how many tokens there are none but zeros; all may be others if None.
    """
    members = family(x)
    if x.fmt.groups:
        raise NotImplementedError(f"a cache is not written elsewhere than at its end where {SCORES}")
    length = max(member.shape[2] for member in members)
    dense = kernels.read(x.pages, x.dense, x.state, length, x.fmt.spec)
    write(dense[:, :, : x.shape[2]])
    tokens = fold(dense if stored is None else dense[:, :, :stored], x.fmt)
    hold(members, Storage.holding(tokens, x.fmt, length, kernels.append))
