"""What is called in a transformer's place: by the timestep it knows the step, and picks the variant for it."""

from __future__ import annotations

import contextlib
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tqc.diffusion.plan import OTHER as OTHER_BRANCH
from tqc.diffusion.plan import SHARED, Cell, Schedule
from tqc.diffusion.state import Generation, Scope
from tqc.diffusion.variants import FULL, HALF, OTHER, OWN, Action, Call, Variant
from tqc.torch_private import compiled_call, get_compiled, set_compiled

log = logging.getLogger(__name__)
# What diffusers' pipelines call the branches of classifier-free guidance in `cache_context`.
BRANCHES = ("cond", "uncond")
BATCH = "cond_uncond"


class Dispatcher:
    """Calls of one transformer, by a schedule.

    A generation begins where the timestep jumps up, or the shape of the input changes; a lower timestep is the next
    step. The same timestep is the other guidance branch, if `cache_context` gives it another name; else it is a
    generation of its own, or within a pipeline's call the next step.

    Attributes:
        variants: by row, those that were compiled.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        schedule: Schedule,
        blocks: list[str],
        bits: int | None,
        options: Mapping[str, Any],
        dynamic: bool | None = None,
    ) -> None:
        self.transformer, self.schedule, self.blocks = transformer, schedule, blocks
        self.bits, self.options, self.dynamic = bits, dict(options), dynamic
        self.signature = inspect.signature(transformer.forward)
        self.variants: dict[tuple[Action, ...], tuple[Variant, Callable[..., Any]]] = {}
        self.running = threading.local()  # `generations`, `name` and `call` of each thread
        self._compiling = threading.Lock()
        self._warned = False

    def install(self) -> None:
        """Let the transformer's calls come here, in place of whatever compiled them before."""
        set_compiled(self.transformer, self)
        context = getattr(type(self.transformer), "cache_context", None)
        if context is not None:
            self.transformer.__dict__["cache_context"] = self._named(context)

    def remove(self) -> None:
        """Calls run uncompiled again."""
        set_compiled(self.transformer, None)
        self.transformer.__dict__.pop("cache_context", None)

    @contextlib.contextmanager
    def generation(self, scope: Scope) -> Iterator[Generation]:
        """Calls of this thread belong to a generation of their own meanwhile, whose state goes with it."""
        made = Generation(scope, self.bits)
        stack = self._generations()
        stack.append(made)
        try:
            yield made
        finally:
            made.clear()
            stack.remove(made)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generation = self._generations()[-1]
        try:
            bound = self.signature.bind(*args, **kwargs).arguments
            branch = self._advance(generation, bound)
            cells = self._cells(generation.step)
            other = self._other(generation, branch)
            row = self._row(generation, branch, cells, other, bound)
            for layer, action in enumerate(row):
                if action.step == FULL:
                    generation.drop(branch, {layer})
            _, compiled = self._variant(row)
            self.running.call = Call(generation, branch, other)
            result = compiled(*args, **kwargs)
        except BaseException:
            generation.clear()
            raise
        finally:
            self.running.call = None
        generation.filled[branch] = {layer for layer, action in enumerate(row) if action.keep}
        done = {layer for layer, action in enumerate(row) if not (action.keep or action.lend)}
        generation.drop(branch, done)
        if other is not None:
            generation.drop(other, set(range(len(row))) - generation.filled[other])
        return result

    def _generations(self) -> list[Generation]:
        if not hasattr(self.running, "generations"):
            self.running.generations = [Generation(bits=self.bits)]
        return self.running.generations

    def _named(self, context: Callable[..., Any]) -> Callable[..., Any]:
        @contextlib.contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
            outer = getattr(self.running, "name", None)
            self.running.name = name
            try:
                with context(self.transformer, name, *args, **kwargs):
                    yield
            finally:
                self.running.name = outer

        return cache_context

    def _advance(self, generation: Generation, bound: Mapping[str, Any]) -> str:
        """Which branch of the guidance this call is; the generation knows its step behind this."""
        timestep = _timestep(bound)
        sample = next((x for x in bound.values() if isinstance(x, Tensor)), None)
        like = None if sample is None else (sample.shape, sample.dtype, sample.device)
        name = getattr(self.running, "name", None)
        if generation.timestep is None or timestep > generation.timestep or like != generation.like:
            self._begin(generation)
        elif timestep < generation.timestep:
            self._next(generation)
        elif name is None and generation.scope and not _repeats(generation.scope):
            name = f"call {len(generation.called)}"
        elif name is None or name in generation.called:
            if generation.scope:
                self._next(generation)
            else:
                self._begin(generation)
                self._warn(name, timestep)
        branch = name or "call 0"
        generation.timestep, generation.like = timestep, like
        generation.called.append(branch)
        return branch

    def _begin(self, generation: Generation) -> None:
        generation.clear()
        generation.step = 0
        timesteps = generation.scope.timesteps() if generation.scope else None
        steps = self.schedule.steps
        if steps is not None and timesteps is not None and len(timesteps) != steps:
            raise ValueError(f"the plan has {steps} steps, and the scheduler is set to {len(timesteps)}")

    @staticmethod
    def _next(generation: Generation) -> None:
        for branch in set(generation.filled) - set(generation.called):  # which missed a step
            generation.filled.pop(branch)
            generation.held.pop(branch, None)
        generation.step += 1
        generation.called = []

    def _warn(self, name: str | None, timestep: float) -> None:
        if name is None and not self._warned:
            self._warned = True
            log.warning(
                "%s was called twice with timestep %s, so nothing is shared between steps: name the calls of the two "
                'guidance branches, `with transformer.cache_context("cond"):`',
                type(self.transformer).__name__,
                timestep,
            )

    def _cells(self, step: int) -> tuple[Cell, ...]:
        steps = self.schedule.steps
        if steps is not None and step >= steps:
            raise ValueError(f"the plan has {steps} steps, and this is call {step + 1} of the generation")
        return self.schedule.row(step)

    @staticmethod
    def _other(generation: Generation, branch: str) -> str | None:
        """The branch before this one in this step, if the two are those of the guidance."""
        earlier = [name for name in generation.called[:-1] if name in BRANCHES and name != branch]
        return earlier[0] if earlier and branch in BRANCHES else None

    def _row(
        self,
        generation: Generation,
        branch: str,
        cells: tuple[Cell, ...],
        other: str | None,
        bound: Mapping[str, Any],
    ) -> tuple[Action, ...]:
        last = generation.step + 1 == self.schedule.steps
        following = (Cell(),) * len(cells) if last else self.schedule.row(generation.step + 1)
        filled = generation.filled.get(branch, set())
        name = getattr(self.running, "name", None)
        halves = name == BATCH or (name is None and generation.scope is not None and generation.scope.guided())
        batch = generation.like[0][0] if generation.like else 0  # type: ignore[index]
        row = []
        for layer, (cell, after) in enumerate(zip(cells, following, strict=True)):
            guidance, lend = FULL, False
            if cell.guidance == OTHER_BRANCH:
                if other is not None:
                    guidance = OTHER
                elif branch in BRANCHES:
                    lend = True
                elif halves and batch % 2 == 0 and cell.step != SHARED:
                    guidance = HALF
            step = OWN if cell.step == SHARED and layer in filled else FULL
            row.append(Action(step, guidance, after.step == SHARED, lend))
        return tuple(row)

    def _variant(self, row: tuple[Action, ...]) -> tuple[Variant, Callable[..., Any]]:
        with self._compiling:
            if row not in self.variants:
                variant = Variant(row, self.blocks, self.options, self.running)
                context: Any = torch.compile(self.transformer, backend=variant, dynamic=self.dynamic)
                self.variants[row] = variant, compiled_call(context.dynamo_ctx, self.transformer)
            return self.variants[row]


def dispatcher_of(transformer: Any) -> Dispatcher | None:
    """The dispatcher that a transformer's calls go through, if they do."""
    call = get_compiled(transformer) if isinstance(transformer, torch.nn.Module) else None
    return call if isinstance(call, Dispatcher) else None


def _repeats(scope: Scope) -> bool:
    """Whether the scheduler has steps of equal timestep, as those of second order do."""
    timesteps = scope.timesteps()
    return timesteps is not None and len(timesteps.unique()) < len(timesteps)


def _timestep(bound: Mapping[str, Any]) -> float:
    timestep = bound.get("timestep")
    if isinstance(timestep, Tensor) and timestep.numel():
        return float(timestep.max())
    if isinstance(timestep, (int, float)):
        return float(timestep)
    raise ValueError(f"the transformer must be called with a timestep, a tensor or a number; got {timestep!r}")
