"""What a realized graph calls between its compiled regions: ops on live packed tensors, with their kernels.

An instruction is a value: what is known when the graph is realized are its fields, and the tensors of a step are its
operands, named by OPERANDS in the order of the call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import Node

from tqc import ops
from tqc.cache import packed_tensor, preallocated
from tqc.cache.packed_tensor import PackedTensor
from tqc.cache.storage import Appending, Storage
from tqc.cache.views import family, hold, writable
from tqc.execute.folded_weights import Fold, folded_weights
from tqc.format import PackedFormat
from tqc.lowering.provider import Provider
from tqc.ops import Op, Planes, planes
from tqc.ops.planes import position
from tqc.ops.write import is_append
from tqc.torch_private import pytree


class Instruction:
    """Base of all instructions.

    Attributes:
        OPERANDS: names of the operands.
    """

    OPERANDS: ClassVar[tuple[str, ...]] = ()

    @property
    def __name__(self) -> str:
        return type(self).__qualname__

    def operands(self, node: Node) -> dict[str, Any]:
        """Operands of a node that calls this, by name."""
        return dict(zip(self.OPERANDS, node.args, strict=True))


@dataclass(frozen=True, eq=False)
class Attention(Instruction):
    """Base of the three kinds of attention; the fields are those of `tqc.ops.attend`."""

    provider: Provider
    scale: float
    softcap: float
    is_causal: bool = False
    counted: bool = True
    return_lse: bool = False

    def attend(
        self,
        query: Tensor,
        k: Storage | PackedTensor,
        v: Storage | PackedTensor,
        key: Tensor | None,
        value: Tensor | None,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
        start: Tensor | None,
    ) -> Any:
        out, lse = self.provider.kernels.attend(
            query, k.pages, k.dense, k.state, v.pages, v.dense, v.state, key, value, attn_mask, sinks, start,
            self.scale, self.softcap, self.is_causal, k.fmt.spec, v.fmt.spec,
        )  # fmt: skip
        return (out, lse) if self.return_lse else out

    def append(
        self, k: Storage, v: Storage, key: Tensor, value: Tensor, start: Tensor | None, score: Tensor | None = None
    ) -> None:
        kernels, k_spec, v_spec = self.provider.kernels, k.fmt.spec, v.fmt.spec
        if score is not None:
            kernels.append(k.pages, k.dense, k.state, key, start, k_spec, score)
            kernels.append(v.pages, v.dense, v.state, value, start, v_spec, score)
        elif self.provider.pairs:
            kernels.append_pair(k.pages, k.dense, k.state, key, v.pages, v.dense, v.state, value, start, k_spec, v_spec)
        else:
            kernels.append(k.pages, k.dense, k.state, key, start, k_spec)
            kernels.append(v.pages, v.dense, v.state, value, start, v_spec)


class AttendExtend(Attention):
    """Attend to a growing cache and the new tokens, then append these: (output, keys, values)."""

    OPERANDS = ("query", "key", "value", "k_cache", "v_cache", "attn_mask", "sinks")

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k_cache: PackedTensor,
        v_cache: PackedTensor,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
    ) -> tuple[Any, PackedTensor, PackedTensor]:
        count, end = key.shape[2], k_cache.end + key.shape[2]
        k, v = k_cache.room_behind(count), v_cache.room_behind(count)
        k.balance(key, query)
        if k.fmt.groups:
            score, state_rows, stored = None, None, k.length
            if k.packs(count):
                score, state_rows = ops.score(
                    key, value, query, k.fmt.spec, _planes_of(k), _planes_of(v), attn_mask, self.scale
                )
            with Appending((k, v), (count, count)):
                out = self.attend(query, k, v, key, value, attn_mask, sinks, None)
                self.append(k, v, key, value, None, score)
                planes.remember(k.dense, stored, query, state_rows, k.fmt)
            return out, PackedTensor.up_to(k, end), PackedTensor.up_to(v, end)
        with Appending((k, v), (count, count)):
            out = self.attend(query, k, v, key, value, attn_mask, sinks, None)
            self.append(k, v, key, value, None)
        return out, PackedTensor.up_to(k, end), PackedTensor.up_to(v, end)


class AttendWrite(Attention):
    """Attend to a preallocated cache with new tokens at `positions`, and write these into it."""

    OPERANDS = ("query", "key", "value", "k_cache", "v_cache", "positions", "attn_mask", "sinks")

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k_cache: PackedTensor,
        v_cache: PackedTensor,
        positions: Tensor | int,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
    ) -> Any:
        start = position(positions, query.device)
        k, v = writable(k_cache), writable(v_cache)
        if _on_host(start) or not self.counted:
            stored, capacity = k.length - k_cache.begin, k_cache.shape[2]
            if not is_append(start, key.shape[2], self.counted, stored, capacity, attn_mask):
                for cache, new in ((k_cache, key), (v_cache, value)):
                    preallocated.write_anywhere(cache, start, new, self.provider.kernels)
                k, v = k_cache.packed_storage, v_cache.packed_storage
                return self.attend(query, k, v, None, None, attn_mask, sinks, _end(k_cache))
        if k_cache.begin:
            start = start + k_cache.begin
        with Appending((k, v), (None, None)):
            out = self.attend(query, k, v, key, value, attn_mask, sinks, start)
            self.append(k, v, key, value, start)
        return out


@dataclass(frozen=True, eq=False)
class AttendSlide(Attention):
    """Attend to tokens `begin` to `end` of a preallocated cache and to new ones; the last `keep` of all become its own.

    A sliding window, see `tqc.ops.window`."""

    keep: int = field(default=0, kw_only=True)

    OPERANDS = ("query", "key", "value", "k_cache", "v_cache", "begin", "end", "attn_mask", "sinks")

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        k_cache: PackedTensor,
        v_cache: PackedTensor,
        begin: int,
        end: int,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
    ) -> Any:
        count = key.shape[2]
        k, v = (preallocated.window(cache, begin, end, self.keep, count) for cache in (k_cache, v_cache))
        k.balance(key, query)
        with Appending((k, v), (count, count)):
            out = self.attend(query, k, v, key, value, attn_mask, sinks, None)
            self.append(k, v, key, value, None)
        for cache, storage in ((k_cache, k), (v_cache, v)):
            hold(family(cache), storage)
        return out


class Attend(Attention):
    """Attend to a packed cache that stays as it is (cross attention, layers that share a cache), and to new tokens."""

    OPERANDS = ("query", "k_cache", "v_cache", "key", "value", "positions", "attn_mask", "sinks")

    def __call__(
        self,
        query: Tensor,
        k_cache: PackedTensor,
        v_cache: PackedTensor,
        key: Tensor | None,
        value: Tensor | None,
        positions: Tensor | int | None,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
    ) -> Any:
        start = _end(k_cache) if positions is None else position(positions, query.device)
        return self.attend(query, k_cache, v_cache, key, value, attn_mask, sinks, start)


def _end(cache: PackedTensor) -> Tensor | None:
    """Where the tokens of a cache end, if more are stored or fewer: then the rest are zeros."""
    return None if cache.packed_storage.length == cache.end else torch.tensor([cache.end], device=cache.device)


def _on_host(x: Tensor) -> bool:
    """Whether to look at `x` waits for no device."""
    return x.device.type == "cpu"


@dataclass(frozen=True, eq=False)
class Pack(Instruction):
    """Start a packed cache, see `tqc.ops.pack`."""

    provider: Provider
    spec: str

    OPERANDS = ("new", "start", "capacity", "query", "score", "state_rows")

    def __call__(
        self,
        new: Tensor,
        start: Tensor | int | None,
        capacity: int | None,
        query: Tensor | None,
        score: Tensor | None,
        state_rows: Tensor | None,
    ) -> PackedTensor:
        fmt, append = PackedFormat.parse(self.spec), self.provider.kernels.append
        if capacity is None and start is None:
            return packed_tensor.pack(new, fmt, append, query, () if score is None else (score, state_rows))
        batch, heads, count, _ = new.shape
        capacity = count + int(start or 0) if capacity is None else capacity
        result = PackedTensor(Storage.allocate(batch, heads, fmt, new.dtype, new.device, capacity), capacity)
        result.packed_storage.balance(new, query)
        packed_tensor.write_at(result, new, position(0 if start is None else start, new.device), append)
        return result


@dataclass(frozen=True, eq=False)
class Extend(Instruction):
    """Append to a growing cache, see `tqc.ops.extend`."""

    provider: Provider

    OPERANDS = ("cache", "new", "query", "score", "state_rows")

    def __call__(
        self,
        cache: PackedTensor,
        new: Tensor,
        query: Tensor | None,
        score: Tensor | None,
        state_rows: Tensor | None,
    ) -> PackedTensor:
        scored = () if score is None else (score, state_rows)
        return packed_tensor.extend(cache, new, self.provider.kernels.append, query, scored)


@dataclass(frozen=True, eq=False)
class Write(Instruction):
    """Write into a preallocated cache, or into a copy of it, see `tqc.ops.write`."""

    provider: Provider
    counted: bool
    in_place: bool

    OPERANDS = ("cache", "new", "positions", "attn_mask")

    def __call__(
        self, cache: PackedTensor, new: Tensor, positions: Tensor | int, attn_mask: Tensor | None
    ) -> PackedTensor:
        cache = cache if self.in_place else cast(PackedTensor, cache.clone())
        writable(cache)
        start, stored = position(positions, new.device), cache.packed_storage.length - cache.begin
        if is_append(start, new.shape[2], self.counted, stored, cache.shape[2], attn_mask):
            packed_tensor.write_at(cache, new, start + cache.begin, self.provider.kernels.append)
        else:
            preallocated.write_anywhere(cache, start, new, self.provider.kernels)
        return cache


@dataclass(frozen=True, eq=False)
class Read(Instruction):
    """Dense tokens of a packed cache, see `tqc.ops.read`."""

    provider: Provider

    OPERANDS = ("cache",)

    def __call__(self, cache: PackedTensor) -> Tensor:
        return self.provider.kernels.read(cache.pages, cache.dense, cache.state, cache.shape[2], cache.fmt.spec)


@dataclass(frozen=True, eq=False)
class Adopt(Instruction):
    """Turn the caller's own preallocated dense tensors into packed ones, see `tqc.ops.adopt`.

    They stay dense where that would lose something: see `preallocated`.
    """

    provider: Provider
    k_spec: str
    v_spec: str
    counted: bool

    OPERANDS = ("keys", "values", "positions", "count", "attn_mask", "query")

    def __call__(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor | int,
        count: int,
        attn_mask: Tensor | None,
        query: Tensor | None,
    ) -> None:
        start = position(positions, keys.device)
        if not is_append(start, count, self.counted, keys.shape[2], keys.shape[2], attn_mask):
            return
        if preallocated.can_become_packed(keys) and preallocated.can_become_packed(values):
            stored, append = int(start.flatten()[0]) + count, self.provider.kernels.append
            preallocated.become_packed(keys, stored, PackedFormat.parse(self.k_spec), append, query)
            preallocated.become_packed(values, stored, PackedFormat.parse(self.v_spec), append)


@dataclass(frozen=True, eq=False)
class Fork(Instruction):
    """A tensor of its own on the same memory, which is copied once one of them is appended to, see `tqc.ops.fork`."""

    OPERANDS = ("cache",)

    def __call__(self, cache: PackedTensor) -> PackedTensor:
        return PackedTensor(cache.packed_storage, cache.shape[2], cache.begin)


@dataclass(frozen=True, eq=False)
class Become(Instruction):
    """Let a packed tensor of the caller's hold what another one does, see `tqc.ops.update`."""

    OPERANDS = ("cache", "new")

    def __call__(self, cache: PackedTensor, new: PackedTensor) -> None:
        hold(family(cache), new.packed_storage)


