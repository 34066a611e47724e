"""Each strategy against plain torch, and what it does not compute."""

from __future__ import annotations

import pytest
import torch

from tests.diffusion.common import EAGER, generate, inputs, transformer
from tests.diffusion.oracle import Attention, Blocks
from tqc.diffusion.pipeline import make_dispatcher
from tqc.diffusion.plan import Cell, Plan
from tqc.diffusion.state import forecast_weights
from tqc.plugins import make
from tqc.plugins.step_strategy import Progress


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def compiled(model, **how):
    dispatcher = make_dispatcher(model, options=EAGER, **how)
    dispatcher.install()
    return dispatcher


def drifting(step, name="dit"):
    """Inputs that go on slowly, so that forecasts are near."""
    first, second = inputs(name, 0.0, seed=0), inputs(name, 0.0, seed=1)
    first["hidden_states"] = first["hidden_states"] + 0.1 * step * second["hidden_states"]
    return {**first, "timestep": torch.full((2,), 900 - 20 * step)}


def run(model, steps, name="dit"):
    return [model(**drifting(step, name))[0] for step in range(steps)]


def assert_equal(found, expected, atol=2e-5):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def sources(dispatcher):
    return {site.source for variant, _ in dispatcher.variants.values() for site in variant.sites[0]}


@pytest.mark.parametrize("name", ["dit", pytest.param("wan", marks=pytest.mark.extended)])
def test_taylor_forecasts_attention_through_the_last_computed_steps(name):
    model = transformer(name)
    plan = ["full"] * 3 + [("forecast", 2), "full", ("forecast", 2), "full"]
    oracle = Attention(plan.__getitem__)
    expected = [oracle.call(model, **drifting(step, name)) for step in range(7)]
    dispatcher = compiled(model, strategy="taylor", strategy_kwargs={"every": 2, "order": 2})
    assert_equal(run(model, 7, name), expected)
    assert len(dispatcher.variants) == 2 and sources(dispatcher) >= {"full", "own"}
    states = dispatcher._generations()[0].branches["call 0"].held
    assert {len(held) for held in states.values()} == {3}


@pytest.mark.extended
def test_a_forecast_with_too_few_states_is_of_lower_order():
    model = transformer("dit")
    plan = ["full", ("forecast", 0), "full", ("forecast", 1)]
    oracle = Attention(plan.__getitem__)
    expected = [oracle.call(model, **drifting(step)) for step in range(4)]
    compiled(model, strategy="taylor", strategy_kwargs={"every": 2, "order": 2, "warmup": 1})
    assert_equal(run(model, 4), expected)


def test_whole_blocks_are_forecast_and_not_computed():
    model = transformer("dit")
    plan = ["full"] * 3 + [("forecast", 1)] * 2 + ["full"]
    oracle = Blocks(model, model.transformer_blocks, lambda step, layer: plan[step])
    expected = [oracle.call(**drifting(step)) for step in range(6)]
    dispatcher = compiled(model, strategy="taylor", strategy_kwargs={"every": 3, "blocks": True})
    assert_equal(run(model, 6), expected)
    full, shared = sorted(variant.flops["total"] for variant, _ in dispatcher.variants.values())[::-1]
    assert shared < 0.05 * full


