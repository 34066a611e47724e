"""Every family: prefill, then decode through the packed cache, against the same model dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.models.common import FAMILIES, assert_caches_close, assert_close, compiled, prompt, run, sites
from tqc.passes.plan import DENSE, FUSE, PACK, READ

PROMPT = 80
FAST = [
    *(("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("qwen2", "sdpa"), ("gemma3", "sdpa")),
    *(("gemma2", "eager"), ("gpt_oss", "eager")),
]
SLOW = [
    *((name, attn) for name in ("mistral", "qwen3", "phi3", "olmo2", "mixtral") for attn in ("sdpa", "eager")),
    *((name, attn) for name in ("gpt_neox", "opt") for attn in ("sdpa", "eager")),
    *(("qwen2", "eager"), ("gemma3", "eager"), ("gpt2", "eager"), ("gptj", "eager")),
]
LATENT = [("deepseek_v2", "sdpa"), ("deepseek_v3", "eager")]


def params(fast: list[Any], slow: list[Any]) -> list[Any]:
    return [
        *(pytest.param(*case) for case in fast),
        *(pytest.param(*case, marks=pytest.mark.extended) for case in slow),
    ]


def compare(model: Any, batch: int = 2, logits: float = 0.05, caches: float = 0.03, **options: Any) -> list[Any]:
    ids = prompt(batch, PROMPT + 12)
    theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
    expected = run(model, ids, theirs, splits=(PROMPT, PROMPT + 7))
    with compiled(model, **options) as plans:
        actual = run(model, ids, ours, splits=(PROMPT, PROMPT + 7))
    packed = sum(site.action in (FUSE, READ) for site in plans[-1].sites)
    assert_close(actual[:, :PROMPT], expected[:, :PROMPT], 1e-3, "logits of the prefill, which reads no packed cache")
    assert_close(actual[:, PROMPT:], expected[:, PROMPT:], logits, "logits of the decode")
    assert_caches_close(ours, theirs, caches, packed)
    return plans


@pytest.mark.parametrize("name, attn", params(FAST, SLOW))
def test_decode_matches_dense(name: str, attn: str) -> None:
    family = FAMILIES[name]
    plans = compare(family.build(attn))
    assert sites(plans[0], PACK) == family.packed
    for plan in plans:
        assert sites(plan, DENSE) == family.dense
    for plan in plans[1:]:
        assert sites(plan, FUSE) == family.packed


@pytest.mark.parametrize("name, attn", params(LATENT[:1], LATENT[1:]))
def test_latents_are_packed_and_decoded(name: str, attn: str) -> None:
    """In place of keys and values these models cache what they are expanded from."""
    plans = compare(FAMILIES[name].build(attn))
    assert [site.action for site in plans[0].sites] == [PACK] * 2
    for plan in plans[1:]:
        assert [site.action for site in plan.sites] == [READ] * 2


def test_a_window_no_longer_than_what_stays_dense_says_so() -> None:
    model = FAMILIES["gemma2"].build("eager", sliding_window=37)
    with compiled(model) as plans:
        run(model, prompt(1, 50), DynamicCache(config=model.config), splits=(50,))
    assert [site.action for site in plans[0].sites] == [PACK, DENSE, PACK]
    assert plans[0].sites[1].reason == (
        "the cache keeps 36 tokens (a sliding window), no more than the 36 that stay dense"
    )


@pytest.mark.parametrize(
    "splits",
    [*(pytest.param(splits, marks=pytest.mark.extended) for splits in ((20, 21), (300,), (150, 260))), (59, 60, 130)],
)
def test_a_window_goes_on_for_long(splits: tuple[int, ...]) -> None:
    """It fills up token by token or at once, takes chunks longer than itself, and drops whole pages many times."""
    model, ids = FAMILIES["mistral"].build("sdpa"), prompt(2, 330)
    theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
    expected = run(model, ids, theirs, splits=splits)
    with compiled(model) as plans:
        actual = run(model, ids, ours, splits=splits)
    assert all(site.action in (PACK, FUSE) for plan in plans for site in plan.sites)
    assert_close(actual, expected, 0.05, "logits")
    assert_caches_close(ours, theirs, 0.03, packed=2)
    assert all(layer.keys.shape[2] == 59 for layer in ours.layers)


def test_large_key_offsets_survive() -> None:
    """Keys with a large bias, as Qwen2 has them, at 3 bits: the centre carries the offset."""
    compare(FAMILIES["qwen2"].build("sdpa"), bits_k=3, bits_v=8, logits=1.0, caches=0.6)


@pytest.mark.parametrize("bits, tolerance", [(3, 0.8), pytest.param(4, 0.5, marks=pytest.mark.extended)])
def test_few_bits(bits: int, tolerance: float) -> None:
    compare(FAMILIES["llama"].build("sdpa"), bits_k=bits, bits_v=bits, logits=tolerance, caches=1.1 * 2.0**-bits * 4)


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["sdpa", pytest.param("eager", marks=pytest.mark.extended)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.extended)])
def test_half_precision(attn: str, dtype: torch.dtype) -> None:
    plans = compare(FAMILIES["llama"].build(attn, dtype), logits=0.1)
    assert sites(plans[-1], FUSE) == 2


@pytest.mark.parametrize("batch", [1, pytest.param(3, marks=pytest.mark.extended)])
def test_batch_sizes(batch: int) -> None:
    assert sites(compare(FAMILIES["llama"].build("sdpa"), batch)[-1], FUSE) == 2
