"""Models whose values are rotated by their weights: the same results, in every mixture with other caches and graphs."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import tqc
from tests.common import OPTIONS
from tests.models.common import FAMILIES, assert_caches_close, assert_close, compiled, layers, prompt, run
from tests.passes.common import notes
from tqc.cache.packed_tensor import PackedTensor
from tqc.execute import folded_weights, split_graph
from tqc.passes.plan import DENSE, FUSE, PACK, Plan


def decode(model: Any, cache: Any = None, **options: Any) -> tuple[Tensor, Any, list[Plan]]:
    cache = DynamicCache(config=model.config) if cache is None else cache
    with compiled(model, **options) as plans:
        return run(model, prompt(2, 90), cache, splits=(80, 87)), cache, plans


def folds(cache: Any) -> list[bool]:
    return [layer.values.fmt.folded for layer in layers(cache) if isinstance(layer.values, PackedTensor)]


@pytest.mark.parametrize(
    "name, attn, tolerance",
    [
        ("llama", "sdpa", 1e-5),
        # Bias on values; its large keys sit on boundaries between codes, which rounding tips.
        pytest.param("qwen2", "sdpa", 2e-3, marks=pytest.mark.extended),
        ("phi3", "sdpa", 1e-5),  # one layer for queries, keys and values
        pytest.param("gemma2", "eager", 1e-5, marks=pytest.mark.extended),
    ],
)
def test_models(name: str, attn: str, tolerance: float) -> None:
    model = FAMILIES[name].build(attn)
    expected, theirs, _ = decode(model)
    actual, ours, plans = decode(model, fold_values=True)
    for plan in plans:
        assert plan.rewritten["fold_rotation"] == FAMILIES[name].packed
        assert all(site.v_proj and site.o_proj for site in plan.sites if site.action != DENSE)
    assert plans[0].with_action(PACK) and plans[-1].with_action(FUSE)
    assert folds(ours) == [True] * FAMILIES[name].packed and not any(folds(theirs))
    assert_close(actual, expected, tolerance, "logits")
    for a, b in zip(layers(ours), layers(theirs), strict=True):
        for mine, its in ((a.keys, b.keys), (a.values, b.values)):
            torch.testing.assert_close(mine + 0, its + 0, atol=20 * tolerance, rtol=0)


@pytest.fixture(scope="module")
def llama() -> Any:
    return FAMILIES["llama"].build("sdpa")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_beams": 2},
        *(pytest.param(kwargs, marks=pytest.mark.extended) for kwargs in ({}, {"prompt_lookup_num_tokens": 3})),
    ],
    ids=str,
)
def test_generate(llama: Any, kwargs: dict[str, Any]) -> None:
    ids = prompt(1, 16).repeat(1, 5)

    def generate(**options: Any) -> Any:
        with compiled(llama, **options):
            return llama.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, **kwargs)

    expected, actual = generate(), generate(fold_values=True)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert all(folds(actual.past_key_values))


@pytest.mark.parametrize("first, then", [(True, False), pytest.param(False, True, marks=pytest.mark.extended)])
def test_a_cache_of_one_kind_in_a_graph_of_the_other(llama: Any, first: bool, then: bool, tmp_path: Path) -> None:
    """Saved, loaded, copied, cropped, and grown by a graph with the other option, and by the model uncompiled."""
    ids, tail = prompt(2, 80), prompt(2, 7, seed=1)

    def go_on(*options: bool) -> tuple[Tensor, Any]:
        cache = DynamicCache(config=llama.config)
        with compiled(llama, fold_values=options[0]):
            run(llama, ids, cache)
        tqc.save_cache(cache, tmp_path / "cache")
        cache = copy.deepcopy(tqc.load_cache(tmp_path / "cache"))
        cache.crop(-3)
        logits = [run(llama, tail[:, :2], cache, splits=(2,))]  # not compiled
        assert folds(cache) == [options[0]] * 2
        with compiled(llama, fold_values=options[1]) as plans:
            logits.append(run(llama, tail[:, 2:], cache, splits=(2,)))
        assert folds(cache) == [options[0]] * 2
        if options == (True, False):
            assert "fold_values is off" in notes(plans)
        if options == (False, True):
            assert "the cache holds them as they are" in notes(plans)
        return torch.cat(logits, 1), cache

    (expected, theirs), (actual, ours) = go_on(False, False), go_on(first, then)
    assert_close(actual, expected, 1e-4, "logits")
    assert_caches_close(ours, theirs, 1e-3, packed=2)


def test_one_compiled_model_meets_both_kinds(llama: Any) -> None:
    """No graph that was made for one kind of cache takes the other."""
    caches = [decode(llama)[1], decode(llama, fold_values=True)[1]]
    with compiled(llama, fold_values=True):
        first, second, third = (run(llama, prompt(2, 3), copy.deepcopy(caches[i]), splits=(1,)) for i in (0, 1, 0))
    assert_close(second, first, 1e-4, "logits")
    assert torch.equal(third, first)


def test_a_changed_weight_is_folded_anew() -> None:
    model = FAMILIES["llama"].build("sdpa")
    attention = model.model.layers[0].self_attn
    other = {name: weight + 0.1 for name, weight in model.state_dict().items() if "proj" in name}

    def edit(step: int) -> None:
        with torch.no_grad():
            if step == 0:
                attention.v_proj.weight.mul_(-2.0)
            elif step == 1:
                model.load_state_dict(other, strict=False)
            elif step == 2:
                attention.o_proj.weight = nn.Parameter(-attention.o_proj.weight)
            elif step == 3:
                attention.v_proj.weight.data = attention.v_proj.weight.data * 3

    def steps(**options: Any) -> list[Tensor]:
        cache, logits = DynamicCache(config=model.config), []
        model.load_state_dict(before)
        with compiled(model, **options):
            run(model, prompt(2, 80), cache)
            for step in range(4):
                logits.append(run(model, prompt(2, 2, seed=step), cache, splits=(1,)))
                edit(step)
            attention.o_proj.weight.data.mul_(-1.0)  # torch does not count this one; the next prompt sees it
            logits.append(run(model, prompt(2, 82), DynamicCache(config=model.config)))
        return logits

    before = copy.deepcopy(model.state_dict())
    for actual, expected in zip(steps(fold_values=True), steps(), strict=True):
        assert_close(actual, expected, 1e-3, "logits")


def test_folded_weights_are_shared_by_graphs_and_go_with_their_weights() -> None:
    model = FAMILIES["llama"].build("sdpa")
    gc.collect()
    before = set(folded_weights._folded)
    _, cache, _ = decode(model, fold_values=True)
    made = folded_weights._folded.keys() - before
    assert len(made) == 4
    weight, how = model.model.layers[0].self_attn.v_proj.weight, (str(layers(cache)[0].values.fmt), 0, 0, 32)
    first, second = (folded_weights.folded_weights([weight], [how], anew=False) for _ in range(2))
    assert first[0] is second[0] is folded_weights._folded[id(weight), how].folded
    del model, weight, cache
    torch._dynamo.reset()
    gc.collect()
    assert not made & folded_weights._folded.keys()


@pytest.mark.extended
def test_regions_are_still_shared(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[bool, list[int]] = {}
    for on in (False, True):
        kinds = found[on] = []
        split = split_graph.split

        def count(gm: Any, *outside: Any, split: Any = split, kinds: list[int] = kinds) -> Any:
            result = split(gm, *outside)
            kinds.append(len(result[0]))
            return result

        with monkeypatch.context() as patch:
            patch.setattr(split_graph, "split", count)
            decode(FAMILIES["llama"].build("sdpa", num_hidden_layers=5), fold_values=on)
    assert found[True] == found[False]


@pytest.mark.extended
def test_with_inductor(llama: Any) -> None:
    expected, theirs, _ = decode(llama, rest="inductor")
    actual, ours, _ = decode(llama, rest="inductor", fold_values=True)
    assert all(folds(ours))
    assert_close(actual, expected, 1e-4, "logits")
    assert_caches_close(ours, theirs, 1e-3, packed=2)


def test_a_preallocated_cache_is_not_folded(llama: Any) -> None:
    caches = [StaticCache(llama.config, max_cache_len=128) for _ in range(2)]
    expected, *_ = decode(llama, caches[0])
    actual, cache, plans = decode(llama, caches[1], fold_values=True)
    assert folds(cache) == [False] * 2 and "preallocated" in notes(plans)
    assert torch.equal(actual, expected)


def test_explain_says_what_was_folded(llama: Any) -> None:
    told = str(tqc.explain(llama, prompt(1, 40), options={**OPTIONS, "fold_values": True}))
    assert "values folded into weights" in told and ":folded" in told.replace("\n", "")
