"""Search among options for those that lose least at few bits and little time: `tqc search`.

NSGA-II (optuna) over three things to keep small: KL of the predictions from the dense model's, all-in bits, and the
time of a token. Options are drawn as a user could give them and checked by `Config`; a trial whose code bits alone are
over the budget is not run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tqc.config import Config
from tqc.evaluate.evaluation import evaluate
from tqc.plugins import plugins
from tqc.strategies import BUDGETS, EVICT, TIERED

POPULATION = 12
TIMED_STEPS = 8
MEASURES = ("kl_mean", "bits_4096", "ms")
WINDOWS = (64, 96, 128)
KEEPS = (0.25, 0.5, 0.75)

# Takes the options and returns what shall be small.
Objective = Callable[[dict[str, Any]], "float | tuple[float, ...]"]


@dataclass(frozen=True)
class Found:
    """One trial: its options and measures, as in `MEASURES`."""

    options: dict[str, Any]
    measures: dict[str, float]


def draw(trial: Any) -> dict[str, Any]:
    """Options of one trial of optuna."""
    scorers = [name for name, plugin in plugins().items() if plugin.kind == "scorer" and name != "random"]
    options: dict[str, Any] = {}
    strategy = trial.suggest_categorical("strategy", ["none", TIERED, EVICT])
    if strategy != TIERED:
        options["bits_k"] = trial.suggest_int("bits_k", 2, 8)
        options["bits_v"] = trial.suggest_int("bits_v", 2, 8)
    if strategy == "none":
        options["residual_window"] = trial.suggest_categorical("residual_window", WINDOWS)
    else:
        options["strategy"] = strategy
        options["scorer"] = trial.suggest_categorical("scorer", scorers)
        if strategy == TIERED:
            options["tiers"] = trial.suggest_categorical("tiers", [*BUDGETS.values()])
        else:
            options["keep"] = trial.suggest_categorical("keep", KEEPS)
    options["skip_layers"] = {"none": (), "ends": (0, -1)}[trial.suggest_categorical("skip_layers", ["none", "ends"])]
    return options


def code_bits(options: Mapping[str, Any]) -> float:
    """Bits of a code in the mean over keys and values, evicted tokens counted as 0."""
    config = Config.from_options(options)
    bits = [fmt.groups.code_bits if fmt.groups else fmt.bits for fmt in config.formats(64, 64)]
    return sum(bits) / 2


class Measured:
    """The objective of a model: KL and bits by `evaluate`, and the time of a token at the end of the text."""

    def __init__(self, model: Any, tokenizer: Any, text: str | None, tokens: int) -> None:
        self.model, self.tokenizer, self.text, self.tokens = model, tokenizer, text, tokens

    def __call__(self, options: dict[str, Any]) -> tuple[float, float, float]:
        torch.compiler.reset()
        found = evaluate(self.model, self.tokenizer, [options], self.text, self.tokens, numbers=0)
        row = found.rows[-1]
        if row.reason or row.kl_mean is None or row.bits_4096 is None:
            raise ValueError(row.reason or "nothing was measured")
        return row.kl_mean, row.bits_4096, self._step_ms(options)

    def _step_ms(self, options: dict[str, Any]) -> float:
        from transformers import DynamicCache

        run = torch.compile(self.model, backend="tqai", options={"rest": "eager", **options})
        cache, times = DynamicCache(config=self.model.config), []
        ids = torch.zeros(1, self.tokens, dtype=torch.int64, device=self.model.device)
        with torch.no_grad():
            run(ids, past_key_values=cache, logits_to_keep=1)
            for _ in range(2 + TIMED_STEPS):
                begin = time.perf_counter()
                run(ids[:, :1], past_key_values=cache)
                times.append(time.perf_counter() - begin)
        return 1e3 * statistics.median(times[2:])


def search(
    objective: Objective,
    trials: int,
    file: str | Path | None = None,
    budget_bits: float | None = None,
    population: int = POPULATION,
    seed: int = 0,
    on_trial: Callable[[int, int, str], None] | None = None,
) -> list[Found]:
    """Trials up to a number in all, those that a file has from earlier runs included.

    Args:
        objective: of options; a ValueError of it is a trial that fails, with its reason.
        file: where trials are written as they end, and from which a search goes on; none are kept if None.
        budget_bits: most all-in bits; others are worse than any within.
        on_trial: called with how many are done, their number, and a line about the last one.

    Returns:
        The best that there are: nothing else is better in one measure and no worse in the others. Within the budget if
        there is one, least KL first.

    Raises:
        ValueError: if nothing is within the budget, or the numbers cannot be.
        ModuleNotFoundError: without optuna.
    """
    if trials < 1 or population < 2:
        raise ValueError(f"trials must be 1 or more and population 2 or more; got {trials} and {population}")
    optuna = _optuna()

    storage = None
    if file is not None:
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
    done = 0
    if storage is not None and (studies := optuna.get_all_study_summaries(storage)):
        done = studies[0].n_trials
    # The seed moves on with the trials that there are, so that a search that goes on draws others.
    sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed + done)
    study = optuna.create_study(
        study_name="tqc", storage=storage, sampler=sampler, directions=["minimize"] * len(MEASURES), load_if_exists=True
    )

    def run(trial: Any) -> tuple[float, ...]:
        options = draw(trial)
        trial.set_user_attr("options", options)
        if budget_bits is not None and code_bits(options) > budget_bits:
            raise optuna.TrialPruned(f"{code_bits(options):.3g} code bits are over the budget")
        found = objective(options)
        values = found if isinstance(found, tuple) else (found, code_bits(options), 0.0)
        if budget_bits is not None:
            trial.set_constraint("budget_bits", values[1] - budget_bits)
            trial.set_user_attr("over", values[1] - budget_bits)
        return values

    def say(study: Any, trial: Any) -> None:
        if on_trial:
            on_trial(trial.number + 1, trials, f"{trial.params}: {trial.values or trial.state.name.lower()}")

    study.optimize(run, n_trials=max(0, trials - done), catch=(ValueError,), callbacks=[say])
    best = [
        Found(trial.user_attrs["options"], dict(zip(MEASURES, trial.values, strict=True)))
        for trial in study.best_trials
        if trial.user_attrs.get("over", 0.0) <= 0
    ]
    if not best:
        raise ValueError(
            f"none of {len(study.trials)} trials is within budget_bits={budget_bits}: all-in bits count window, sinks "
            "and scales too; try more trials or a larger budget"
        )
    return sorted(best, key=lambda found: found.measures["kl_mean"])


class GASearch:
    """tqai's search by its name, on `search`.

    Args:
        objective: called with options of the backend; the higher what it returns, the better, as in tqai.
    """

    def __init__(
        self,
        population_size: int = 20,
        generations: int = 10,
        *,
        objective: Callable[[dict[str, Any]], float],
        seed: int = 0,
    ) -> None:
        self.population_size, self.generations = population_size, generations
        self.objective, self.seed = objective, seed

    def run(self) -> dict[str, Any]:
        """The best options that were tried. Raises ValueError if no trial succeeded."""
        trials = self.population_size * self.generations
        found = search(
            lambda options: -self.objective(options), trials, population=self.population_size, seed=self.seed
        )
        return found[0].options


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError:
        raise ModuleNotFoundError("tqc search needs optuna: pip install 'tqai-compiler[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
