"""Sizes and numbers that dynamo makes symbolic: caches are packed all the same, and the results are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.models.common import FAMILIES, assert_caches_close, assert_close, prompt, run, sites
from tests.passes.common import OPTIONS
from tqc import report
from tqc.passes.plan import DENSE, FUSE


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def decode(model: Any, cache: Any, **compile_options: Any) -> tuple[torch.Tensor, Any]:
    options = {**OPTIONS, **compile_options.pop("options", {})}
    model.compile(backend="tqai", options=options, **compile_options)
    with report.collect() as plans, torch.no_grad():
        logits = run(model, prompt(1, 84), cache)
    model._compiled_call_impl = None
    return logits, plans


@pytest.mark.parametrize("dynamic", [None, True, pytest.param(False, marks=pytest.mark.extended)])
def test_two_models_of_one_class_that_differ_in_scale(dynamic: bool | None) -> None:
    """A draft and a target model are such a pair: the second one's scale is a symbolic float to dynamo."""
    for head_dim in (16, 32, 16):
        model = FAMILIES["llama"].build(head_dim=head_dim)
        theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
        expected = run(model, prompt(1, 84), theirs)
        actual, plans = decode(model, ours, dynamic=dynamic)
        assert not any(sites(plan, DENSE) for plan in plans), [site.reason for plan in plans for site in plan.sites]
        assert_close(actual, expected, 0.05, "logits")
        assert_caches_close(ours, theirs, 0.05, packed=2)


@pytest.mark.slow
def test_everything_dynamic_with_inductor() -> None:
    model = FAMILIES["llama"].build(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4})
    theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
    expected = run(model, prompt(1, 84), theirs)
    actual, plans = decode(model, ours, dynamic=True, options={"rest": "inductor"})
    assert plans and not any(sites(plan, DENSE) for plan in plans), [site.reason for p in plans for site in p.sites]
    assert_close(actual, expected, 0.05, "logits")
    assert_caches_close(ours, theirs, 0.05, packed=2)


def test_static_caches_of_several_lengths() -> None:
    model = FAMILIES["llama"].build()
    for length in (96, 128, 112, 96):
        theirs, ours = StaticCache(model.config, max_cache_len=length), StaticCache(model.config, max_cache_len=length)
        expected = run(model, prompt(1, 84), theirs)
        actual, plans = decode(model, ours)
        assert not any(sites(plan, DENSE) for plan in plans), [site.reason for plan in plans for site in plan.sites]
        assert_close(actual, expected, 0.05, "logits")
        assert_caches_close(ours, theirs, 0.05, packed=2)
    theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
    expected = run(model, prompt(1, 84), theirs)
    actual, plans = decode(model, ours)
    assert plans and sites(plans[-1], FUSE) == 2
    assert_close(actual, expected, 0.05, "logits")
