"""What is computed and what is shared: for each denoising step and layer, by a plan or by a strategy."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

FULL, SHARED = "full", "shared"
OWN, OTHER = "own", "other"
PLAN_VERSION = 1


class Cell(NamedTuple):
    """One layer in one step.

    Attributes:
        step: "full", or "shared" for what attention gave in the last step.
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
    """

    model: str
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        if not self.rows or not self.rows[0]:
            raise ValueError(f"a plan must have steps and layers, got {self.rows!r}")
        rows = tuple(tuple(Cell(*cell) for cell in row) for row in self.rows)
        object.__setattr__(self, "rows", rows)
        for step, row in enumerate(rows):
            if len(row) != len(rows[0]):
                raise ValueError(f"step {step} of a plan has {len(row)} layers, and step 0 has {len(rows[0])}")
            for layer, cell in enumerate(row):
                for value, allowed in ((cell.step, (FULL, SHARED)), (cell.guidance, (OWN, OTHER))):
                    if value not in allowed:
                        raise ValueError(
                            f"step {step}, layer {layer} of a plan must be {' or '.join(allowed)}; got {value!r}"
                        )
        if any(cell.step == SHARED for cell in rows[0]):
            raise ValueError("step 0 of a plan has no step before it, so its layers must be 'full'")

    @property
    def steps(self) -> int:
        return len(self.rows)

    @property
    def layers(self) -> int:
        return len(self.rows[0])

    def save(self, path: str | os.PathLike[str]) -> None:
        held = {"version": PLAN_VERSION, "model": self.model, "rows": self.rows}
        Path(path).write_text(json.dumps(held) + "\n", "utf-8")

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
            return cls(str(held["model"]), tuple(tuple(Cell(*cell) for cell in row) for row in held["rows"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"plan {name!r} is malformed: {error!r}") from None


def share(every: int = 2) -> Callable[[int], str]:
    """Attention is computed in every n-th step, and shared in those between (Pyramid Attention Broadcast, DiTFastAttn).

    Raises:
        ValueError: unless `every` is an int of at least 1.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every of strategy share must be an int of at least 1, got {every!r}")
    return lambda step: SHARED if step % every else FULL


STRATEGIES: dict[str, Callable[..., Callable[[int], str]]] = {"share": share}


@dataclass(frozen=True)
class Schedule:
    """What a transformer's calls follow: the rows of a plan, or what a strategy says of any step.

    Attributes:
        steps: how many there are; None for as many as come.
    """

    layers: int
    row: Callable[[int], tuple[Cell, ...]]
    steps: int | None = None


def make_schedule(
    model: str,
    layers: int,
    strategy: str | None = None,
    strategy_kwargs: Mapping[str, Any] | None = None,
    cfg_sharing: bool = False,
    skip_layers: Iterable[int] = (),
    plan: Plan | str | os.PathLike[str] | None = None,
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
        if strategy is not None or cfg_sharing:
            raise ValueError("a plan already says what is shared, so it cannot be given with strategy or cfg_sharing")
        made = plan if isinstance(plan, Plan) else Plan.load(plan)
        if (made.model, made.layers) != (model, layers):
            raise ValueError(
                f"the plan is of {made.model} with {made.layers} layers, and the transformer is {model} with {layers}"
            )
        rows = [tuple(Cell() if n in skipped else cell for n, cell in enumerate(row)) for row in made.rows]
        return Schedule(layers, rows.__getitem__, len(rows))
    of_step = _strategy(strategy, strategy_kwargs or {})
    guidance = OTHER if cfg_sharing else OWN

    def row(step: int) -> tuple[Cell, ...]:
        cell = Cell(of_step(step), guidance)
        return tuple(Cell() if layer in skipped else cell for layer in range(layers))

    return Schedule(layers, row)


def _strategy(name: str | None, parameters: Mapping[str, Any]) -> Callable[[int], str]:
    if name is None:
        if parameters:
            raise ValueError(f"strategy_kwargs need a strategy, got {dict(parameters)!r}")
        return share(1)
    if name not in STRATEGIES:
        near = difflib.get_close_matches(str(name), STRATEGIES, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {name!r}{hint}")
    try:
        return STRATEGIES[name](**parameters)
    except TypeError as error:
        raise TypeError(f"strategy_kwargs of {name}: {error}") from None


def _layers(numbers: Iterable[int], layers: int) -> set[int]:
    found = set()
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"skip_layers must be integers, got {number!r}")
        if not -layers <= number < layers:
            raise ValueError(f"skip_layers must be between {-layers} and {layers - 1}, got {number}")
        found.add(number % layers)
    return found
