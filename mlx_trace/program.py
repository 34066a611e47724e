"""A captured program as a function of tokens and mlx-lm's caches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from tqc.format import PackedFormat
from tqc.mlx_trace.caches import leaves
from tqc.mlx_trace.capture import Captured
from tqc.mlx_trace.execute import Executor
from tqc.mlx_trace.graph import CaptureError
from tqc.mlx_trace.packed import Call, Packed, Step, settle


class Program:
    """A captured program, callable as its model is.

    Args:
        captured: its graph as it was captured, or rewritten and realized.
    """

    def __init__(self, captured: Captured) -> None:
        self.kinds = captured.kinds
        self.executor = Executor(captured.gm, captured.weights)
        self.compiled: dict[Any, Any] = {}
        signatures = [kind.signature for kind in self.kinds]
        self.rounds = [
            at for at, kind in enumerate(self.kinds) if kind.goes_round and kind.signature not in signatures[:at]
        ]

    def __call__(self, tokens: mx.array, caches: list[Any]) -> mx.array:
        """Logits of tokens [batch, length] behind those in the caches, which get the new ones."""
        held, length = list(leaves(caches)), tokens.shape[1]
        offset = common_offset(held)
        prepared = [kind.prepare(cache, length) for kind, cache in zip(self.kinds, held, strict=True)]
        layout = Layout()
        for parts, cache in zip(prepared, held, strict=True):
            layout.add(parts, cache, length)
        inputs = [tokens.astype(mx.int32), offset, *(mx.array(held[at]._idx) for at in self.rounds)]
        arrays = [array for parts in prepared for part in parts for array in _arrays_of(part)]
        logits, *made = self._compiled(layout)(inputs, [step.arrays for step in layout.steps], arrays)
        results = iter(made)
        for kind, cache, parts in zip(self.kinds, held, prepared, strict=True):
            if any(isinstance(part, Packed) for part in parts):
                kind.store(cache, [_became(part, cache.call(length), results) for part in parts], length)
            else:
                kind.store(cache, [next(results) for _ in range(kind.results)], length)
        return logits

    def _compiled(self, layout: Layout) -> Any:
        # A compiled function keeps the stream that it was traced on, which belongs to a thread.
        key = (threading.get_ident(), str(mx.default_stream(mx.default_device())), layout.key)
        if key not in self.compiled:
            parts, flags = list(layout.parts), [call.flags for call in layout.calls]

            def run(inputs: list[mx.array], steps: list[list[mx.array]], arrays: list[mx.array]) -> list[mx.array]:
                given = [Step(*flag, *step) for flag, step in zip(flags, steps, strict=True)]
                logits, *made = self.executor(*inputs, *operands(parts, given, iter(arrays)))
                return [logits, *(array for part in made for array in _made_by(part))]

            self.compiled[key] = mx.compile(run)
        return self.compiled[key]


@dataclass
class Layout:
    """What the flat arrays of a call are.

    Attributes:
        parts: for each operand, None for an array, or the format of a packed one and the number of its step.
        calls, steps: shared by caches whose tokens lie alike.
    """

    parts: list[tuple[PackedFormat, int] | None] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    _known: dict[Any, int] = field(default_factory=dict)

    @property
    def key(self) -> Any:
        """What a program is compiled for, beside the shapes."""
        return tuple(self.parts), tuple(call.flags for call in self.calls)

    def add(self, prepared: list[Any], cache: Any, length: int) -> None:
        packed = [part for part in prepared if isinstance(part, Packed)]
        if not packed:
            self.parts += [None] * len(prepared)
            return
        call, pages = cache.call(length), packed[0].num_pages
        if (call, pages) not in self._known:
            self._known[call, pages] = len(self.calls)
            self.calls.append(call)
            self.steps.append(call.step(pages))
        self.parts += [(part.fmt, self._known[call, pages]) for part in packed]


def operands(
    parts: list[tuple[PackedFormat, int] | None], steps: list[Step], arrays: Iterator[mx.array]
) -> Iterator[Any]:
    """What a graph takes, of flat arrays."""
    for part in parts:
        if part is None:
            yield next(arrays)
        else:
            fmt, step = part
            yield Packed(fmt, next(arrays), next(arrays), steps[step])


def _became(part: Packed, call: Call, made: Iterator[mx.array]) -> Packed:
    """A packed operand of the caller's, once a program has run."""
    packs = any(len(placement.packs(count)) for placement, count, _ in call.sequences)
    dense, fresh = next(made), next(made) if packs else None
    opening = (next(made), next(made)) if call.flags[1] and part.fmt.centred else ()
    return settle(replace(part, dense=dense, fresh=fresh, opening=opening), call)


def _arrays_of(part: Any) -> list[mx.array]:
    return [part.pages, part.dense] if isinstance(part, Packed) else [part]


def _made_by(part: Any) -> list[mx.array]:
    if not isinstance(part, Packed):
        return [part]
    return [part.dense, *([] if part.fresh is None else [part.fresh]), *part.opening]


def common_offset(caches: list[Any]) -> mx.array:
    """How many tokens the caches have seen, one number or one a sequence.

    Raises:
        CaptureError: if that is not the same for all of them.
    """
    held = [cache.offset for cache in caches if hasattr(cache, "offset")]
    offsets = {tuple(offset.tolist()) if isinstance(offset, mx.array) else offset for offset in held}
    if len(offsets) > 1:
        raise CaptureError(f"the caches have seen different numbers of tokens: {sorted(offsets, key=str)}")
    return mx.array(offsets.pop() if offsets else 0, mx.int32)
