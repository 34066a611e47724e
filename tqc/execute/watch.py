"""Instructions that a monitor looks at: the caches of one layer, its middle one of those that grow and keep all tokens.

    AttendExtend, Pack    ->    WatchedAttention, WatchedPack

They do what they did, in one call from Python: the layer is in no chain. What is kept beside is one head of the first
sequence, as it came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tqc.cache.packed_tensor import PackedTensor
from tqc.cache.watch import ExactRows, Watch
from tqc.execute.instructions import AttendExtend, Instruction, Pack
from tqc.plugins.monitor import Moment, Monitor


@dataclass(frozen=True, eq=False)
class WatchedPack(Instruction):
    """A cache whose first tokens are also kept as they came."""

    inner: Pack
    monitor: Monitor

    OPERANDS = Pack.OPERANDS

    def __call__(self, new: Tensor, *operands: Any) -> PackedTensor:
        result = self.inner(new, *operands)
        if self.monitor.head < new.shape[1]:
            result.packed_storage.watch = ExactRows(new[0, self.monitor.head])
        return result


@dataclass(frozen=True, eq=False)
class WatchedAttention(Instruction):
    """Attention with a look at the last query of one head."""

    inner: AttendExtend
    monitor: Monitor
    layer: int | None

    OPERANDS = AttendExtend.OPERANDS

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
        head = self.monitor.head
        if head >= key.shape[1]:
            raise ValueError(f"head of monitor {self.monitor.name} must be below {key.shape[1]}, got {head}")
        found = self.inner(query, key, value, k_cache, v_cache, attn_mask, sinks)
        watch = self._watch(k_cache.end, found[1], found[2], key, value)
        if watch.looks_now:
            output = found[0][0] if self.inner.return_lse else found[0]
            watch.see(self._moment(query, output, watch.held, key.shape[1], attn_mask, sinks))
        watch.steps += 1
        return found

    def _watch(self, end: int, keys: PackedTensor, values: PackedTensor, *new: Tensor) -> Watch:
        """The watch of `keys` and `values`, which hold the new tokens behind the first `end`."""
        stored = keys.packed_storage
        watch = stored.watch
        held: tuple[Any, ...] = watch.held if isinstance(watch, Watch) else (watch, values.packed_storage.watch)
        if all(isinstance(rows, ExactRows) and rows.length >= end for rows in held):
            for rows, tokens in zip(held, new, strict=True):
                rows.truncate(end)  # tokens at the end may have been dropped
                rows.append(tokens[0, self.monitor.head])
        else:  # a copy, or a cache from elsewhere: from here on, beside its tokens as they are read
            held = tuple(ExactRows(cache.dequantize()[0, self.monitor.head]) for cache in (keys, values))
            watch = None
        if not isinstance(watch, Watch):
            watch = stored.watch = Watch(self.monitor, self.layer, (held[0], held[1]))
        return watch

    def _moment(
        self,
        query: Tensor,
        output: Tensor,
        held: tuple[ExactRows, ExactRows],
        heads: int,
        attn_mask: Tensor | None,
        sinks: Tensor | None,
    ) -> Moment:
        repeats = query.shape[1] // heads
        own = slice(self.monitor.head * repeats, (self.monitor.head + 1) * repeats)
        mask = None
        if attn_mask is not None:
            mask = attn_mask[0][own if attn_mask.shape[1] > 1 else slice(0, 1), -1, : held[0].length]
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
        return Moment(
            query[0, own, -1].float(),
            output[0, own, -1].float(),
            held[0].rows,
            held[1].rows,
            mask,
            None if sinks is None else sinks[own],
            self.inner.scale,
            self.inner.softcap,
        )


def watch(gm: GraphModule, monitor: Monitor, layers: Sequence[int | None]) -> int | None:
    """Let `monitor` look at one layer of a realized graph, in place.

    Args:
        layers: the cache's layer of each attention site.

    Returns:
        The number of its attention site; None if there is nothing to look at.
    """
    sites: dict[int, list[Node]] = {}
    for node in gm.graph.nodes:
        formats = node.meta.get("formats", ())
        if isinstance(node.target, (AttendExtend, Pack)) and all(f.keep is None and not f.folded for f in formats):
            if "layer" in node.meta:
                sites.setdefault(node.meta["layer"], []).append(node)
    if not sites:
        return None
    site = sorted(sites)[len(sites) // 2]
    for node in sites[site]:
        inner = node.target
        packs = isinstance(inner, Pack)
        node.target = WatchedPack(inner, monitor) if packs else WatchedAttention(inner, monitor, layers[site])
    gm.recompile()
    return site