@pytest.mark.parametrize("share", [0.1, pytest.param(0.5, marks=pytest.mark.extended)])
def test_a_window_adds_what_it_lacked_in_the_last_computed_step(share):
    model = transformer("dit")
    oracle = Attention(lambda step: "near" if step % 3 else "full", width=-(-round(64 * share) // 3))
    expected = [oracle.call(model, **drifting(step)) for step in range(4)]
    dispatcher = compiled(model, strategy="window", strategy_kwargs={"every": 3, "share": share})
    assert_equal(run(model, 4), expected)
    assert sources(dispatcher) == {"full", "near"}
    flops = [variant.flops["attention"] for variant, _ in dispatcher.variants.values()]
    assert min(flops) < 1.6 * share * max(flops)


@pytest.mark.parametrize("name", [pytest.param("delta", marks=pytest.mark.extended), "delta2"])
def test_delta_computes_anew_where_the_forecast_missed_too_much(name):
    model, plain = transformer("dit"), transformer("dit")
    threshold = 0.4
    dispatcher = compiled(model, strategy=name, strategy_kwargs={"threshold": threshold, "limit": 2})
    # What it decides is replayed in plain torch, and what decides it is recomputed there.
    oracle, made = Attention(lambda step: made[step]), []
    strategy = make("strategy", name, {"threshold": threshold, "limit": 2})
    for step in range(9):
        given = drifting(step)
        found = model(**given)[0]
        cell = dispatcher._generations()[0].cells[0].step
        order = {"full": None, "shared": 0, "linear": 1, "quadratic": 2}[cell]
        made.append("full" if order is None else ("forecast", order))
        before = {site: list(points) for site, points in oracle.points.items()}
        assert_equal([found], [oracle.call(plain, **given)])
        if order is None and step:
            branch = dispatcher._generations()[0].branches["call 0"]
            assert branch.errors == pytest.approx(missed(before, oracle.points, step, strategy.ORDER + 1), rel=1e-3)
    assert "full" in made[1:] and any(what != "full" for what in made), made


def missed(before, after, step, most):
    from tests.diffusion.oracle import newton

    count = min(most, *(len(points) for points in before.values()))
    size = sum(points[0][1].square().sum() for points in after.values())
    found = []
    for terms in range(1, count + 1):
        total = sum(
            (newton(points[:terms], step) - after[site][0][1]).square().sum() for site, points in before.items()
        )
        found.append(float((total / size).sqrt()))
    return found


def test_delta2_falls_back_from_curve_to_line_to_computing():
    strategy = make("strategy", "delta2", {"threshold": 0.1})
    cells = [strategy.cell(Progress(5, 1, 1, errors)) for errors in ((), (0.05,), (0.2, 0.09, 0.01), (0.2, 0.05, 0.09))]
    assert cells == ["full", "shared", "quadratic", "linear"]
    assert strategy.cell(Progress(5, 1, 1, (0.3, 0.2, 0.2))) == "full"
    assert strategy.cell(Progress(5, 2, 1, (0.3, 0.02, 0.05))) == "linear"  # .05 grows to .4 in two steps, .02 to .08
    assert strategy.cell(Progress(5, 1, 1, (0.02,), weight=6.0)) == "full"
    assert strategy.cell(Progress(9, 5, 1, (0.0,))) == "full"  # behind the limit


@pytest.mark.parametrize("threshold", [pytest.param(0.0, marks=pytest.mark.extended), 0.3])
def test_first_block_takes_the_other_blocks_from_before_while_the_first_moves_little(threshold):
    model, plain = transformer("dit"), transformer("dit")
    decided, change, points = [], 0.0, []

    def decide(step, layer):
        return "full" if layer == 0 or decided[step] == "full" else ("forecast", 0)

    oracle = Blocks(plain, plain.transformer_blocks, decide)
    dispatcher = compiled(model, strategy="first_block", strategy_kwargs={"threshold": threshold})
    for step in range(7):
        given = drifting(step)
        probe = Blocks(plain, plain.transformer_blocks, lambda *_: "full")
        probe.call(**given)
        points.append(probe.points[0][0][1])  # what the first block adds
        if step:
            was = points[-2]
            change += float((points[-1] - was).abs().mean() / was.abs().mean())
        decided.append("shared" if step and change < threshold else "full")
        change = 0.0 if decided[-1] == "full" else change
        assert_equal([model(**given)[0]], [oracle.call(**given)])
    assert ("shared" in decided) == bool(threshold) and decided.count("full") > 1
    assert len(dispatcher.variants) == 3


def test_a_plan_mixes_what_layers_do_and_keeps_no_more_than_it_reads():
    model = transformer("dit")
    rows = [("full", "full"), ("full", "full"), ("linear", "block_linear"), ("full", "shared"), ("full", "full")]
    plan = Plan("DiTTransformer2DModel", tuple(tuple(Cell(name) for name in row) for row in rows))
    dispatcher = compiled(model, plan=plan)
    held = []
    for step in range(5):
        model(**drifting(step))
        branch = dispatcher._generations()[0].branches["call 0"]
        held.append(sorted((layer, key.what, len(branch.held[key])) for key, layer in branch.layers.items()))
    assert held == [
        [(0, "attention", 1), (1, "block", 1)],
        [(0, "attention", 2), (1, "attention", 1), (1, "block", 2)],
        [(1, "attention", 1)],
        [],
        [],
    ]


def test_forecasts_meet_curves():
    for steps in ([3], [5, 3], [7, 4, 3]):
        weights = forecast_weights(steps, 9)
        for power in range(len(steps)):
            assert sum(w * s**power for w, s in zip(weights, steps, strict=True)) == pytest.approx(9**power)


def test_rising_timesteps_share_nothing_and_that_is_said(caplog):
    model = transformer("dit")
    compiled(model, strategy="share")
    plain = generate(transformer("dit"), "dit")
    found = [model(**inputs("dit", 100.0 + 200 * step, seed=step))[0] for step in range(4)]
    expected = [transformer("dit")(**inputs("dit", 100.0 + 200 * step, seed=step))[0] for step in range(4)]
    assert_equal(found, expected)
    assert not torch.equal(found[0], plain[0])
    assert sum("rise" in record.message for record in caplog.records) == 1


@pytest.mark.extended
def test_a_state_that_is_packed_is_forecast_as_it_reads():
    model = transformer("dit")
    expected = run(model, 3)
    for bits in (8, 4):
        compiled(model, strategy="taylor", strategy_kwargs={"warmup": 2, "every": 2}, state_bits=bits)
        found = run(model, 3)
        assert_equal(found[:2], expected[:2], 1e-6)
        assert 0 < (found[2] - expected[2]).abs().max() < 0.2
