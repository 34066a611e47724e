"""Every way to generate that touches the cache: the same tokens as dense, from packed caches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.models.common import FAMILIES, assert_caches_close, assert_close, compiled, layers, prompt, run, sites
from tqc.cache.packed_tensor import PackedTensor
from tqc.passes.plan import FUSE

NEW = 8


@pytest.fixture(scope="module")
def llama() -> Any:
    return FAMILIES["llama"].build("sdpa")


def generate(model: Any, ids: torch.Tensor, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        return model.generate(ids, **{**settings, **kwargs})


def compare(model: Any, ids: torch.Tensor, fused: bool = True, **kwargs: Any) -> tuple[Any, list[Any]]:
    expected = generate(model, ids, **copy.deepcopy(kwargs))
    with compiled(model) as plans:
        actual = generate(model, ids, **kwargs)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    if actual.logits and actual.logits[0].shape == expected.logits[0].shape:
        assert_close(torch.stack(actual.logits), torch.stack(expected.logits), 0.1, "logits")
    assert any(sites(plan, FUSE) for plan in plans) == fused
    if fused and actual.past_key_values is not None:
        assert all(isinstance(layer.keys, PackedTensor) for layer in layers(actual.past_key_values))
        assert_caches_close(actual.past_key_values, expected.past_key_values, 0.05)
    return actual, plans


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        pytest.param({"do_sample": True, "top_k": 5}, marks=pytest.mark.slow, id="sampling"),
        pytest.param({"num_beams": 2}, id="beams"),
        pytest.param({"num_beams": 3, "num_return_sequences": 3}, marks=pytest.mark.extended, id="three beams"),
        pytest.param({"num_return_sequences": 2, "do_sample": True}, marks=pytest.mark.extended, id="two samples"),
        pytest.param({"prefill_chunk_size": 32}, marks=pytest.mark.slow, id="chunked prefill"),
        pytest.param({"cache_implementation": "static"}, marks=pytest.mark.slow, id="static"),
    ],
)
def test_generate(llama: Any, kwargs: dict[str, Any]) -> None:
    compare(llama, prompt(2, 80), **kwargs)


@pytest.mark.parametrize("attn", ["sdpa", pytest.param("eager", marks=pytest.mark.extended)])
def test_left_padding(attn: str) -> None:
    ids = prompt(2, 80)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    compare(FAMILIES["llama"].build(attn), ids, attention_mask=mask)


def repetitive() -> torch.Tensor:
    return prompt(1, 16).repeat(1, 5)


def test_prompt_lookup_crops(llama: Any) -> None:
    compare(llama, repetitive(), prompt_lookup_num_tokens=3)


@pytest.mark.slow
def test_assisted(llama: Any) -> None:
    assistant = FAMILIES["llama"].build("sdpa", num_hidden_layers=1)
    expected = generate(llama, prompt(1, 80), assistant_model=assistant)
    with compiled(llama) as plans, compiled(assistant):
        actual = generate(llama, prompt(1, 80), assistant_model=assistant)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert any(sites(plan, FUSE) for plan in plans)
    assert_caches_close(actual.past_key_values, expected.past_key_values, 0.05, packed=2)


def test_multi_turn_goes_on_with_the_same_cache(llama: Any) -> None:
    turns = prompt(1, 70), prompt(1, 9, seed=1)

    def chat() -> tuple[Any, Any]:
        cache = DynamicCache(config=llama.config)
        first = generate(llama, turns[0], past_key_values=cache)
        return generate(llama, torch.cat([first.sequences, turns[1]], 1), past_key_values=cache), cache

    expected, theirs = chat()
    with compiled(llama) as plans:
        actual, ours = chat()
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert_caches_close(ours, theirs, 0.05, packed=2)
    assert sites(plans[-1], FUSE) == 2


def test_two_prompts_forked_from_one_prefix(llama: Any) -> None:
    """A copied cache and its original grow apart; neither writes into the other."""
    prefix, tails = prompt(1, 80), (prompt(1, 8, seed=1), prompt(1, 8, seed=2))

    def fork() -> tuple[list[torch.Tensor], list[Any]]:
        cache = DynamicCache(config=llama.config)
        run(llama, prefix, cache, splits=(80,))
        caches = [copy.deepcopy(cache), cache]
        return [run(llama, tail, c, splits=(4,)) for tail, c in zip(tails, caches, strict=True)], caches

    expected, theirs = fork()
    with compiled(llama):
        actual, ours = fork()
    for a, b, mine, its in zip(actual, expected, ours, theirs, strict=True):
        assert_close(a, b, 0.05, "logits")
        assert_caches_close(mine, its, 0.03, packed=2)


def test_cache_methods(llama: Any) -> None:
    """crop, batch_repeat_interleave, batch_select_indices and reorder_cache leave what they leave of a dense cache."""
    prefix, tail = prompt(2, 80), prompt(4, 6, seed=1)

    def edit() -> tuple[torch.Tensor, Any]:
        cache = DynamicCache(config=llama.config)
        run(llama, prefix, cache, splits=(80,))
        cache.crop(-9)
        cache.batch_repeat_interleave(3)
        cache.reorder_cache(torch.tensor([5, 0, 3, 2, 1, 4]))
        cache.batch_select_indices(torch.tensor([0, 1, 4, 5]))
        return run(llama, tail, cache, splits=(3,)), cache

    expected, theirs = edit()
    with compiled(llama):
        actual, ours = edit()
    assert_close(actual, expected, 0.05, "logits")
    assert_caches_close(ours, theirs, 0.05, packed=2)
    ours.reset()
    assert ours.get_seq_length() == 0


def test_without_a_cache_nothing_is_touched(llama: Any) -> None:
    ids = prompt(2, 40)
    with torch.no_grad():
        expected = llama(ids, use_cache=False).logits
    with compiled(llama) as plans:
        actual = llama(ids, use_cache=False).logits
    assert torch.equal(actual, expected)
    assert [site.action for plan in plans for site in plan.sites] == ["uncached", "uncached"]


def test_grad_is_refused(llama: Any) -> None:
    with compiled(llama), torch.enable_grad(), pytest.raises(Exception, match="inference only"):
        llama(prompt(1, 8))
