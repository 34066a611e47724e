"""What is computed and what is shared: for each denoising step and layer, by a plan or by a strategy."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from tqc.passes.rewrites.step_state import ATTENTION, BLOCK, WINDOW
from tqc.plugins import make, step_strategy
from tqc.plugins.plugin import nearest
from tqc.plugins.snr import Snr
from tqc.plugins.step_strategy import BY_ORDER, CELLS, FULL, Progress, StepStrategy

OWN, OTHER = "own", "other"
PLAN_VERSION = 1
# By cell, what its states are of, and of how many steps less one.
SOURCES: dict[str, tuple[str, int]] = {
    FULL: (FULL, 0),
    step_strategy.WINDOW: (WINDOW, 0),
    **{
        name: (BLOCK if blocks else ATTENTION, order)
        for blocks, names in BY_ORDER.items()
        for order, name in enumerate(names)
    },
}


class Cell(NamedTuple):
    """One layer in one step.

    Attributes:
        step: "full" for what is computed; "shared", "linear" or "quadratic" for attention as it was in the last
            computed step, or as a forecast from the last two or three says; "block", "block_linear" or
            "block_quadratic" for the same of all that the block adds to its input; "window" for attention to near
            tokens and what that lacked.
        guidance: "own", or "other" where one branch of the guidance takes what the other one computes in this step.
    """

    step: str = FULL
    guidance: str = OWN


@dataclass(frozen=True)
class Plan:
    """A table of cells, by step and layer. A layer is a block of the transformer, in the order of its module lists.

    Attributes:
        model: class of the transformer that it was made for.
        rows: a tuple of cells, one a layer, for each step.
        window: share of the tokens that a query sees in a window.
        found: how it was found: what the search was given, and what it measured.
    """

    model: str
    rows: tuple[tuple[Cell, ...], ...]
    window: float = 0.25
    found: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.rows or not self.rows[0]:
            raise ValueError(f"a plan must have steps and layers, got {self.rows!r}")
        rows = tuple(tuple(Cell(*cell) for cell in row) for row in self.rows)
        object.__setattr__(self, "rows", rows)
        for step, row in enumerate(rows):
            if len(row) != len(rows[0]):
                raise ValueError(f"step {step} of a plan has {len(row)} layers, and step 0 has {len(rows[0])}")
            for layer, cell in enumerate(row):
                for value, allowed in ((cell.step, CELLS), (cell.guidance, (OWN, OTHER))):
                    if value not in allowed:
                        raise ValueError(
                            f"step {step}, layer {layer} of a plan must be {', '.join(allowed[:-1])} or {allowed[-1]}; "
                            f"got {value!r}"
                        )
        if not 0 < self.window < 1:
            raise ValueError(f"window of a plan must be above 0 and below 1, got {self.window!r}")
        if any(cell.step != FULL for cell in rows[0]):
            raise ValueError("step 0 of a plan has no step before it, so its layers must be 'full'")

    @property
    def steps(self) -> int:
        return len(self.rows)

    @property
    def layers(self) -> int:
        return len(self.rows[0])

    def save(self, path: str | os.PathLike[str]) -> None:
        held = {"version": PLAN_VERSION, "model": self.model, "rows": self.rows, "window": self.window}
        part = Path(f"{os.fspath(path)}.part")
        part.write_text(json.dumps({**held, "found": dict(self.found)}) + "\n", "utf-8")
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Raises ValueError if the file cannot be read or holds no plan."""
        name = os.fspath(path)
        try:
            held = json.loads(Path(path).read_text("utf-8"))
        except OSError as error:
            raise ValueError(f"plan {name!r} cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            raise ValueError(f"plan {name!r} holds no JSON: {error}") from None
        if not isinstance(held, dict) or held.get("version") != PLAN_VERSION:
            raise ValueError(f"plan {name!r} is no plan of version {PLAN_VERSION}")
        try:
            rows = tuple(tuple(Cell(*cell) for cell in row) for row in held["rows"])
            return cls(str(held["model"]), rows, held.get("window", cls.window), held.get("found", {}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"plan {name!r} is malformed: {error!r}") from None


class Schedule:
    """What a transformer's calls follow: the rows of a plan, or what a strategy says.

    Attributes:
        steps: how many there are; None for as many as come.
        strategy: None for plans.
        window: share of the tokens that a query sees in a window.
        scorer: what weighs the errors that the strategy counts, if anything.
    """

    def __init__(
        self,
        layers: int,
        *,
        plan: Plan | None = None,
        strategy: StepStrategy | None = None,
        guidance: str = OWN,
        skipped: Iterable[int] = (),
        scorer: Snr | None = None,
    ) -> None:
        self.layers, self.strategy, self.guidance, self.scorer = layers, strategy, guidance, scorer
        self.skipped = frozenset(skipped)
        self.steps = plan.steps if plan else None
        self.window = plan.window if plan else strategy.window if strategy else 0.0
        self._rows = plan.rows if plan else ()
        self._wanted = [self._wanted_of(step) for step in range(len(self._rows))]

    def row(self, progress: Progress) -> tuple[Cell, ...]:
        """What each layer does in the next step."""
        if self._rows:
            row = self._rows[progress.step]
        else:
            row = (Cell(self.strategy.cell(progress) if self.strategy else FULL, self.guidance),) * self.layers
        return tuple(Cell() if layer in self.skipped else cell for layer, cell in enumerate(row))

    def wanted(self, step: int, layer: int) -> Mapping[str, int]:
        """Of how many steps a layer's states will be read behind this one, by what they are of."""
        if self._rows:
            return self._wanted[step][layer]
        if self.strategy is None or layer in self.skipped:
            return {}
        return {SOURCES[name][0]: count for name, count in self.strategy.states.items() if count}

    def _wanted_of(self, step: int) -> list[dict[str, int]]:
        found = []
        for layer in range(self.layers):
            wanted: dict[str, int] = {}
            computed = 0
            for row in () if layer in self.skipped else self._rows[step + 1 :]:
                what, order = SOURCES[row[layer].step]
                if what == FULL:
                    computed += 1
                elif order + 1 > computed:
                    wanted[what] = max(wanted.get(what, 0), order + 1 - computed)
            found.append(wanted)
        return found


def make_schedule(
    model: str,
    layers: int,
    strategy: str | None = None,
    strategy_kwargs: Mapping[str, Any] | None = None,
    cfg_sharing: bool = False,
    skip_layers: Iterable[int] = (),
    plan: Plan | str | os.PathLike[str] | None = None,
    scorer: str | None = None,
) -> Schedule:
    """The schedule of a transformer with so many layers.

    Args:
        model: its class.
        skip_layers: layers that compute everything; negative from the last.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    if not isinstance(cfg_sharing, bool):
        raise TypeError(f"cfg_sharing must be True or False, got {cfg_sharing!r}")
    skipped = _layers(skip_layers, layers)
    if plan is not None:
        if strategy is not None or cfg_sharing or scorer is not None:
            raise ValueError(
                "a plan already says what is shared, so it cannot be given with strategy, scorer or cfg_sharing"
            )
        made = plan if isinstance(plan, Plan) else Plan.load(plan)
        if (made.model, made.layers) != (model, layers):
            raise ValueError(
                f"the plan is of {made.model} with {made.layers} layers, and the transformer is {model} with {layers}"
            )
        return Schedule(layers, plan=made, skipped=skipped)
    guidance = OTHER if cfg_sharing else OWN
    if strategy is None:
        if strategy_kwargs or scorer is not None:
            name, given = ("strategy_kwargs", strategy_kwargs) if strategy_kwargs else ("scorer", scorer)
            raise ValueError(f"{name} needs a strategy; got {given!r} and none")
        return Schedule(layers, guidance=guidance, skipped=skipped)
    found = cast(StepStrategy, make(StepStrategy.kind, strategy, strategy_kwargs))
    return Schedule(layers, strategy=found, guidance=guidance, skipped=skipped, scorer=_scorer(scorer, found))


def _scorer(name: str | None, strategy: StepStrategy) -> Snr | None:
    if name is None:
        return None
    if name != Snr.name:
        raise ValueError(f"scorer of denoising steps must be {Snr.name}; got {name!r}{nearest(name, [Snr.name])}")
    if not (strategy.measures or strategy.probes):
        raise ValueError(f"scorer weighs errors, and strategy {strategy.name} counts none; got {name!r}")
    return Snr()


def _layers(numbers: Iterable[int], layers: int) -> set[int]:
    found = set()
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"skip_layers must be integers, got {number!r}")
        if not -layers <= number < layers:
            raise ValueError(f"skip_layers must be between {-layers} and {layers - 1}, got {number}")
        found.add(number % layers)
    return found
