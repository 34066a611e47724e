"""StaticCache: made inside the compiled prefill, before it, or by an eager prefill; the caller's tensors get packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

from tests.models.common import FAMILIES, assert_caches_close, assert_close, compiled, layers, prompt, run, sites
from tqc.passes.plan import FUSE, PACK

CAPACITY = 128


def make(model: Any, early: bool = False) -> StaticCache:
    cache = StaticCache(model.config, max_cache_len=CAPACITY)
    if early:
        cache.early_initialization(2, model.config.num_key_value_heads, 16, torch.float32, torch.device("cpu"))
    return cache


@pytest.mark.parametrize("attn", ["sdpa", pytest.param("eager", marks=pytest.mark.extended)])
@pytest.mark.parametrize("when", ["lazy", "early", "eager prefill"])
def test_static_cache(attn: str, when: str) -> None:
    model = FAMILIES["llama"].build(attn)
    ids, theirs, ours = prompt(2, 88), make(model), make(model, when == "early")
    expected = run(model, ids, theirs)
    start = 0
    if when == "eager prefill":
        start = 80
        run(model, ids[:, :80], ours)
    before = [layer.keys for layer in layers(ours)]
    with compiled(model) as plans:
        actual = run(model, ids[:, start:], ours, splits=(80 - start or 1,))
    assert sites(plans[-1], FUSE) == 2
    assert_close(actual, expected[:, start:], 0.05, "logits")
    assert_caches_close(ours, theirs, 0.05, packed=2)
    for tensor, layer in zip(before, layers(ours), strict=bool(before)):
        assert tensor is layer.keys, "the caller's own tensor object is the packed one"


@pytest.mark.slow
def test_reset_and_use_again() -> None:
    model = FAMILIES["llama"].build("sdpa")
    theirs, ours = make(model), make(model)

    def twice(cache: StaticCache) -> torch.Tensor:
        run(model, prompt(2, 90), cache)
        cache.reset()
        return run(model, prompt(2, 50, seed=1), cache, splits=(40,))

    expected = twice(theirs)
    with compiled(model):
        actual = twice(ours)
    assert_close(actual, expected, 0.1, "logits")
    assert_caches_close(ours, theirs, 0.05, packed=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "attn", "splits"),
    [
        ("gemma2", "eager", (86, 116, 146)),
        pytest.param("mistral", "sdpa", (40, 70, 100), marks=pytest.mark.extended),
        pytest.param("gemma3", "sdpa", (40, 59), marks=pytest.mark.extended),
        pytest.param("gpt_oss", "eager", (60,), marks=pytest.mark.extended),
    ],
)
def test_sliding_layers_are_packed(family: str, attn: str, splits: tuple[int, ...]) -> None:
    """Prompts that fill the window of 60 tokens or not, and chunks and tokens that roll it on."""
    model = FAMILIES[family].build(attn)
    ids = prompt(2, splits[-1] + 3)
    theirs, ours = (StaticCache(model.config, max_cache_len=160) for _ in range(2))
    expected = run(model, ids, theirs, splits)
    with compiled(model) as plans:
        actual = run(model, ids, ours, splits)
        assert_caches_close(ours, theirs, 0.05, packed=len(layers(ours)))
        ours.reset()
        again = run(model, ids[:, :97], ours, (90,))
    assert_close(actual, expected, 0.1, "logits")
    assert_close(again, expected[:, :97], 0.1, "logits of a second prompt")
    assert {site.action for plan in plans for site in plan.sites} == {PACK, FUSE}


@pytest.mark.slow
def test_chunks() -> None:
    """Several tokens at once behind a packed prefix, as chunked prefill feeds them."""
    model = FAMILIES["llama"].build("sdpa")
    ids, theirs, ours = prompt(2, 100), make(model), make(model)
    expected = run(model, ids, theirs, splits=(40, 80, 97))
    with compiled(model) as plans:
        actual = run(model, ids, ours, splits=(40, 80, 97))
    assert sites(plans[-1], FUSE) == 2
    assert_close(actual, expected, 0.05, "logits")
    assert_caches_close(ours, theirs, 0.05, packed=2)
