"""Attention in every spelling that is known is fused; what is not known stays dense, is right, and says why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.common import compiled, error, only_site, packed, tensors
from tqc.cache.packed_tensor import PackedTensor
from tqc.passes.plan import DENSE, FUSE, PACK, READ

TOKENS = 81
Scores = Callable[[Tensor, Tensor, Tensor], Tensor]


def repeat(x: Tensor, times: int = 2) -> Tensor:
    batch, heads, tokens, head_dim = x.shape
    return x[:, :, None, :, :].expand(batch, heads, times, tokens, head_dim).reshape(batch, -1, tokens, head_dim)


def step(attention: Callable[..., Any]) -> Callable[..., Any]:
    def run(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Tensor) -> Any:
        keys, values = torch.cat([k_cache, k], dim=-2), torch.cat([v_cache, v], dim=-2)
        return attention(q, keys, values, *rest), keys, values

    return run


def mask_bool() -> Tensor:
    mask = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    mask[0, ..., :11] = False
    return mask


def mask_float() -> Tensor:
    return torch.where(mask_bool(), 0.0, torch.finfo(torch.float32).min)


def bias() -> Tensor:
    return torch.randn(1, 4, 1, TOKENS, generator=torch.Generator().manual_seed(1))


def softmax(scores: Tensor) -> Tensor:
    return F.softmax(scores, dim=-1, dtype=torch.float32)


def sinks_softmax(q: Tensor, scores: Tensor, sinks: Tensor) -> Tensor:
    wide = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)], dim=-1)
    wide = wide - wide.max(dim=-1, keepdim=True).values
    return F.softmax(wide, dim=-1, dtype=wide.dtype)[..., :-1]


SPELLINGS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "sdpa, gqa": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), ()),
    "sdpa, repeated, mask, scale": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, repeat(k), repeat(v), m, scale=0.1),
        (mask_bool(),),
    ),
    "sdpa, two-dimensional mask": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, enable_gqa=True),
        (mask_bool()[0, 0],),
    ),
    "sdpa, repeat_interleave": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)),
        (),
    ),
    "eager": (
        lambda q, k, v, m: softmax(q @ repeat(k).transpose(2, 3) * 0.25 + m).to(q.dtype) @ repeat(v),
        (mask_float(),),
    ),
    "division, dropout in eval": (
        lambda q, k, v: F.dropout(softmax(torch.matmul(q, repeat(k).mT) / 4.0), 0.1, training=False) @ repeat(v),
        (),
    ),
    "two masks": (
        lambda q, k, v, b, m: softmax(b + q @ repeat(k).transpose(-1, -2) + m) @ repeat(v),
        (bias(), mask_float()),
    ),
    "masked_fill": (
        lambda q, k, v, m: softmax((q @ repeat(k).transpose(2, 3)).masked_fill(~m, -math.inf)) @ repeat(v),
        (mask_bool(),),
    ),
    "bias and masked_fill": (
        lambda q, k, v, m, b: softmax((q @ repeat(k).transpose(2, 3) + b).masked_fill(~m, -math.inf)) @ repeat(v),
        (mask_bool(), bias()),
    ),
    "softcap": (
        lambda q, k, v, m: softmax(torch.tanh(q @ repeat(k).transpose(2, 3) * 0.25 / 3.0) * 3.0 + m) @ repeat(v),
        (mask_float(),),
    ),
    "sinks": (
        lambda q, k, v, s, m: sinks_softmax(q, q @ repeat(k).transpose(2, 3) * 0.25 + m, s) @ repeat(v),
        (torch.tensor([1.0, -1.0, 3.0, 0.5]), mask_float()),
    ),
    "upcast": (
        lambda q, k, v: softmax(q.float() @ repeat(k).float().transpose(2, 3)).to(v.dtype) @ repeat(v),
        (),
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_fused(name: str) -> None:
    attention, rest = SPELLINGS[name]
    q, k, v, *caches = tensors()
    k_cache, v_cache = packed(*caches)
    expected, keys, values = step(attention)(q, k, v, k_cache.dequantize(), v_cache.dequantize(), *rest)
    with compiled(step(attention)) as (fast, plans):
        out, new_keys, new_values = fast(q, k, v, k_cache, v_cache, *rest)
    assert only_site(plans).action == FUSE, only_site(plans)
    assert isinstance(new_keys, PackedTensor) and isinstance(new_values, PackedTensor)
    assert error(out, expected) < 2e-3
    assert error(new_keys.dequantize(), keys) < 1e-6 and error(new_values.dequantize(), values) < 1e-6


def uses_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = softmax(q @ repeat(k).transpose(2, 3))
    return weights @ repeat(v) + weights.sum()


NOT_UNDERSTOOD: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], str]] = {
    "weights returned": (
        lambda q, k, v: (lambda w: (w @ repeat(v), w))(softmax(q @ repeat(k).transpose(2, 3))),
        (),
        "the attention weights are an output",
    ),
    "weights used": (uses_weights, (), "used outside of the attention"),
    "dropout": (
        lambda q, k, v: F.dropout(softmax(q @ repeat(k).transpose(2, 3)), 0.0001, training=True) @ repeat(v),
        (),
        "dropped out with p = 0.0001",
    ),
    "scale is a tensor": (
        lambda q, k, v, s: softmax(q @ repeat(k).transpose(2, 3) * s) @ repeat(v),
        (torch.tensor(0.3),),
        "scaled by a tensor",
    ),
    "relu of scores": (
        lambda q, k, v: softmax(torch.relu(q @ repeat(k).transpose(2, 3))) @ repeat(v),
        (),
        "pass through relu",
    ),
    "masked with a finite number": (
        lambda q, k, v, m: softmax((q @ repeat(k).transpose(2, 3)).masked_fill(~m, -3.0)) @ repeat(v),
        (mask_bool(),),
        "not set to the lowest value",
    ),
    "tanh that is no softcap": (
        lambda q, k, v: softmax(torch.tanh(q @ repeat(k).transpose(2, 3) / 2.0) * 3.0) @ repeat(v),
        (),
        "not a softcap",
    ),
    "a column that is no sink": (
        lambda q, k, v, c: softmax(torch.cat([q @ repeat(k).transpose(2, 3), c], -1))[..., :-1] @ repeat(v),
        (torch.ones(2, 4, 1, 1),),
        "not one sink per head",
    ),
    "is_causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        (),
        "is_causal over a longer cache",
    ),
    "different repeats": (
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), repeat(v)[:, [0, 2, 1, 3]]),
        (),
        "keys are repeated 2 times and values 1 times",
    ),
    "keys changed after the cache": (
        lambda q, k, v: F.scaled_dot_product_attention(q, repeat(2 * k), repeat(v)),
        (),
        "computed from what the cache holds",
    ),
    "one column of mask": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, repeat(k), repeat(v), m),
        (torch.zeros(2, 1, 1, 1),),
        "one column for all keys",
    ),
    "a window of the cache": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, -20:], v[:, :, -20:], enable_gqa=True),
        (),
        "a sliding window",
    ),
}


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_right_and_says_why(name: str) -> None:
    attention, rest, reason = NOT_UNDERSTOOD[name]
    q, k, v, *caches = tensors()
    k_cache, v_cache = packed(*caches)
    torch.manual_seed(0)
    expected, keys, values = step(attention)(q, k, v, k_cache.dequantize(), v_cache.dequantize(), *rest)
    with compiled(step(attention)) as (fast, plans):
        torch.manual_seed(0)
        out, new_keys, _ = fast(q, k, v, k_cache, v_cache, *rest)
    site = only_site(plans)
    assert site.action in (DENSE, READ) and reason in (site.reason or "; ".join(site.notes)), site
    for a, b in zip(out, expected, strict=True) if isinstance(out, tuple) else [(out, expected)]:
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert error(new_keys.dequantize(), keys) < 1e-6, "the cache stays packed all the same"


def test_a_router_is_no_attention() -> None:
    def route(x: Tensor, w: Tensor) -> Tensor:
        return torch.softmax(x @ w, dim=-1) @ w.mT

    with compiled(route) as (fast, plans):
        x, w = torch.randn(2, 3, 5, 8), torch.randn(8, 6)
        torch.testing.assert_close(fast(x, w), route(x, w))
    assert [site.action for plan in plans for site in plan.sites] in ([], [DENSE])


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def prefill(q: Tensor, k: Tensor, v: Tensor) -> Any:
    empty = torch.tensor([], dtype=k.dtype)
    keys, values = torch.cat([empty, k], dim=-2), torch.cat([empty, v], dim=-2)
    return F.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True), keys, values


SHAPES = [
    *((1, 64, torch.float32), (2, 80, torch.float32), (3, 96, torch.bfloat16)),
    *((1, 128, torch.float16), (2, 256, torch.float32)),
]


@pytest.mark.parametrize("batch, head_dim, dtype", SHAPES)
def test_shapes_and_dtypes(batch: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k, v, *_ = tensors(batch, past=1, new=80, head_dim=head_dim, dtype=dtype)
    expected, keys, values = prefill(q, k, v)
    with compiled(prefill) as (fast, plans):
        out, k_cache, v_cache = fast(q, k, v)
    assert only_site(plans).action == PACK and torch.equal(out, expected)
    assert error(k_cache.dequantize(), keys) < 0.02 and error(v_cache.dequantize(), values) < 0.02
    q, k, v = (x[:, :, -1:] for x in (q, k, v))
    expected, *_ = step(plain)(q, k, v, keys, values)
    with compiled(step(plain)) as (fast, plans):
        out, *_ = fast(q, k, v, k_cache, v_cache)
    assert only_site(plans).action == FUSE
    assert error(out, expected) < 0.03


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits(bits: int) -> None:
    """The error of the output falls with each bit, and the cache is coded in just that many."""
    q, k, v, *caches = tensors(head_dim=64, past=200)
    expected, *_ = step(plain)(q, k, v, *caches)
    with compiled(step(plain), bits_k=bits, bits_v=bits) as (fast, plans):
        out, keys, _ = fast(q, k, v, *packed(*caches, bits_k=bits, bits_v=bits))
    assert only_site(plans).action == FUSE and keys.fmt.bits == bits
    assert error(out, expected) < 3.5 * 2.0**-bits + 0.02


def test_an_odd_head_dim_stays_dense() -> None:
    q, k, v, *_ = tensors(past=1, new=40, head_dim=20)
    with compiled(prefill) as (fast, plans):
        out, keys, _ = fast(q, k, v)
    assert "not a multiple of 8" in only_site(plans).reason
    assert torch.equal(keys, k) and torch.equal(out, prefill(q, k, v)[0])
