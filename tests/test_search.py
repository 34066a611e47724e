"""Policy search: valid options, a front, a budget that is kept, and a run that goes on where it stopped."""

from __future__ import annotations

from typing import Any

import pytest

from tqc.config import Config
from tqc.evaluate.search import GASearch, code_bits, search


def cost(options: dict[str, Any]) -> tuple[float, float, float]:
    bits = code_bits(options)
    return 2.0**-bits, bits, 1.0 + bool(options.get("strategy"))


def test_the_front_is_within_the_budget_and_nothing_is_better_than_it() -> None:
    seen = []

    def objective(options: dict[str, Any]) -> tuple[float, float, float]:
        Config.from_options(options)  # what is drawn can be compiled
        seen.append(cost(options))
        return seen[-1]

    found = search(objective, 40, budget_bits=4.0)
    assert all(one.measures["bits_4096"] <= 4 for one in found) and len(seen) < 40
    for one in found:
        mine = tuple(one.measures.values())
        assert not any(other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in seen)
    assert found[0].measures["kl_mean"] == min(values[0] for values in seen)


def test_a_search_goes_on_from_its_file(tmp_path: Any) -> None:
    calls: list[dict[str, Any]] = []

    def objective(options: dict[str, Any]) -> tuple[float, float, float]:
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(options)
        return cost(options)

    file = tmp_path / "best.json.journal"
    with pytest.raises(KeyboardInterrupt):
        search(objective, 12, file)
    more: list[dict[str, Any]] = []
    found = search(lambda options: more.append(options) or cost(options), 12, file)
    assert len(calls) == 5 and 6 <= len(more) <= 7
    best = min(cost(options)[0] for options in calls + more)
    assert found[0].measures["kl_mean"] == best
    assert search(lambda options: pytest.fail("done already"), 12, file) is not None


def test_failures_are_left_out_and_an_unreachable_budget_is_said() -> None:
    def objective(options: dict[str, Any]) -> tuple[float, float, float]:
        if options.get("strategy"):
            raise ValueError("not for this model")
        return cost(options)

    assert all("strategy" not in one.options for one in search(objective, 20))
    with pytest.raises(ValueError, match="none of 5 trials is within budget_bits=0.5"):
        search(cost, 5, budget_bits=0.5)
    with pytest.raises(ValueError, match="population 2 or more"):
        search(cost, 5, population=1)


def test_ga_search_takes_what_is_highest() -> None:
    tried: list[float] = []

    def objective(options: dict[str, Any]) -> float:
        tried.append(-abs(code_bits(options) - 5))
        return tried[-1]

    best = GASearch(6, 3, objective=objective, seed=1).run()
    assert len(tried) == 18 and -abs(code_bits(best) - 5) == max(tried)
