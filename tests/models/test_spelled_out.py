"""Models that spell attention out in ways of their own: `generate` is packed, and makes the tokens it makes dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.models.common import FAMILIES, assert_caches_close, compiled, prompt, sites
from tqc.passes.plan import FUSE, PACK

FAST = ["codegen", "gpt_neo", "bloom", "trocr"]
SLOW = ["xglm", "falcon_alibi", "mpt"]
NAMES = [*FAST, *(pytest.param(name, marks=pytest.mark.extended) for name in SLOW)]


def generate(model: Any, padded: int = 0, **settings: Any) -> Any:
    ids = prompt(2, 60)
    mask = torch.ones_like(ids)
    ids[0, :padded], mask[0, :padded] = 0, 0
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, **settings}
    return model.generate(ids, attention_mask=mask, output_logits=True, **settings)


@pytest.mark.parametrize("padded", [0, 9])
@pytest.mark.parametrize("name", NAMES)
def test_generate(name: str, padded: int) -> None:
    model = FAMILIES[name].build("eager")
    theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
    expected = generate(model, padded, past_key_values=theirs)
    with compiled(model) as plans:
        actual = generate(model, padded, past_key_values=ours)
    assert sites(plans[0], PACK) == 2 and all(sites(plan, FUSE) == 2 for plan in plans[1:])
    assert all(plan.rewritten["read_cache"] == 0 for plan in plans)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    difference = torch.stack(actual.logits) - torch.stack(expected.logits)
    assert difference.abs().max() < 0.05 * torch.stack(expected.logits).std()
    if not padded:  # what stands in the place of padding is nobody's business
        assert_caches_close(ours, theirs, 0.05, packed=2)


@pytest.mark.parametrize("name", ["gpt_neo", pytest.param("bloom", marks=pytest.mark.extended)])
def test_static_cache(name: str) -> None:
    """Masks of all kinds say which columns of a preallocated cache are visible."""
    model = FAMILIES[name].build("eager")

    def cache() -> Any:
        held = StaticCache(model.config, max_cache_len=80)
        held.early_initialization(2, 4, 16, torch.float32, torch.device("cpu"))
        return held

    expected = generate(model, past_key_values=cache(), disable_compile=True)
    with compiled(model) as plans:
        actual = generate(model, past_key_values=cache(), disable_compile=True)
    assert sites(plans[0], PACK) == 2 and sites(plans[-1], FUSE) == 2, [str(s) for p in plans for s in p.sites]
    assert actual.sequences.tolist() == expected.sequences.tolist()