@dataclass(frozen=True, eq=False)
class FoldWeights(Instruction):
    """Weights with their folds applied, from memory where they have not changed, see `folded_weights`."""

    folds: tuple[Fold, ...]
    anew: bool

    def __call__(self, *weights: Tensor) -> list[Tensor]:
        return folded_weights(weights, self.folds, self.anew)


@dataclass(frozen=True, eq=False)
class Reference(Instruction):
    """Any op of the dialect by its reference, on the parts of packed tensors: right, but slow for a large cache."""

    op: Op

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _mapped(PackedTensor, _planes, (args, kwargs))
        return _mapped(Planes, as_packed_tensor, self.op(*args, **kwargs))


def _mapped(kind: type, function: Any, tree: Any) -> Any:
    return pytree.tree_map_only(kind, function, tree)


def _planes(x: PackedTensor) -> Planes:
    return Planes(x.pages, x.dense, x.state, x.fmt, x.shape[2])


def _planes_of(storage: Storage) -> Planes:
    return Planes(storage.pages, storage.dense, storage.state, storage.fmt, storage.length)


def as_packed_tensor(planes: Planes) -> PackedTensor:
    """The packed tensor that holds these parts."""
    begin = int(planes.state[2])
    return PackedTensor(Storage(*planes.parts, planes.fmt, *planes.state.tolist()), planes.length, begin)
