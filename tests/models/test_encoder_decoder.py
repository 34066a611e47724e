"""Encoder-decoder models: self attention grows a packed cache, cross attention reads one that the first call made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from tests.models.common import FAMILIES, assert_caches_close, assert_close, compiled, prompt, sites
from tqc.passes.plan import FUSE, PACK

PROMPT = 80


def source(name: str) -> dict[str, torch.Tensor]:
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 120, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": prompt(2, 70, seed=3)}


@torch.no_grad()
def decode(model: Any, name: str) -> tuple[torch.Tensor, Any]:
    encoded = model.get_encoder()(**source(name))
    ids, cache = prompt(2, PROMPT + 6), EncoderDecoderCache(DynamicCache(), DynamicCache())
    cuts = [0, PROMPT, *range(PROMPT + 1, PROMPT + 7)]
    steps = [ids[:, a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    return torch.cat(
        [model(encoder_outputs=encoded, decoder_input_ids=step, past_key_values=cache).logits for step in steps], 1
    ), cache


@pytest.mark.parametrize(
    "name, attn",
    [
        ("t5", "eager"),
        ("whisper", "sdpa"),
        *(
            pytest.param(name, attn, marks=pytest.mark.extended)
            for name, attn in (("t5", "sdpa"), ("bart", "eager"), ("bart", "sdpa"), ("whisper", "eager"))
        ),
    ],
)
def test_self_and_cross_attention(name: str, attn: str) -> None:
    model = FAMILIES[name].build(attn)
    expected, theirs = decode(model, name)
    with compiled(model) as plans:
        actual, ours = decode(model, name)
    assert sites(plans[0], PACK) == FAMILIES[name].packed
    assert sites(plans[-1], FUSE) == FAMILIES[name].packed
    assert_close(actual, expected, 0.1, "logits")
    assert_caches_close(ours, theirs, 0.1, packed=4)


@pytest.mark.parametrize("beams", [pytest.param(1, marks=pytest.mark.extended), 2])
def test_generate(beams: int) -> None:
    model = FAMILIES["t5"].build("sdpa")
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    expected = model.generate(**source("t5"), **settings)
    with compiled(model) as plans:
        actual = model.generate(**source("t5"), **settings)
    assert actual.tolist() == expected.tolist()
    assert any(sites(plan, FUSE) == 4 for plan in plans)
