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

from tqc.diffusion.plan import Schedule
from tqc.diffusion.rows import BRANCHES, probe_row, progress_of, row_of, wanted, weight_of
from tqc.diffusion.state import Branch, Generation, Scope
from tqc.diffusion.variants import FULL, Action, Call, Variant
from tqc.passes.rewrites.step_state import ATTENTION, BLOCK, WINDOW
from tqc.torch_private import compiled_call, get_compiled, set_compiled

log = logging.getLogger(__name__)
BATCH = "cond_uncond"  # as diffusers calls a batch of both branches
WHATS = (ATTENTION, WINDOW, BLOCK)


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
        self._said: set[str] = set()

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
        made = self._generation(scope)
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
            name = self._advance(generation, bound)
            call = Call(generation, name, self._other(generation, name))
            probe = self._probe(call)
            if probe is not None:
                before = generation.read_all(name, 0, BLOCK)
                result = self._run(call, probe, args, kwargs, trims=False)
                generation.note_change(name, before, weight_of(generation) if self.schedule.scorer else 1.0)
            if len(generation.called) == 1:
                progress = progress_of(generation, generation.branch(name), self.schedule)
                generation.cells = self.schedule.row(progress)
                if probe is not None and any(cell.step != FULL for cell in generation.cells):
                    return result
            halves = self._halves(generation)
            row = row_of(call, self.schedule, generation.cells, halves, probe is not None)
            result = self._run(call, row, args, kwargs)
            if any(action.keep for action in row):
                generation.settle(name)
            return result
        except BaseException:
            generation.clear()
            raise

    def _run(self, call: Call, row: tuple[Action, ...], args: Any, kwargs: Any, trims: bool = True) -> Any:
        generation, name, other = call
        branch = generation.branch(name)
        for layer, action in enumerate(row):
            for what in () if generation.measures else action.keep:  # to make room
                branch.trim(layer, what, wanted(self.schedule, generation, layer).get(what, 1) - 1)
        variant, compiled = self._variant(row)
        self.running.call = call
        try:
            result = compiled(*args, **kwargs)
        finally:
            self.running.call = None
        self._say_notes(variant)
        generation.lent = {layer for layer, action in enumerate(row) if action.lend}
        for layer in range(len(row)) if trims else ():  # the change of what a probe kept is to be read first
            if layer not in generation.lent:
                self._trim(generation, branch, layer)
            if other is not None:
                self._trim(generation, generation.branch(other), layer)
        return result

    def _trim(self, generation: Generation, branch: Branch, layer: int) -> None:
        """Forget the states that no later step reads."""
        counts = wanted(self.schedule, generation, layer)
        for what in WHATS:
            branch.trim(layer, what, counts.get(what, 0))

    def _probe(self, call: Call) -> tuple[Action, ...] | None:
        generation, name, _ = call
        strategy = self.schedule.strategy
        if strategy is None or not strategy.probes or len(generation.called) > 1:
            return None
        return probe_row(self.schedule, generation, generation.branch(name))

    def _halves(self, generation: Generation) -> bool:
        """Whether the batch is of both branches of the guidance."""
        name = getattr(self.running, "name", None)
        batch = generation.like[0][0] if generation.like else 1  # type: ignore[index]
        guided = name is None and generation.scope is not None and generation.scope.guided()
        return (name == BATCH or guided) and batch % 2 == 0

    def _say_notes(self, variant: Variant) -> None:
        for note in variant.notes:
            self._say(note, "%s: %s", note)

    def _generations(self) -> list[Generation]:
        if not hasattr(self.running, "generations"):
            self.running.generations = [self._generation()]
        return self.running.generations

    def _generation(self, scope: Scope | None = None) -> Generation:
        strategy = self.schedule.strategy
        return Generation(scope, self.bits, strategy is not None and strategy.measures)

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
            rose = generation.timestep is not None and like == generation.like
            generation.rises = generation.rises + 1 if rose and generation.step == 0 else 0
            if generation.rises == 2:
                self._say("rise", "timesteps of %s rise, and what is shared goes by falling ones: nothing is shared")
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
                if name is None:
                    self._say(
                        "twice",
                        "%s was called twice with timestep %s, so nothing is shared between steps: name the calls of "
                        'the two guidance branches, `with transformer.cache_context("cond"):`',
                        timestep,
                    )
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

    def _next(self, generation: Generation) -> None:
        for missed in set(generation.branches) - set(generation.called):
            del generation.branches[missed]
        generation.step += 1
        generation.called, generation.lent = [], set()
        steps = self.schedule.steps
        if steps is not None and generation.step >= steps:
            raise ValueError(f"the plan has {steps} steps, and this is call {generation.step + 1} of the generation")

    def _say(self, key: str, message: str, *values: object) -> None:
        if key not in self._said:
            self._said.add(key)
            log.warning(message, type(self.transformer).__name__, *values)

    @staticmethod
    def _other(generation: Generation, branch: str) -> str | None:
        """The branch before this one in this step, if the two are those of the guidance."""
        earlier = [name for name in generation.called[:-1] if name in BRANCHES and name != branch]
        return earlier[0] if earlier and branch in BRANCHES else None

    def _variant(self, row: tuple[Action, ...]) -> tuple[Variant, Callable[..., Any]]:
        with self._compiling:
            if row not in self.variants:
                variant = Variant(row, self.blocks, self.options, self.running, self.schedule.window)
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
