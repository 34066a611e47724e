"""Attention that is shared between steps and guidance branches: the same as in plain torch, and not computed."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.diffusion.common import EAGER, SharedInTorch, counted, generate, inputs, is_cross, transformer
from tqc.diffusion.pipeline import make_dispatcher
from tqc.diffusion.plan import Cell, Plan
from tqc.passes.rewrites.step_state import StateKey

EXTENDED = pytest.mark.extended
NAMES = ["dit", "wan", *(pytest.param(name, marks=EXTENDED) for name in ("sd3", "flux"))]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def compiled(model, **how):
    dispatcher = make_dispatcher(model, options=EAGER, **how)
    dispatcher.install()
    return dispatcher


def shared_in_torch(model, name, steps=4, every=2, **how):
    step = 0
    oracle = SharedInTorch(lambda site, query, key: "read" if step % every and not is_cross(query, key) else "keep")
    outputs = []
    for step in range(steps):  # noqa: B007
        outputs.append(oracle.call(model, **inputs(name, 900.0 - 100 * step, seed=step, **how)))
    return outputs


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_later_step_shares_is_as_in_plain_torch_and_not_computed(name):
    model = transformer(name)
    expected = shared_in_torch(model, name)
    plain = generate(model, name)
    dispatcher = compiled(model, strategy="share")
    assert_equal(generate(model, name), expected)
    assert len(dispatcher.variants) == 2
    assert (plain[1] - expected[1]).abs().max() > 1e-3

    full = counted(lambda: model(**inputs(name, 950.0)))
    shared = counted(lambda: model(**inputs(name, 900.0, seed=1)))
    assert shared["attention"] == (name == "wan")  # cross-attention
    assert full["attention"] == {"dit": 2, "sd3": 3, "wan": 2, "flux": 2}[name]
    # Projections of query, key and value: three a site, and three more for the prompt in joint attention. SD3's last
    # block reads the prompt for nothing else, so that six layers go that lead there.
    gone = {"dit": 6, "sd3": 6 + 3 + 6 + 6, "wan": 3, "flux": 6 + 3}[name]
    assert full["linear"] - shared["linear"] == gone


@pytest.mark.parametrize("name", ["dit", *(pytest.param(name, marks=EXTENDED) for name in ("sd3", "wan", "flux"))])
def test_a_plan_that_computes_everything_is_the_plain_compiled_transformer_bit_for_bit(name):
    model = transformer(name)
    model.compile(backend="tqai", options=EAGER)
    expected = generate(model, name, steps=2)
    rows = ((Cell(),) * (1 if name == "wan" else 2),) * 2
    dispatcher = compiled(model, plan=Plan(type(model).__name__, rows))
    found = generate(model, name, steps=2)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert dispatcher._generations()[0].nbytes == 0


@EXTENDED
def test_inductor_runs_what_is_shared():
    model = transformer("dit")
    expected = shared_in_torch(model, "dit", steps=2)
    make_dispatcher(model, strategy="share").install()
    for one, other in zip(generate(model, "dit", steps=2), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def guided(model, branches, steps=3):
    """Outputs by branch and step of a generation in two calls a step."""
    found = {}
    for step in range(steps):
        for branch in branches:
            with model.cache_context(branch):
                given = inputs("wan", 900.0 - 100 * step, seed=step)
                given["encoder_hidden_states"] += branch == "cond"
                found[branch, step] = model(**given)[0]
    return found


@pytest.mark.parametrize("branches", [("cond", "uncond"), pytest.param(("uncond", "cond"), marks=EXTENDED)])
def test_the_second_branch_takes_self_attention_of_the_first_and_computes_its_own_cross_attention(branches):
    model = transformer("wan")
    called = []
    oracle = SharedInTorch(lambda site, q, k: "read" if called[-1] != branches[0] and not is_cross(q, k) else "keep")

    class InTorch:
        cache_context = model.cache_context

        def __call__(self, **given):
            return (oracle.call(model, **given),)

    expected = {}
    for step in range(3):
        for branch in branches:
            called.append(branch)
            given = inputs("wan", 900.0 - 100 * step, seed=step)
            given["encoder_hidden_states"] += branch == "cond"
            expected[branch, step] = oracle.call(model, **given)
    dispatcher = compiled(model, cfg_sharing=True)
    found = guided(model, branches)
    assert_equal(list(found.values()), list(expected.values()))
    assert (found["cond", 0] - found["uncond", 0]).abs().max() > 1e-3
    assert dispatcher._generations()[0].nbytes == 0  # nothing is read any more


def test_sharing_between_branches_and_steps_at_once_keeps_one_state():
    model = transformer("wan")
    dispatcher = compiled(model, strategy="share", cfg_sharing=True)
    guided(model, ("cond", "uncond"), steps=2)
    guided(model, ("cond", "uncond"), steps=1)
    generation = dispatcher._generations()[0]
    assert generation.nbytes == 2 * 48 * 64 * 4
    assert counted(lambda: guided_call(model, "cond", 800.0))["attention"] == 1
    assert counted(lambda: guided_call(model, "uncond", 800.0))["attention"] == 1


def guided_call(model, branch, timestep):
    with model.cache_context(branch):
        return model(**inputs("wan", timestep))[0]


def test_one_batch_of_both_branches_computes_self_attention_for_its_second_half():
    model = transformer("wan")
    given = inputs("wan", 900.0, batch=4)
    expected = SharedInTorch(lambda site, q, k: "keep" if is_cross(q, k) else "half").call(model, **given)
    compiled(model, cfg_sharing=True)
    with model.cache_context("cond_uncond"):
        found = model(**given)[0]
    assert_equal([found], [expected])
    assert (model(**given)[0] - found).abs().max() > 1e-3  # without a word of guidance nothing is shared


def test_joint_attention_carries_the_prompt_and_is_not_shared_between_branches():
    model = transformer("sd3")
    given = inputs("sd3", 900.0, batch=2)
    plain = model(**given)[0]
    dispatcher = compiled(model, cfg_sharing=True)
    sites = []
    with dispatcher.generation(scope(guided=True)):
        model(**given)
    for variant, _ in dispatcher.variants.values():
        sites += variant.sites[0]
    assert {(site.name, site.kind): site.source for site in sites} == {
        ("transformer_blocks.0.attn", "joint"): "full",
        ("transformer_blocks.0.attn2", "self"): "half",
        ("transformer_blocks.1.attn", "joint"): "full",
    }
    assert torch.equal(model(**given)[0], plain)


def scope(guided=False, timesteps=None):
    from tqc.diffusion.state import Scope

    return Scope(lambda: guided, lambda: timesteps)


def test_a_generation_starts_anew_where_the_timestep_jumps_up_or_the_shape_changes():
    model = transformer("dit")
    dispatcher = compiled(model, strategy="share", strategy_kwargs={"every": 9})
    first = generate(model, "dit")
    again = generate(model, "dit")
    assert_equal(again, first)
    generation = dispatcher._generations()[0]
    assert generation.step == 3
    model(**inputs("dit", 500.0, batch=3))
    assert generation.step == 0
    assert generation.nbytes == 2 * 3 * 64 * 64 * 4


def test_a_new_generation_forgets_the_branches_and_the_state_of_the_last_one():
    dispatcher = make_dispatcher(transformer("wan"), cfg_sharing=True)
    generation = dispatcher._generations()[0]

    def advance(name, timestep):
        dispatcher.running.name = name
        branch = dispatcher._advance(generation, {"hidden_states": torch.zeros(1), "timestep": timestep})
        return dispatcher._other(generation, branch)

    assert [advance("cond", 900), advance("uncond", 900)] == [None, "cond"]
    generation.keep("cond", 0, StateKey("attn", "attention"), torch.zeros(1, 4, 2, 8))
    assert advance("uncond", 950) is None
    assert generation.nbytes == 0


def test_a_call_that_fails_frees_the_state():
    model = transformer("dit")
    dispatcher = compiled(model, strategy="share")
    expected = generate(model, "dit", steps=2)
    model(**inputs("dit", 900.0))
    assert dispatcher._generations()[0].nbytes
    with pytest.raises(IndexError, match="out of range"):
        model(**{**inputs("dit", 800.0), "class_labels": torch.tensor([0, 1 << 20])})
    assert dispatcher._generations()[0].nbytes == 0
    assert_equal(generate(model, "dit", steps=2), expected)


def test_two_threads_and_two_transformers_have_generations_of_their_own():
    models = [transformer("dit"), transformer("dit")]
    for parameter in models[1].parameters():
        parameter.mul_(1.1)
    expected = [shared_in_torch(model, "dit") for model in models]
    for model in models:
        compiled(model, strategy="share")
        generate(model, "dit", steps=2)
    # Interleaved step by step in one thread.
    found = [[], []]
    for step in range(4):
        for outputs, model in zip(found, models, strict=True):
            outputs.append(model(**inputs("dit", 900.0 - 100 * step, seed=step))[0])
    for outputs, wanted in zip(found, expected, strict=True):
        assert_equal(outputs, wanted)

    # One transformer in two threads, which meet at every step.
    barrier, outputs = threading.Barrier(2, timeout=60), [[], []]

    def work(number):
        with torch.no_grad():
            for step in range(4):
                barrier.wait()
                outputs[number].append(models[0](**inputs("dit", 900.0 - 100 * step, seed=step + 4 * number))[0])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_equal(outputs[0], expected[0])
    assert (outputs[1][1] - outputs[0][1]).abs().max() > 1e-3


def test_a_skipped_layer_computes_everything():
    model = transformer("dit")
    compiled(model, strategy="share", skip_layers=[-1])
    generate(model, "dit", steps=2)
    model(**inputs("dit", 900.0))
    assert counted(lambda: model(**inputs("dit", 800.0)))["attention"] == 1


def test_calls_of_one_timestep_without_names_share_nothing_and_that_is_said(caplog):
    model = transformer("dit")
    compiled(model, strategy="share")
    for _ in range(3):
        count = counted(lambda: model(**inputs("dit", 900.0)))
    assert count["attention"] == 2
    assert sum("called twice with timestep 900.0" in record.message for record in caplog.records) == 1


def test_gradients_of_shared_attention_are_refused():
    model = transformer("dit").requires_grad_(True)
    compiled(model, strategy="share")
    with torch.enable_grad(), pytest.raises(Exception, match="has no gradients"):
        model(**inputs("dit", 900.0))
