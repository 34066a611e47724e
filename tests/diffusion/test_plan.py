"""Plans and strategies: what they say of a step, files, and wrong input."""

from __future__ import annotations

import pytest

from tqc.diffusion.plan import Cell, Plan, make_schedule
from tqc.plugins.step_strategy import Progress

ROWS = (((Cell(),) * 2), (Cell("shared"), Cell("full", "other")))


def test_share_computes_every_third_step_in_all_layers_but_the_skipped():
    schedule = make_schedule("M", 3, "share", {"every": 3}, skip_layers=[-1])
    assert [[cell.step for cell in schedule.row(Progress(step))] for step in range(4)] == [
        ["full"] * 3,
        ["shared", "shared", "full"],
        ["shared", "shared", "full"],
        ["full"] * 3,
    ]
    assert {cell.guidance for step in range(4) for cell in schedule.row(Progress(step))} == {"own"}
    guided = make_schedule("M", 3, cfg_sharing=True, skip_layers=[0])
    assert guided.row(Progress(7)) == (Cell(), Cell("full", "other"), Cell("full", "other"))


def test_a_plan_comes_back_from_its_file(tmp_path):
    plan = Plan("M", ROWS)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    schedule = make_schedule("M", 2, plan=tmp_path / "plan.json", skip_layers=[1])
    assert (schedule.steps, schedule.row(Progress(1))) == (2, (Cell("shared"), Cell()))


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "holds no JSON"),
        ("[]", "no plan of version 1"),
        ('{"version": 9}', "no plan of version 1"),
        ('{"version": 1, "model": "M"}', "malformed"),
        ('{"version": 1, "model": "M", "rows": []}', "must have steps"),
        ('{"version": 1, "model": "M", "rows": [[["full"]], []]}', "step 1 of a plan has 0 layers"),
        ('{"version": 1, "model": "M", "rows": [[["half", "own"]]]}', "layer 0 of a plan must be full, shared, linear"),
        ('{"version": 1, "model": "M", "rows": [[["full", "both"]]]}', "must be own or other; got 'both'"),
        ('{"version": 1, "model": "M", "rows": [[["shared"]]]}', "step 0 of a plan has no step before it"),
        ('{"version": 1, "model": "M", "rows": 3}', "malformed"),
    ],
)
def test_a_file_that_holds_no_plan_is_told(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="cannot be read"):
        Plan.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"strategy": "shares"}, ValueError, "got 'shares' .did you mean 'share'?"),
        ({"strategy": "share", "strategy_kwargs": {"every": 0}}, ValueError, "every of strategy share .* got 0"),
        (
            {"strategy": "share", "strategy_kwargs": {"evry": 2}},
            ValueError,
            "no parameter 'evry' .did you mean 'every'",
        ),
        ({"strategy_kwargs": {"every": 2}}, ValueError, "strategy_kwargs needs a strategy"),
        ({"cfg_sharing": "both"}, TypeError, "cfg_sharing must be True or False, got 'both'"),
        ({"skip_layers": [2]}, ValueError, "skip_layers must be between -2 and 1, got 2"),
        ({"skip_layers": ["0"]}, TypeError, "skip_layers must be integers, got '0'"),
        ({"plan": Plan("N", ROWS)}, ValueError, "plan is of N with 2 layers, and the transformer is M with 2"),
        ({"plan": Plan("M", ((Cell(),),))}, ValueError, "of M with 1 layers"),
        ({"plan": Plan("M", ROWS), "strategy": "share"}, ValueError, "cannot be given with strategy"),
    ],
)
def test_wrong_input_is_told(given, error, message):
    with pytest.raises(error, match=message):
        make_schedule("M", 2, **given)


def test_a_plan_knows_how_many_states_are_read_behind_a_step():
    names = ["full", "full", "quadratic", "full", "window", "block_linear"]
    schedule = make_schedule("M", 1, plan=Plan("M", tuple((Cell(name),) for name in names)))
    assert [dict(schedule.wanted(step, 0)) for step in range(6)] == [
        {"attention": 2},
        {"attention": 3, "block": 1},
        {"block": 1},
        {"window": 1, "block": 2},
        {"block": 2},
        {},
    ]
