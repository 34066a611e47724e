"""Formats with groups by the CPU kernels for pages, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from tests.common import normal
from tests.models.common import FAMILIES, assert_caches_close, compiled, prompt, run
from tqc import ops
from tqc.format import Groups, PackedFormat
from tqc.lowering.select import choose, providers
from tqc.ops import Planes, planes

EVICT, TIERED = Groups(64, ((1, 4),)), Groups(128, ((1, 4), (2, 2)))
GROUPS = pytest.mark.parametrize("groups", [EVICT, TIERED], ids=["evict", "tiered"])


def formats(groups, folded=False):
    keys = PackedFormat(32, groups.tiers[0][1], True, 4, 160, groups=groups)
    return keys, replace(keys, centred=False, folded=folded)


@pytest.fixture(scope="module")
def kernels():
    provider, _ = choose(*formats(EVICT), torch.float32, "cpu")
    assert provider.name == "cpu" and provider.chains and not provider.pairs
    return provider.kernels


def test_other_providers_say_that_they_cannot():
    with pytest.raises(ValueError, match="triton: takes no groups of tokens|triton: runs on cuda"):
        choose(*formats(EVICT), torch.float32, "cuda", "triton")
    assert choose(*formats(EVICT), torch.float32, "cpu", "reference")[0] is providers()[-1]


@GROUPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_append_makes_the_same_blocks(kernels, groups, dtype):
    score = normal(2, 2, 500, seed=1)
    for fmt in formats(groups):
        new = normal(2, 2, 500, 32, seed=2, dtype=dtype)
        made = [Planes.empty(2, 2, fmt, dtype, "cpu", 500) for _ in range(2)]
        for append, cache in zip((kernels.append, planes.append), made, strict=True):
            for begin, end in ((0, 240), (240, 241), (241, 420), (420, 500)):
                first = int(cache.state[1])
                append(*cache.parts, new[:, :, begin:end], None, fmt.spec, score[..., first:])
        ours, theirs = made
        assert ours.state.tolist() == theirs.state.tolist() and int(ours.state[1]) > 300
        assert torch.equal(ours.pages[..., fmt.places_offset :], theirs.pages[..., fmt.places_offset :])
        assert (ours.pages != theirs.pages).float().mean() < 0.01  # last bits of scales, codes between two levels
        torch.testing.assert_close(kernels.read(*ours.parts, 500, fmt.spec), ops.read(theirs), rtol=0.1, atol=0.1)


@GROUPS
@pytest.mark.parametrize("folded", [False, True])
def test_attention_over_each_tier_is_joined_to_attention_over_all(kernels, groups, folded):
    k_fmt, v_fmt = formats(groups, folded)
    dense = normal(2, 2, 400, 32), normal(2, 2, 400, 32, seed=1)
    for length in (400, 90, 3):
        keys, values = (
            ops.pack(x[:, :, :length], fmt.spec, score=normal(2, 2, 400, seed=2))
            for x, fmt in zip(dense, (k_fmt, v_fmt), strict=True)
        )
        for count in (1, 3):
            query, key, value = (normal(2, heads, count, 32, seed=5 + heads) for heads in (4, 2, 2))
            mask = normal(2, 1, count, length + count, seed=11) > 0  # holes everywhere
            added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
            sinks = normal(4, seed=9)
            cases = [(None, None, True), (mask, sinks, False)] if length == 400 else [(None, sinks, True)]
            for attn_mask, logits, causal in (*cases, *([(added, None, True)] if length == 400 else [])):
                args = (query, *keys.parts, *values.parts, key, value, attn_mask, logits, None, 0.3, 0.0, causal)
                out, lse = kernels.attend(*args, k_fmt.spec, v_fmt.spec)
                expected, expected_lse = planes.attend(*args, k_fmt.spec, v_fmt.spec)
                torch.testing.assert_close(out, expected, rtol=0.03, atol=0.03)  # products of bytes
                torch.testing.assert_close(lse, expected_lse, rtol=0.01, atol=0.01)
                assert out.shape == expected.shape and out.transpose(1, 2).is_contiguous()


@pytest.mark.extended
def test_a_model_gets_the_same_cache_as_by_the_reference():
    model, ids = FAMILIES["llama"].build(), prompt(length=260)
    caches = {}
    for provider in ("cpu", "reference"):
        caches[provider] = DynamicCache()
        with compiled(model, strategy="evict", residual_window=96, provider=provider, scorer="knorm") as plans:
            run(model, ids, caches[provider], (200, 257))
        assert {site.kernel for plan in plans for site in plan.sites} == {provider}
    plain = DynamicCache()
    for index, layer in enumerate(caches["reference"].layers):
        plain.update(layer.keys.dequantize(), layer.values.dequantize(), index)
    assert_caches_close(caches["cpu"], plain, 0.05, packed=2)
