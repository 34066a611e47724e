"""flex_attention: its mask function is run on all indices at once, so that packed caches see the same mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import DynamicCache

from tests.models.common import FAMILIES, assert_caches_close, assert_close, compiled, prompt, sites
from tests.passes.common import compiled as compiled_function
from tests.passes.common import error, packed, tensors
from tqc.passes.plan import DENSE, FUSE

TOKENS = 208


@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.extended), True])
def test_model(padded: bool) -> None:
    model = FAMILIES["llama"].build("flex_attention")
    # The same weights: outside of our graphs transformers compiles flex_attention itself, which fails on some CPUs.
    reference = FAMILIES["llama"].build("sdpa")
    ids = prompt(2, 84)
    theirs, ours = DynamicCache(config=model.config), DynamicCache(config=model.config)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :13] = 0

    def feed(model: Any, cache: DynamicCache) -> Tensor:
        cuts = [0, 80, 81, 82, 83, 84]
        return torch.cat(
            [
                model(ids[:, a:b], past_key_values=cache, attention_mask=mask[:, :b]).logits
                for a, b in zip(cuts, cuts[1:], strict=False)
            ],
            1,
        )

    with torch.no_grad():
        expected = feed(reference, theirs)
    with compiled(model) as plans:
        actual = feed(model, ours)
    assert sites([plan for plan in plans if plan.sites][-1], FUSE) == 2
    assert_close(actual[:, 13:], expected[:, 13:], 0.05, "logits")
    for layer in (*ours.layers, *theirs.layers):
        layer.keys, layer.values = layer.keys[:, :, 13:], layer.values[:, :, 13:]
    assert_caches_close(ours, theirs, 0.03)


def step(score_mod: Any, block_mask: BlockMask | None) -> Any:
    def run(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Any:
        keys, values = torch.cat([k_cache, k], dim=-2), torch.cat([v_cache, v], dim=-2)
        out = flex_attention(q, keys, values, score_mod, block_mask, enable_gqa=True)
        return out, keys, values

    return run


def causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return kv <= q + TOKENS - 8


def by_head(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return causal(b, h, q, kv) & (kv % (h + 2) != 1)


def softcap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return 2.0 * torch.tanh(score / 2.0)


def distance(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return score - 0.01 * (q - kv)


def blocks(mask_mod: Any, heads: int | None = None) -> BlockMask:
    return create_block_mask(mask_mod, 2, heads, 8, TOKENS, device="cpu")


def only_the_second_block() -> BlockMask:
    """A mask by blocks alone, without a function that says the same."""
    one, second = torch.ones(2, 1, 1, dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32).expand(2, 1, 1, 2)
    none = torch.zeros_like(one)
    return BlockMask.from_kv_blocks(none, second, one, second, seq_lengths=(8, TOKENS))


@pytest.mark.parametrize(
    "score_mod, mask, action",
    [
        (None, lambda: None, FUSE),
        (None, lambda: blocks(causal), FUSE),
        (None, lambda: blocks(by_head, 4), FUSE),
        (softcap, lambda: blocks(causal), FUSE),
        (distance, lambda: blocks(causal), DENSE),
    ],
    ids=["no mask", "causal", "by head", "softcap", "score_mod"],
)
def test_function(score_mod: Any, mask: Any, action: str) -> None:
    q, k, v, *caches = tensors(past=TOKENS - 8, new=8)
    k_cache, v_cache = packed(*caches)
    function = step(score_mod, mask())
    expected, keys, _ = function(q, k, v, k_cache.dequantize(), v_cache.dequantize())
    with compiled_function(function) as (fast, plans):
        out, new_keys, _ = fast(q, k, v, k_cache, v_cache)
    (site,) = [site for plan in plans for site in plan.sites]
    assert site.action == action, site
    assert action == FUSE or "score_mod" in site.reason
    assert error(out, expected) < 5e-3


def test_blocks_that_the_mask_function_does_not_show() -> None:
    q, k, v, *caches = tensors(past=TOKENS - 8, new=8)
    k_cache, v_cache = packed(*caches)
    keys, values = (torch.cat([x.dequantize(), y], 2)[:, :, 128:] for x, y in ((k_cache, k), (v_cache, v)))
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
    with compiled_function(step(None, only_the_second_block())) as (fast, plans):
        out, *_ = fast(q, k, v, k_cache, v_cache)
    assert [site.action for plan in plans for site in plan.sites] == [FUSE]
    assert error(out, expected) < 5e-3
