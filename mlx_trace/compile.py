"""`compile_mlx`: a model of mlx-lm whose calls run captured programs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tqc.config import Config
from tqc.mlx_trace.caches import leaves
from tqc.mlx_trace.capture import Captured, capture
from tqc.mlx_trace.execute import Executor, Unsupported
from tqc.mlx_trace.graph import CaptureError

log = logging.getLogger(__name__)

# Lengths that programs are made for: a prompt is cut into these, the longest first.
LENGTHS = (512, 64, 8, 1)


class Program:
    """A captured program, callable as its model is."""

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
        arrays = [array for kind, cache in zip(self.kinds, held, strict=True) for array in kind.prepare(cache, length)]
        indices = [mx.array(held[at]._idx) for at in self.rounds]
        # A compiled function keeps the stream that it was traced on, which belongs to a thread.
        place = (threading.get_ident(), str(mx.default_stream(mx.default_device())))
        if place not in self.compiled:
            self.compiled[place] = mx.compile(self.executor)
        logits, *made = self.compiled[place](tokens.astype(mx.int32), mx.array(offset), *indices, *arrays)
        given = iter(made)
        for kind, cache in zip(self.kinds, held, strict=True):
            kind.store(cache, [next(given) for _ in range(kind.results)], length)
        return logits


def common_offset(caches: list[Any]) -> int:
    """How many tokens the caches have seen.

    Raises:
        CaptureError: if that is not the same number for all of them.
    """
    offsets = {cache.offset for cache in caches if isinstance(getattr(cache, "offset", None), int)}
    if len(offsets) > 1:
        raise CaptureError(f"the caches have seen different numbers of tokens: {sorted(offsets)}")
    return offsets.pop() if offsets else 0


class Programs:
    """The programs of one model, made when a call first needs them."""

    def __init__(self, model: nn.Module, config: Config, strict: bool) -> None:
        self.original: Any = type(model)
        self.config, self.strict = config, strict
        self.programs: dict[Any, Program] = {}
        self.refused: dict[Any, str] = {}

    def __call__(self, model: nn.Module, tokens: mx.array, caches: list[Any]) -> mx.array:
        parts = [self._part(model, part, caches) for part in _cut(tokens)]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)

    def _part(self, model: nn.Module, tokens: mx.array, caches: list[Any]) -> mx.array:
        batch, length = tokens.shape
        key = (batch, length, *((type(cache), _state(cache)) for cache in leaves(caches)))
        if key not in self.programs and key not in self.refused:
            try:
                self.programs[key] = Program(capture(self._plain(model), caches, batch, length))
            except (CaptureError, Unsupported) as error:
                if self.strict:
                    raise
                self.refused[key] = str(error)
                if len(self.refused) == 1:
                    log.warning("%s is not compiled and runs as it is: %s", self.original.__name__, error)
        if key in self.programs:
            return self.programs[key](tokens, caches)
        return self.original.__call__(model, tokens, cache=caches)

    def _plain(self, model: nn.Module) -> nn.Module:
        """The model as it was, of the same parts."""
        plain = self.original.__new__(self.original)
        dict.update(plain, model)
        vars(plain).update(vars(model))
        return plain


def _state(cache: Any) -> Any:
    """What of a cache's state makes another program."""
    if hasattr(cache, "max_size"):
        return cache.max_size, getattr(cache, "keep", None)
    held = getattr(cache, "cache", None)
    return None if held is None else tuple(None if array is None else tuple(array.shape) for array in held)


def _cut(tokens: mx.array) -> Iterator[mx.array]:
    at, length = 0, tokens.shape[1]
    while at < length:
        step = next(size for size in LENGTHS if size <= length - at)
        yield tokens[:, at : at + step]
        at += step


def compile_mlx(model: nn.Module, strict: bool = False, **options: Any) -> nn.Module:
    """Let the calls of one model of mlx-lm run captured programs; nothing else is changed, other models included.

    Args:
        strict: whether a model that cannot be captured is an error; else it runs as it is, with a warning.
        options: the fields of `Config`, as those of the torch backend; only `preset="off"` is there yet.

    Returns:
        The model itself. A call without caches, or with more than tokens and caches, runs as before.

    Raises:
        TypeError, ValueError: for what is no model, and options that do not exist or do not fit.
        CaptureError: where `strict`, at the first call that cannot be captured.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an mlx.nn.Module, got {type(model).__name__}")
    config = Config.from_options(options)
    if not config.off:
        raise ValueError("caches of MLX cannot be compressed yet: give preset='off'")
    decompile_mlx(model)
    programs = Programs(model, config, strict)

    def call(self: Any, inputs: mx.array, cache: Any = None, *args: Any, **kwargs: Any) -> Any:
        if cache is None or args or any(value is not None for value in kwargs.values()) or inputs.ndim != 2:
            return programs.original.__call__(self, inputs, cache, *args, **kwargs)
        return programs(self, inputs, cache)

    names = {"__call__": call, "__module__": programs.original.__module__, "tqc_programs": programs}
    model.__class__ = type(programs.original.__name__, (programs.original,), names)
    return model


def decompile_mlx(model: nn.Module) -> nn.Module:
    """The model as it was before `compile_mlx`; a model that is not compiled stays as it is."""
    programs = getattr(type(model), "tqc_programs", None)
    if programs is not None:
        model.__class__ = programs.original
    return model
