"""`compile_mlx`: a model of mlx-lm whose calls run captured programs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from tqc import report
from tqc.config import Config
from tqc.mlx_trace import kernels
from tqc.mlx_trace.caches import leaves
from tqc.mlx_trace.capture import capture
from tqc.mlx_trace.execute import Unsupported
from tqc.mlx_trace.graph import CaptureError
from tqc.mlx_trace.pack import Choice, choose, pack
from tqc.mlx_trace.packed_batch import adopt_batch, is_waiting
from tqc.mlx_trace.program import Program

log = logging.getLogger(__name__)

# Lengths that programs are made for: a prompt is cut into these, the longest first.
LENGTHS = (2048, 256, 32, 4, 1)


class Programs:
    """The programs of one model, made when a call first needs them.

    Attributes:
        choice: which caches are packed; None before the first call.
    """

    def __init__(self, model: nn.Module, config: Config, strict: bool) -> None:
        self.original: Any = type(model)
        self.config, self.strict = config, strict
        self.choice = Choice() if config.off else None
        self.programs: dict[Any, Program] = {}
        self.refused: dict[Any, str] = {}

    def __call__(self, model: nn.Module, tokens: mx.array, caches: list[Any]) -> mx.array:
        if any(map(is_waiting, leaves(caches))):
            # Such a batch does not say where its padding begins: it is packed once it is gone.
            return self.original.__call__(model, tokens, cache=caches)
        parts = [self._part(model, part, caches) for part in _cut(tokens)]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)

    def _part(self, model: nn.Module, tokens: mx.array, caches: list[Any]) -> mx.array:
        if len(caches) != len(model.layers):
            raise ValueError(f"cache must have one entry a layer: got {len(caches)} caches for a model that has "
                             f"{len(model.layers)} layers")  # fmt: skip
        batch, length = tokens.shape
        key = (batch, length, *map(_state, leaves(caches)))
        if key not in self.programs and key not in self.refused:
            try:
                self.programs[key] = self._made(plain_model(model), caches, batch, length)
            except (CaptureError, Unsupported) as error:
                if self.strict:
                    raise
                self.refused[key] = str(error)
                if len(self.refused) == 1:
                    log.warning("%s is not compiled and runs as it is: %s", self.original.__name__, error)
        if key in self.refused:
            return self.original.__call__(model, tokens, cache=caches)
        if self.choice and self.choice.formats:
            for at, cache in enumerate(leaves(caches)):
                if at in self.choice.formats:
                    adopt_batch(cache, self.choice.formats[at])
        return self.programs[key](tokens, caches)

    def _made(self, model: nn.Module, caches: list[Any], batch: int, length: int) -> Program:
        if self.choice is None:
            # On caches of its own, for those that are given may be of another model.
            self.choice = choose(model, caches, batch, length, self.config)
        captured = capture(model, caches, batch, length, self.choice.formats)
        if not self.config.off:
            plan = pack(captured, self.choice, self.config, report.wants_texts())
            report.record(plan)
            report.warn_if_dense(plan)
        return Program(captured)


def plain_model(model: nn.Module) -> nn.Module:
    """The model as it was before it was compiled, of the same parts; itself if it was not."""
    programs = getattr(type(model), "tqc_programs", None)
    return model if programs is None else copied(model, programs.original)


def copied(model: nn.Module, cls: Any = None) -> nn.Module:
    """A model of the same parts, of its own class or another."""
    cls = cls or type(model)
    copy = cls.__new__(cls)
    dict.update(copy, model)
    vars(copy).update(vars(model))
    return copy


def _state(cache: Any) -> Any:
    """What of a cache, packed or not, makes another program."""
    if hasattr(cache, "max_size"):
        return type(cache).__name__, cache.max_size, getattr(cache, "keep", None)
    held = getattr(cache, "cache", None) or []
    return type(cache).__name__, tuple(None if array is None else tuple(array.shape) for array in held)


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
        options: the fields of `Config`, as those of the torch backend; what is torch's own (`rest`, `cuda_graphs`,
            `fold_values`, a provider of torch's) is an error.

    Returns:
        The model itself. A call without caches, or with more than tokens and caches, runs as before.

    Raises:
        TypeError, ValueError: for what is no model, and options that do not exist or do not fit.
        CaptureError: where `strict`, at the first call that cannot be captured.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an mlx.nn.Module, got {type(model).__name__}")
    config = Config.from_options(options)
    _check(config)
    decompile_mlx(model)
    programs = Programs(model, config, strict)

    def call(self: Any, inputs: mx.array, cache: Any = None, *args: Any, **kwargs: Any) -> Any:
        if cache is None or args or any(value is not None for value in kwargs.values()) or inputs.ndim != 2:
            return programs.original.__call__(self, inputs, cache, *args, **kwargs)
        return programs(self, inputs, cache)

    names = {"__call__": call, "__module__": programs.original.__module__, "tqc_programs": programs}
    model.__class__ = type(programs.original.__name__, (programs.original,), names)
    return model


def _check(config: Config) -> None:
    """Raises ValueError for an option that means nothing here."""
    if config.provider not in (allowed := ("auto", kernels.provider())):
        raise ValueError(
            f"provider must be {' or '.join(allowed)}, what MLX's default device runs; got {config.provider!r}"
        )
    for name in ("fold_values", "cuda_graphs", "strategy", "monitor"):
        if value := getattr(config, name):
            raise ValueError(f"{name} is an option of the torch backend alone; got {value!r}")


def decompile_mlx(model: nn.Module) -> nn.Module:
    """The model as it was before `compile_mlx`; a model that is not compiled stays as it is."""
    programs = getattr(type(model), "tqc_programs", None)
    if programs is not None:
        model.__class__ = programs.original
    return model
