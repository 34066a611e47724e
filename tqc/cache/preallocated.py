"""Caches that the caller allocated at full length and that are written in place (StaticCache, hand-written ones).

Such a cache must become packed without the caller's help: the caller's tensor object itself is turned into a packed
tensor of the same shape. Positions behind the stored tokens count as zeros; so a write that goes back drops what lies
behind it, unless attention still looks there.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from tqc.cache.packed_tensor import PackedTensor, rewrite
from tqc.cache.storage import Append, Storage
from tqc.cache.views import writable
from tqc.format import PackedFormat
from tqc.format.quantizer import unfold
from tqc.torch_private import is_view, swap_tensors

log = logging.getLogger(__name__)


def write_anywhere(cache: PackedTensor, positions: Tensor, new: Tensor, kernels: Any) -> None:
    """Write `new`, as the format holds it, anywhere, slowly; one position is that of the first of new tokens."""
    log.warning(
        "a packed cache is written out of order (a ring buffer?): it is packed anew at each such call; "
        "options={'skip_layers': ...} leaves it dense"
    )
    if len(positions) == 1:
        positions = positions + torch.arange(new.shape[2], device=positions.device)
    stored = max(cache.packed_storage.length - cache.begin, int(positions.max()) + 1)
    rewrite(cache, lambda dense: dense.index_copy_(2, positions, unfold(new, cache.fmt)), stored, kernels)


def window(cache: PackedTensor, begin: int, end: int, keep: int, count: int) -> Storage:
    """Memory with room for `count` tokens behind those from `begin` to `end` of `cache`, which keeps the last `keep`:
    its own, where no other tensor reads there.

    Until `hold` gives it to `cache` that reads what it did."""
    storage = writable(cache)
    storage.keep_last(keep)
    return storage.room_behind(cache.begin + begin, cache.begin + end, count)


def can_become_packed(tensor: Tensor) -> bool:
    """Whether nobody else can hold the memory of `tensor`, as far as that shows."""
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return type(tensor) is Tensor and not is_view(tensor) and whole and not tensor.requires_grad


def become_packed(tensor: Tensor, stored: int, fmt: PackedFormat, append: Append, query: Tensor | None = None) -> None:
    """Turn a dense tensor object into a `PackedTensor` of the same shape that holds its first `stored` tokens.

    `query` is as in `tqc.ops.pack`."""
    storage = Storage.holding(tensor[:, :, :stored], fmt, tensor.shape[2], append, query)
    packed = PackedTensor(storage, tensor.shape[2])
    try:
        swap_tensors(tensor, packed)
    except RuntimeError as error:
        log.warning("a preallocated cache stays dense, its tensor is in use elsewhere: %s", error)
        return
    tensor.packed_storage.note_reader(tensor, tensor.shape[2])  # type: ignore[attr-defined]
