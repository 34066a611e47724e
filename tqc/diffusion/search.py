"""The search for a plan: step by step along a generation, the cheapest that each layer can do within an error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from tqc.diffusion.dispatcher import Dispatcher
from tqc.diffusion.flops import count_flops
from tqc.diffusion.plan import OTHER, Cell, Schedule
from tqc.diffusion.rows import BRANCHES, row_of, weight_of
from tqc.diffusion.state import ORDERS
from tqc.diffusion.variants import Call, StepGraph, Variant, copy_graph
from tqc.passes.rewrites.step_state import ATTENTION, BLOCK, WINDOW
from tqc.plugins.step_strategy import BY_ORDER, FULL, Progress
from tqc.plugins.step_strategy import WINDOW as NEAR
from tqc.torch_private import compiled_call

# Rewritten graphs that are held; most rows are tried once.
HELD_GRAPHS = 64
# What a layer may do, the cheapest first; of each group the one that misses least is tried.
GROUPS = (BY_ORDER[True], BY_ORDER[False], (NEAR,))


class _Everything(Schedule):
    """Keeps all states that any plan could read."""

    def row(self, progress: Progress) -> tuple[Cell, ...]:
        return (Cell(),) * self.layers

    def wanted(self, step: int, layer: int) -> Mapping[str, int]:
        return {ATTENTION: ORDERS, BLOCK: ORDERS, WINDOW: 1}


class Search(Dispatcher):
    """Stands for a transformer's call while a pipeline generates, and decides what each layer does in each step.

    In each step the transformer runs in full, then with what is tried: all blocks taken from before, else layer by
    layer. What a trial misses of the full output, relative to it and weighed by the step, must be at most `max_error`;
    the first layers may take their share of it only (DiTFastAttn). The generation goes on with what was chosen, so that
    errors of the steps before count.

    Attributes:
        rows: what was chosen, by step.
        flops: of the chosen calls by step and branch, and of the same in full: "attention" and "total" of each.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        blocks: list[str],
        max_error: float,
        window: float,
        allowed: tuple[str, ...],
        guidance: bool,
        rows: list[tuple[Cell, ...]],
        done: Callable[[int], None],
    ) -> None:
        schedule = _Everything(len(blocks))
        schedule.window = window
        super().__init__(transformer, schedule, blocks, None, {"rest": "eager"})
        self.max_error, self.allowed, self.guidance = max_error, allowed, guidance
        self.rows, self.known, self.done = rows, len(rows), done
        self.spent = {"attention": 0, "total": 0}
        self.full = {"attention": 0, "total": 0}
        self._graphs: list[GraphModule] = []
        self._rewritten: dict[tuple[Any, ...], Any] = {}
        self._compiled = self._capture()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        generation = self._generations()[-1]
        try:
            bound = self.signature.bind(*args, **kwargs).arguments
            name = self._advance(generation, bound)
            call = Call(generation, name, self._other(generation, name))
            step, layers = generation.step, self.schedule.layers
            given = (call, args, kwargs)
            first = len(generation.called) == 1
            if first and step == len(self.rows):
                self.rows.append(self._choose(*given) if step else (Cell(),) * layers)
            elif not first and self.guidance and call.other is not None and step >= self.known:
                self.rows[step] = self._choose_guidance(*given)
            cells = self.rows[step]
            result = self._try(call, cells, args, kwargs, frozen=False)
            for name, count in self._count(call, cells).items():
                self.spent[name] += count
                self.full[name] += self._count(call, (Cell(),) * layers)[name]
            self.done(step)
            return result
        except BaseException:
            generation.clear()
            raise

    def _choose(self, call: Call, args: Any, kwargs: Any) -> tuple[Cell, ...]:
        layers = self.schedule.layers
        weight = weight_of(call.generation)
        expected = _output(self._try(call, (Cell(),) * layers, args, kwargs))

        def error(cells: tuple[Cell, ...]) -> float:
            found = _output(self._try(call, cells, args, kwargs))
            return weight * float((found - expected).norm() / expected.norm().clamp_min(1e-30))

        row = (Cell(),) * layers
        whole = {name: error((Cell(name),) * layers) for name in self._names(GROUPS[0])}
        if whole and min(whole.values()) <= self.max_error:
            return (Cell(min(whole, key=whole.__getitem__)),) * layers
        for layer in range(layers):
            allowed = self.max_error * (layer + 1) / layers
            for group in GROUPS:
                tried = {name: error(_with(row, layer, Cell(name))) for name in self._names(group)}
                best = min(tried, key=tried.__getitem__, default=FULL)
                if tried and tried[best] <= allowed:
                    row = _with(row, layer, Cell(best))
                    break
            else:
                if self.guidance and self._halves(call.generation):
                    row = self._with_guidance(row, layer, error, allowed)
        return row

    def _choose_guidance(self, call: Call, args: Any, kwargs: Any) -> tuple[Cell, ...]:
        """What the second branch takes from the first, where that computed."""
        row, layers = self.rows[call.generation.step], self.schedule.layers
        expected = _output(self._try(call, row, args, kwargs))

        def error(cells: tuple[Cell, ...]) -> float:
            found = _output(self._try(call, cells, args, kwargs))
            return float((found - expected).norm() / expected.norm().clamp_min(1e-30))

        for layer in range(layers):
            if row[layer].step == FULL:
                row = self._with_guidance(row, layer, error, self.max_error * (layer + 1) / layers)
        return row

    @staticmethod
    def _with_guidance(row: tuple[Cell, ...], layer: int, error: Callable[..., float], allowed: float) -> Any:
        tried = _with(row, layer, Cell(FULL, OTHER))
        return tried if error(tried) <= allowed else row

    def _names(self, group: tuple[str, ...]) -> list[str]:
        return [name for name in group if name in self.allowed]

    def _try(self, call: Call, cells: tuple[Cell, ...], args: Any, kwargs: Any, frozen: bool = True) -> Any:
        """What the transformer gives so; the generation's state goes on only if it is not frozen."""
        with self._running(call, cells, frozen):
            return self._compiled(*args, **kwargs)

    @contextmanager
    def _running(self, call: Call, cells: tuple[Cell, ...], frozen: bool) -> Iterator[None]:
        generation = call.generation
        row = row_of(call, self.schedule, cells, self._halves(generation), probed=False)
        lent = generation.lent
        if call.name in BRANCHES and call.other is None:  # the second branch may want any of it
            row = tuple(action._replace(lend=action.source == FULL) for action in row)
            lent = {layer for layer, action in enumerate(row) if action.lend}
        self.running.call, self.running.row = call, row
        generation.frozen = frozen
        try:
            yield
        finally:
            self.running.call, generation.frozen = None, False
        if not frozen:
            generation.settle(call.name)
            generation.lent = lent
            for name in generation.branches:
                for layer in set(range(len(row))) - (lent if name == generation.called[0] else set()):
                    self._trim(generation, generation.branch(name), layer)

    def _capture(self) -> Callable[..., Any]:
        """The transformer's call, traced once for all rows."""

        def backend(gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            self._graphs.append(copy_graph(gm))
            number = len(self._graphs) - 1
            return lambda *inputs: self._graph(number, self.running.row)[0](*inputs)

        context: Any = torch.compile(self.transformer, backend=backend)
        return compiled_call(context.dynamo_ctx, self.transformer)

    def _graph(self, number: int, row: tuple[Any, ...]) -> tuple[Callable[..., Any], dict[str, int]]:
        if (number, row) not in self._rewritten:
            if len(self._rewritten) >= HELD_GRAPHS:
                self._rewritten.clear()
            variant = Variant(row, self.blocks, self.options, self.running, self.schedule.window)
            gm, sharing = variant.rewrite(self._graphs[number])
            runs = StepGraph(gm.forward, sharing, variant) if sharing.inputs or sharing.outputs else gm.forward
            self._rewritten[number, row] = runs, count_flops(gm.graph)
        return self._rewritten[number, row]

    def _count(self, call: Call, cells: tuple[Cell, ...]) -> dict[str, int]:
        with self._running(call, cells, frozen=True):
            found = [self._graph(number, self.running.row)[1] for number in range(len(self._graphs))]
        return {name: sum(counts[name] for counts in found) for name in ("attention", "total")}


def _with(row: tuple[Cell, ...], layer: int, cell: Cell) -> tuple[Cell, ...]:
    return (*row[:layer], cell, *row[layer + 1 :])


def _output(result: Any) -> Tensor:
    found = result[0] if isinstance(result, tuple) else result.sample
    return found.detach().float()


class Notes:
    """What a search has found so far, in a file, so that it goes on where it was stopped."""

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(f"{os.fspath(path)}.search")
        self.settings = json.loads(json.dumps(settings))
        self.passes: list[dict[str, Any]] = []
        self.rows: list[tuple[Cell, ...]] = []
        if self.path is not None and self.path.exists():
            held = json.loads(self.path.read_text("utf-8"))
            if held["settings"] == self.settings:
                self.passes = held["passes"]
                self.rows = [tuple(Cell(*cell) for cell in row) for row in held["rows"]]

    def write(self) -> None:
        if self.path is not None:
            held = {"settings": self.settings, "passes": self.passes, "rows": self.rows}
            part = Path(f"{self.path}.part")
            part.write_text(json.dumps(held), "utf-8")
            os.replace(part, self.path)

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
