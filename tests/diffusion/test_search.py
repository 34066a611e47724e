"""`tqc.plan`: what it finds, that it goes on where it was stopped, and what it refuses."""

from __future__ import annotations

import json
import types

import pytest
import torch

import tqc
from tests.diffusion.common import EAGER, inputs, transformer
from tests.diffusion.test_pipeline import dit_pipeline, draw
from tqc.diffusion.dispatcher import dispatcher_of
from tqc.diffusion.plan import Plan
from tqc.diffusion.plot import plot_plan
from tqc.diffusion.search import Search

CALL = {"class_labels": [1, 2], "num_inference_steps": 4}


def test_a_plan_is_searched_saved_and_taken_by_the_pipeline(tmp_path):
    pipe = dit_pipeline()
    plain = draw(pipe)
    told = []
    plan = tqc.plan(
        pipe, CALL, max_error=0.3, path=tmp_path / "plan.json", progress=lambda done, total: told.append((done, total))
    )
    assert (plan.steps, plan.layers) == (4, 2) and plan == Plan.load(tmp_path / "plan.json")
    assert any(cell.step != "full" for row in plan.rows for cell in row)
    assert told[-1] == (4, 4) and [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert torch.equal(draw(pipe), plain) and dispatcher_of(pipe.transformer) is None
    tqc.compile_pipeline(pipe, plan=tmp_path / "plan.json", options=EAGER)
    with pytest.raises(ValueError, match="the plan has 4 steps, and the scheduler is set to 3"):
        draw(pipe, steps=3)
    found = draw(pipe)
    assert not torch.equal(found, plain)
    explained = tqc.explain(pipe)
    flops = {variant.flops["total"] for variants in explained.transformers.values() for variant in variants}
    assert min(flops) < max(flops) and f"{len(dispatcher_of(pipe.transformer).variants)} variants" in str(explained)
    assert 0 < plan.found["total"] < 1 and plan.found["psnr_db"] > 5
    plot_plan(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


@pytest.mark.extended
def test_each_step_misses_no_more_than_was_allowed():
    """Replayed: the plan's output of each step against that of the full transformer on the same sample."""
    pipe, full = dit_pipeline(), transformer("dit")
    error = 0.2
    plan = tqc.plan(pipe, CALL, max_error=error)
    tqc.compile_pipeline(pipe, plan=plan, options=EAGER)
    dispatcher, missed = dispatcher_of(pipe.transformer), []
    run = dispatcher._run

    def watching(call, row, args, kwargs):
        result = run(call, row, args, kwargs)
        expected = full(*args, **kwargs).sample
        missed.append(float((result.sample - expected).norm() / expected.norm()))
        return result

    dispatcher._run = watching
    pipe(**CALL, output_type="np", guidance_scale=4.0, generator=torch.Generator().manual_seed(0))
    assert len(missed) == 4 and 0 < max(missed)
    # The scheduler's steps weigh differently; none weighs less than a quarter.
    assert max(missed) < 4 * error


@pytest.mark.extended
def test_a_search_that_was_stopped_goes_on(tmp_path, monkeypatch):
    pipe, path = dit_pipeline(), tmp_path / "plan.json"
    whole = tqc.plan(pipe, CALL, max_error=0.3)
    chosen = []
    choose = Search._choose

    def counting(search, call, args, kwargs):
        chosen.append(call.generation.step)
        return choose(search, call, args, kwargs)

    monkeypatch.setattr(Search, "_choose", counting)

    def stop(done, total):
        if done == 3 and len(chosen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tqc.plan(pipe, CALL, max_error=0.3, path=path, progress=stop)
    assert len(json.loads((tmp_path / "plan.json.search").read_text())["rows"]) == 3
    assert dispatcher_of(pipe.transformer) is None
    assert tqc.plan(pipe, CALL, max_error=0.3, path=path) == whole
    assert chosen == [1, 2, 3]
    tqc.plan(pipe, CALL, max_error=0.31, path=path)
    assert chosen == [1, 2, 3, 1, 2, 3]


@pytest.mark.extended
def test_two_calls_a_step_share_between_branches_where_that_misses_little():
    model = transformer("wan")
    search = Search(model, ["blocks.0"], 10.0, 0.25, (), True, [], lambda step: None)
    search.install()
    with torch.no_grad():
        for step in range(2):
            for branch in ("cond", "uncond"):
                with model.cache_context(branch):
                    model(**inputs("wan", 900.0 - 100 * step, seed=step))
    assert [row[0] for row in search.rows] == [("full", "other")] * 2
    assert search.spent["attention"] < search.full["attention"]


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"max_error": 0.1, "budget": 0.5}, ValueError, "cannot both be given"),
        ({"max_error": -1}, ValueError, "max_error must be a number above 0, got -1"),
        ({"budget": 1.5}, ValueError, "budget must be a number above 0 and below 1, got 1.5"),
        ({"cells": ["share"]}, ValueError, "got 'share' .did you mean 'shared'"),
        ({"call": {"class_label": [1]}}, ValueError, "takes no 'class_label' .did you mean 'class_labels'"),
        ({"call": {"generator": 1}}, ValueError, "must leave generator to the search"),
        ({"pipe": types.SimpleNamespace()}, ValueError, "pipe must have a transformer"),
    ],
)
def test_wrong_input_of_a_search_is_told(given, error, message):
    given = {"pipe": dit_pipeline(), "call": CALL, **given}
    with pytest.raises(error, match=message):
        tqc.plan(given.pop("pipe"), given.pop("call"), **given)


def test_strategies_are_options_of_a_transformer_too():
    model = transformer("dit")
    model.compile(backend="tqai", options={"strategy": "taylor", "strategy_kwargs": {"warmup": 1}, **EAGER})
    dispatcher = dispatcher_of(model)
    assert dispatcher.schedule.strategy.warmup == 1
    with torch.no_grad():
        for step in range(3):
            model(**inputs("dit", 900.0 - step))
    assert len(dispatcher.variants) == 2
    with pytest.raises(ValueError, match="scorer reads the scheduler of a pipeline"):
        model.compile(backend="tqai", options={"strategy": "delta2", "scorer": "snr"})
    with pytest.raises(ValueError, match="got 'delt' .did you mean 'delta'"):
        model.compile(backend="tqai", options={"strategy": "delt"})


@pytest.mark.extended
def test_the_snr_scorer_reads_the_sigmas_of_the_scheduler():
    pipe = dit_pipeline()
    tqc.compile_pipeline(pipe, strategy="delta2", scorer="snr", strategy_kwargs={"threshold": 0.5}, options=EAGER)
    draw(pipe)
    with pytest.raises(ValueError, match="share counts none; got 'snr'"):
        tqc.compile_pipeline(pipe, strategy="share", scorer="snr")
    pipe.scheduler = torch.nn.Identity()
    with pytest.raises(ValueError, match="reads the sigmas of the scheduler, and Identity has none"):
        tqc.compile_pipeline(pipe, strategy="delta2", scorer="snr")


def test_first_block_probes_the_last_step_of_a_pipeline_too():
    pipe = dit_pipeline()
    plain = draw(pipe)
    tqc.compile_pipeline(pipe, strategy="first_block", strategy_kwargs={"threshold": 1e-9}, options=EAGER)
    torch.testing.assert_close(draw(pipe), plain, rtol=0, atol=1e-4)
    tqc.compile_pipeline(pipe, strategy="first_block", strategy_kwargs={"threshold": 9.0}, options=EAGER)
    assert not torch.allclose(draw(pipe), plain, rtol=0, atol=1e-4)
