"""Which packed tensors are views of each other, as slices of one dense tensor are, and what a write must do then."""

from __future__ import annotations

import weakref
from typing import Any, TypeAlias

from tqc.cache.storage import Storage

PackedTensor: TypeAlias = Any  # of `tqc.cache.packed_tensor`, which imports this file


class Views:
    """Packed tensors that share the memory of one dense tensor in the user's eyes: a write into one shows in all."""

    __slots__ = ("_members",)

    def __init__(self) -> None:
        self._members: list[weakref.ref[PackedTensor]] = []

    def add(self, tensor: PackedTensor) -> None:
        self._members = [ref for ref in self._members if ref() is not None]
        self._members.append(weakref.ref(tensor))

    def alive(self) -> list[PackedTensor]:
        return [tensor for ref in self._members if (tensor := ref()) is not None]


def view(of: PackedTensor, made: PackedTensor) -> PackedTensor:
    """`made`, noted as a view of `of`; it may hold a copy, and then neither can be written while both live."""
    if of.views is None:
        of.views = Views()
        of.views.add(of)
    made.views = of.views
    made.views.add(made)
    return made


def family(x: PackedTensor) -> list[PackedTensor]:
    """Those that show what is written into `x`, itself included.

    Raises:
        NotImplementedError: if one of them has a copy instead of the same memory, or is the end of a sliding window.
    """
    members = x.views.alive() if x.views else [x]
    if len(members) == 1:
        x.views = None  # so that the next write need not look
    if any(member.packed_storage is not x.packed_storage or member.begin != x.begin for member in members):
        raise NotImplementedError(
            "a packed tensor is written to while rows or parts that were taken out of it are in use, and they hold "
            "copies: .clone() them, or drop them, before the write"
        )
    return members


def writable(x: PackedTensor) -> Storage:
    """The memory of `x` and its views, where no other tensor reads: longer caches that were made of it read on from
    where they do, and it is these that keep the old memory.

    Raises:
        NotImplementedError: see `family`.
    """
    storage = x.packed_storage
    if x.views is None and storage.has_one_reader:
        return storage
    members = family(x)
    if any(all(reader is not member for member in members) for reader in storage.readers()):
        storage = storage.copy(min(storage.length, max(member.end for member in members)))
        storage.start_at(x.begin)
        hold(members, storage)
    return storage


def hold(members: list[PackedTensor], storage: Storage) -> None:
    """Let all of them read from `storage`."""
    for member in members:
        if member.packed_storage is not storage or member.begin != storage.begin:
            member.packed_storage, member.begin = storage, storage.begin
            storage.note_reader(member, member.end)
