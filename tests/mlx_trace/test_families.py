"""Model families of mlx-lm with packed caches, float and 4-bit weights, against the dense model at 8 bits."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="needs mlx and mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from tests.mlx_trace.models import build  # noqa: E402
from tests.mlx_trace.test_sessions import FINE, largest, run  # noqa: E402
from tqc import compile_mlx  # noqa: E402

LONG = {"sliding_window": 60}
extended = pytest.mark.extended
# With how many layers packed; a choice of experts may turn on the last bit, so routers choose all.
FAMILIES: list[tuple[str, dict[str, Any], int]] = [
    ("llama", {}, 4),
    ("qwen2", {}, 4),
    ("qwen3", {}, 4),
    ("qwen3_moe", {"num_experts_per_tok": 4}, 4),
    ("gemma2", {}, 4),
    ("gemma3_text", LONG, 4),
    ("phi3", {}, 4),
    ("mistral", LONG, 4),
    ("gpt_oss", {**LONG, "num_experts_per_tok": 4}, 4),
    ("deepseek_v3", {}, 4),
]


QUICK = [("llama", 4), ("gemma3_text", None), ("gpt_oss", None), ("deepseek_v3", None)]
CASES = [
    pytest.param(*family, bits, id=f"{family[0]}-{bits}", marks=[] if (family[0], bits) in QUICK else extended)
    for family in FAMILIES
    for bits in (None, 4)
]


@pytest.mark.parametrize("name, changes, packed, bits", CASES)
def test_logits_and_caches(name: str, changes: dict[str, Any], packed: int, bits: int | None) -> None:
    model, plain = build(name, **changes), build(name, **changes)
    if bits:
        for held in (model, plain):
            nn.quantize(held, group_size=32, bits=bits)
    compile_mlx(model, strict=True, **FINE)
    # gemma3's norms double what they get, random as they are: 8 bits move its logits by 4 %.
    limit = 0.08 if name == "gemma3_text" else 0.03
    ours, own = make_prompt_cache(model), make_prompt_cache(plain)
    for at, lengths in ((0, (100,)), (100, (1, 1, 36)), (138, (1,))):
        expected = run(plain, own, *lengths, at=at)
        error = run(model, ours, *lengths, at=at) - expected
        assert mx.sqrt(mx.square(error).mean() / mx.square(expected).mean()).item() < limit
    held = [(cache, dense) for cache, dense in zip(ours, own, strict=True) if hasattr(cache, "placement")]
    assert len(held) == packed
    for cache, dense in held:
        assert cache.placement.packed == 128
        keys, values = cache.keys_and_values()
        if not hasattr(dense, "max_size"):
            expected = dense.keys[:, :, : dense.offset], dense.values[:, :, : dense.offset]
            for made, part in zip((keys, values), expected, strict=True):
                assert largest(made, part) < limit * mx.abs(part).max().item()
