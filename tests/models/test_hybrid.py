"""Models whose layers are not all alike: recurrent layers beside attention, layers that share another one's keys."""

from __future__ import annotations

import pytest
from transformers import DynamicCache

from tests.models.common import FAMILIES, assert_caches_close, assert_close, compiled, prompt, run, sites
from tqc.passes.plan import FUSE


@pytest.mark.parametrize(
    "name",
    [
        *("lfm2", "qwen3_next"),
        *(pytest.param(name, marks=pytest.mark.extended) for name in ("jamba", "bamba", "gemma3n")),
    ],
)
def test_attention_layers_are_packed(name: str) -> None:
    model = FAMILIES[name].build("sdpa")
    ids = prompt(1, 86)
    theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
    expected = run(model, ids, theirs)
    with compiled(model) as plans:
        actual = run(model, ids, ours)
    assert sites(plans[-1], FUSE) == FAMILIES[name].packed
    assert_close(actual, expected, 0.15, "logits")
    # Gemma 3n's last two layers attend to the caches of the first two.
    assert_caches_close(ours, theirs, 0.03, packed=2 if name == "gemma3n" else FAMILIES[name].packed)
