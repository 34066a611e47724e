"""Find a sliding window in a preallocated tensor, as transformers' StaticSlidingWindowLayer keeps it.

    full = cat([cache[:, :, 1:], new], -2); cache.copy_(full[:, :, -length:]); attention reads full
    rolled = cache.roll(-1, -2); rolled[:, :, -1:] = new; cache.copy_(rolled);  attention reads cache

Both put new tokens behind the last ones of the cache, and keep as many of all as there is room for.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tqc.ops import TENSORS, example
from tqc.passes.finders.cache_write import FULL, CacheWrite, along_length
from tqc.passes.graph import argument, calls, writers


def find_window(read: Node) -> CacheWrite | None:
    """The window whose last tokens and new ones attention reads together, or new ones alone where they fill it."""
    for kept in read.users:
        last = along_length(kept)
        if last is None or not isinstance(last.start, int) or last.start >= 0 or last.stop is not None:
            continue
        for operation in kept.users:
            cache = operation.args[0] if calls(operation, "copy_") else None
            if isinstance(cache, Node) and cache is not kept and _is_whole(cache, operation, -last.start):
                return _window(read, cache, operation, -last.start)
    return None


def _window(read: Node, cache: Node, operation: Node, keep: int) -> CacheWrite | None:
    if not calls(read, torch.cat, torch.concat):
        return CacheWrite("slide", cache, cache, read, operation, keep=keep) if _alike(cache, read) else None
    tensors, dim = argument(read, 0, "tensors"), argument(read, 1, "dim", 0)
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2 or dim not in (2, -2):
        return None
    past, new = tensors
    part = along_length(past) or slice(0, None)
    if past is not cache and (not past.args or past.args[0] is not cache):
        return None
    begin = 0 if part.start is None else part.start
    end = keep if part.stop is None else part.stop
    if not all(0 <= example(place) <= keep for place in (begin, end)) or not _alike(cache, new):
        return None
    return CacheWrite("slide", read, cache, new, operation, begin=begin, end=end, keep=keep)


def find_roll(cache: Node, operation: Node) -> CacheWrite | None:
    """The window that `operation` copies back after it was rolled and new tokens were written to its end."""
    rolled, keep = argument(operation, 1, "src"), int(example(cache).shape[2])
    if not calls(rolled, "roll", torch.roll) or rolled.args[0] is not cache:
        return None
    shift, dim = argument(rolled, 1, "shifts"), argument(rolled, 2, "dims")
    stores = writers(rolled)
    if dim not in (2, -2, (2,), (-2,)) or len(stores) != 1 or not calls(stores[0], operator.setitem):
        return None
    target, index, new = stores[0].args
    along = target is rolled and isinstance(index, tuple) and len(index) in (3, 4)
    if not along or any(part != FULL for part in (*index[:2], *index[3:])) or not _alike(cache, new):
        return None
    count = example(new).shape[2]
    shift = shift[0] if isinstance(shift, (list, tuple)) else shift
    if not isinstance(shift, int) or not statically_known_true(count == -shift) or not _are_last(index[2], -shift):
        return None
    return CacheWrite("slide", cache, cache, new, operation, begin=-shift, end=keep, keep=keep)


def _are_last(index: Any, count: int) -> bool:
    """Whether an index is that of the last `count` tokens."""
    if isinstance(index, slice):
        return index.start == -count and index.stop is None and index.step in (None, 1)
    return calls(index, torch.tensor) and index.args[0] == list(range(-count, 0))


def _is_whole(cache: Node, operation: Node, length: int) -> bool:
    """Whether `operation` alone writes `cache`, a preallocated tensor of `length` tokens."""
    made = cache.op == "placeholder" or calls(cache, torch.zeros, "new_zeros", torch.zeros_like)
    held = example(cache)
    return made and isinstance(held, TENSORS) and held.shape[2] == length and writers(cache) == [operation]


def _alike(cache: Node, new: Any) -> bool:
    if not isinstance(new, Node) or not isinstance(example(new), torch.Tensor) or example(new).dim() != 4:
        return False
    a, b = example(cache), example(new)
    same = a.dtype == b.dtype and len(a.shape) == 4
    return same and all(statically_known_true(a.shape[dim] == b.shape[dim]) for dim in (0, 1, 3))
