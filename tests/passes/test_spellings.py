"""Attention spelled out of parts, in any combination: all are fused, and equal what was written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.common import compiled, error, only_site, packed, tensors
from tqc.cache.packed_tensor import PackedTensor
from tqc.passes.plan import DENSE, FUSE, PACK

BATCH, HEADS, NEW, PAST, DIM = 2, 4, 3, 61, 16
COLUMNS = PAST + NEW
LOWEST = torch.finfo(torch.float32).min
Mask = Callable[[Tensor, Tensor, Tensor], Tensor]


def keep() -> Tensor:
    mask = torch.ones(NEW, COLUMNS, dtype=torch.bool).tril(PAST).expand(BATCH, 1, -1, -1).clone()
    mask[0, ..., :11] = False
    return mask


def bias() -> Tensor:
    return torch.randn(BATCH * HEADS, 1, COLUMNS, generator=torch.Generator().manual_seed(1))


def split(x: Tensor) -> Tensor:
    return x.view(BATCH, HEADS, *x.shape[1:]) if x.dim() == 3 else x


def flat(x: Tensor) -> Tensor:
    return x.reshape(BATCH * HEADS, *x.shape[2:])


MASKS: dict[str, Mask] = {
    "none": lambda s, m, b: s,
    "added": lambda s, m, b: s + torch.where(m, 0.0, LOWEST),
    "added in place": lambda s, m, b: s.add_(torch.where(m, 0.0, LOWEST)),
    "where": lambda s, m, b: torch.where(m, s, torch.tensor(LOWEST, dtype=s.dtype)),
    "where it is dropped": lambda s, m, b: torch.where(~m, -math.inf, s),
    "where, as a method": lambda s, m, b: s.where(m, torch.full((), LOWEST)),
    "filled": lambda s, m, b: s.masked_fill(~m, -1e9),
    "filled in place": lambda s, m, b: s.masked_fill_(~m, LOWEST),
    "added, then a floor": lambda s, m, b: torch.max(s + torch.where(m, 0.0, LOWEST), torch.full((), LOWEST)),
    "clamped": lambda s, m, b: (s + torch.where(m, 0.0, -math.inf)).clamp(min=LOWEST),
    "bias of heads": lambda s, m, b: torch.where(m, s + split(b), LOWEST),
}
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda s: s,
    "times": lambda s: s * 0.25,
    "times, in place": lambda s: s.mul_(0.25),
    "divided": lambda s: s / 4.0,
    "divided by a tensor": lambda s: s / torch.tensor(4.0),
    "divided in place": lambda s: s.div_(4.0),
    "from the left": lambda s: 0.25 * s,
}
PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k, b: torch.matmul(q, k.transpose(-1, -2)),
    "mT": lambda q, k, b: q @ k.mT,
    "einsum": lambda q, k, b: torch.einsum("bhqd,bhkd->bhqk", q, k),
    "einsum, transposed": lambda q, k, b: torch.einsum("bhqd, bhdk -> bhqk", q, k.transpose(2, 3)),
    "bmm": lambda q, k, b: torch.bmm(flat(q), flat(k).transpose(1, 2)),
    "bmm, transposed before": lambda q, k, b: torch.bmm(
        q.reshape(-1, NEW, DIM), k.transpose(-1, -2).reshape(-1, DIM, COLUMNS).float()
    ),
    "three dimensions": lambda q, k, b: flat(q).matmul(flat(k).permute(0, 2, 1)),
    "three dimensions, einsum": lambda q, k, b: torch.einsum("bqd,bkd->bqk", flat(q), flat(k)),
    "tokens first": lambda q, k, b: torch.bmm(
        q.permute(2, 0, 1, 3).reshape(NEW, -1, DIM).transpose(0, 1), flat(k).transpose(1, 2)
    ),
    "baddbmm": lambda q, k, b: b.baddbmm(batch1=flat(q), batch2=flat(k).mT, beta=0.5, alpha=0.7),
    "baddbmm of nothing": lambda q, k, b: torch.baddbmm(
        torch.empty(BATCH * HEADS, NEW, COLUMNS), flat(q), flat(k).mT, beta=0, alpha=0.7
    ),
    "baddbmm of zeros": lambda q, k, b: torch.baddbmm(
        torch.zeros(BATCH * HEADS, NEW, COLUMNS), flat(q), flat(k).transpose(1, 2), alpha=0.7
    ),
}
SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda s: F.softmax(s, dim=-1),
    "float32": lambda s: torch.softmax(s, -1, dtype=torch.float32),
    "last dimension": lambda s: s.softmax(s.dim() - 1),
    "module": lambda s: torch.nn.Softmax(dim=-1)(s),
}
DROPOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda w: w,
    "in eval": lambda w: F.dropout(w, 0.1, training=False),
    "module": lambda w: torch.nn.Dropout(0.1).eval()(w),
    "of nothing": lambda w: F.dropout(w, p=0.0, training=True),
    "torch's": lambda w: torch.dropout(w, 0.1, False),
    "division": lambda w: w / (1 - 0.0),
    "factor": lambda w: 1.0 * w,
}
SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda w, v: split(w) @ v,
    "bmm": lambda w, v: torch.bmm(flat(split(w)), flat(v)),
    "bmm, split": lambda w, v: torch.bmm(flat(split(w)), flat(v)).view(BATCH, HEADS, NEW, DIM),
    "einsum": lambda w, v: torch.einsum("bhqk,bhkd->bhqd", split(w), v),
    "einsum, three dimensions": lambda w, v: torch.einsum("...qk,...kd->...qd", flat(split(w)), flat(v)),
}
ORDERS = ("scale first", "mask first")
PARTS = (PRODUCTS, MASKS, SCALES, ORDERS, SOFTMAXES, DROPOUTS, SUMS)


def attention(parts: tuple[str, ...]) -> Callable[..., Any]:
    product, mask, scale, order, softmax, dropout, weighted = parts

    def step(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, m: Tensor, b: Tensor) -> Any:
        keys, values = torch.cat([k_cache, k], dim=-2), torch.cat([v_cache, v], dim=-2)
        scores = PRODUCTS[product](q, keys, b)
        for what in order.split(" first")[0], "mask" if order == "scale first" else "scale":
            scores = SCALES[scale](scores) if what == "scale" else MASKS[mask](split(scores), m, b)
        if product.startswith("b"):
            scores = flat(split(scores))
        weights = DROPOUTS[dropout](SOFTMAXES[softmax](scores)).to(values.dtype)
        return SUMS[weighted](weights, values), keys, values

    return step


def check(parts: tuple[str, ...], dtype: torch.dtype = torch.float32) -> None:
    q, k, v, *caches = tensors(BATCH, HEADS, HEADS, PAST, NEW, DIM, dtype)
    k_cache, v_cache = packed(*caches)
    function, rest = attention(parts), (keep(), bias())
    expected, keys, values = function(q, k, v, k_cache.dequantize(), v_cache.dequantize(), *rest)
    with compiled(function) as (fast, plans):
        out, new_keys, new_values = fast(q, k, v, k_cache, v_cache, *rest)
    if "in place" in parts[1] and "written into" in only_site(plans).reason:  # a view of the scores, which others read
        assert parts[0].startswith("b") and error(out, expected) < 2e-3
        return
    assert only_site(plans).action == FUSE, only_site(plans)
    assert plans[0].rewritten["read_cache"] == 0, "nothing decodes the cache for what nobody reads"
    assert isinstance(new_keys, PackedTensor) and isinstance(new_values, PackedTensor)
    assert error(out, expected) < 2e-3
    assert error(new_keys.dequantize(), keys) < 1e-6 and error(new_values.dequantize(), values) < 1e-6


# Each part of each kind at least once.
EVERY_PART = [tuple(sorted(part)[at % len(part)] for part in PARTS) for at in range(max(map(len, PARTS)))]


@pytest.mark.parametrize("parts", EVERY_PART, ids=", ".join)
def test_each_part(parts: tuple[str, ...]) -> None:
    check(parts)


@pytest.mark.extended
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.tuples(*(st.sampled_from(sorted(part)) for part in PARTS)))
def test_any_combination(parts: tuple[str, ...]) -> None:
    check(parts)


@pytest.mark.parametrize("mask, product", [("added", "matmul"), ("where", "bmm"), ("filled", "baddbmm")])
def test_a_mask_before_the_scale_still_hides(mask: str, product: str) -> None:
    """A hidden key's score stays as good as minus infinity when it is divided: its value must not matter."""
    q, k, v, *caches = tensors(BATCH, HEADS, HEADS, PAST, NEW, DIM)
    caches[1][0, :, :11] = 1e4
    function = attention((product, mask, "divided", "mask first", "float32", "none", "matmul"))
    k_cache, v_cache = packed(*caches, bits_k=8, bits_v=8)
    with compiled(function) as (fast, plans):
        out, *_ = fast(q, k, v, k_cache, v_cache, keep(), bias())
    assert only_site(plans).action == FUSE and out.abs().max() < 10


class Preallocated(torch.nn.Module):
    """Attention to a cache of full length, which a mask says how much of is visible."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.mask = mask
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(BATCH, HEADS, 128, DIM))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        self.k_cache.index_copy_(2, positions, k)
        self.v_cache.index_copy_(2, positions, v)
        scores = torch.bmm(flat(q), flat(self.k_cache).mT)
        scores = split(MASKS[self.mask](split(scores), keep, keep) * 0.25)
        return torch.bmm(flat(F.softmax(scores, dim=-1)), flat(self.v_cache))


@pytest.mark.parametrize("mask", ["added", "where", "where it is dropped", "filled in place"])
def test_masks_of_a_preallocated_cache(mask: str) -> None:
    module, dense = Preallocated(mask), Preallocated(mask)
    causal = torch.ones(128, 128, dtype=torch.bool).tril()[None, None]
    with compiled(module) as (fast, plans):
        for start, count in ((0, 80), (80, 1), (81, 1)):
            q, k, v, *_ = tensors(BATCH, HEADS, HEADS, 1, count, DIM)
            positions = torch.arange(start, start + count)
            expected = dense(q, k, v, positions, causal[:, :, positions])
            out = fast(q, k, v, positions, causal[:, :, positions])
            assert error(out, expected) < 0.05
    assert [plan.sites[0].action for plan in plans] == [PACK] + [FUSE] * (len(plans) - 1) and len(plans) > 1
    assert isinstance(module.k_cache, PackedTensor) and error(module.k_cache.dequantize(), dense.k_cache) < 0.05


def refused(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def step(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, m: Tensor, b: Tensor) -> Any:
        keys, values = torch.cat([k_cache, k], dim=-2), torch.cat([v_cache, v], dim=-2)
        return function(q, keys, values, m, b), keys, values

    return step


def written_by_its_old_name(q: Tensor, k: Tensor, v: Tensor, m: Tensor, b: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.masked_fill_(~m, LOWEST)
    return F.softmax(scores, dim=-1) @ v


def written_through_a_view(q: Tensor, k: Tensor, v: Tensor, m: Tensor, b: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[:, :1].mul_(0.0)
    return F.softmax(scores * 0.25, dim=-1) @ v


def read_as_well(q: Tensor, k: Tensor, v: Tensor, m: Tensor, b: Tensor) -> Tensor:
    scores = q @ k.mT
    scaled = scores.mul_(0.25)
    return F.softmax(scaled, dim=-1) @ v + scores.mean()


def grouped_otherwise(q: Tensor, k: Tensor, v: Tensor, m: Tensor, b: Tensor) -> Tensor:
    scores = torch.bmm(flat(q), flat(k).mT).view(HEADS, BATCH, NEW, COLUMNS)
    scores = scores + torch.where(m.transpose(0, 1), 0.0, LOWEST)
    return torch.bmm(F.softmax(scores, dim=-1).view(-1, NEW, COLUMNS), flat(v))


def softmax(scores: Tensor) -> Tensor:
    return F.softmax(scores, dim=-1)


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "filled with what is not lowest": (
        lambda q, k, v, m, b: softmax(torch.where(m, q @ k.mT, -5.0)) @ v,
        "not set to the lowest value",
    ),
    "filled with what is not lowest once divided": (
        lambda q, k, v, m, b: softmax(torch.where(m, q @ k.mT, -1e9) / 1e8) @ v,
        "not set to the lowest value",
    ),
    "filled from another tensor": (
        lambda q, k, v, m, b: softmax(torch.where(m, q @ k.mT, split(b))) @ v,
        "not set to the lowest value",
    ),
    "a mask times a negative number": (
        lambda q, k, v, m, b: softmax((q @ k.mT + split(b)) * -0.5) @ v,
        "multiplied by -0.5",
    ),
    "a mask in the softcap": (
        lambda q, k, v, m, b: softmax(torch.tanh((q @ k.mT + split(b)) / 3.0) * 3.0) @ v,
        "a mask comes before the softcap",
    ),
    "weights times two": (lambda q, k, v, m, b: (softmax(q @ k.mT) * 2.0) @ v, "pass through mul"),
    "weights divided by a half": (lambda q, k, v, m, b: (softmax(q @ k.mT) / 0.5) @ v, "pass through truediv"),
    "scores divided by a tensor of the call": (
        lambda q, k, v, m, b: softmax(q @ k.mT / b[0, 0, 0]) @ v,
        "scaled by a tensor",
    ),
    "a floor that is seen": (lambda q, k, v, m, b: softmax((q @ k.mT).clamp(min=-1.0)) @ v, "pass through clamp"),
    "batch and heads the other way round": (grouped_otherwise, "in different ways"),
    "scores that are read once they are written": (read_as_well, "written into"),
    "scores that are written and keep their name": (written_by_its_old_name, "written into"),
    "scores that are written through a view": (written_through_a_view, "written into"),
    "values of other heads": (
        lambda q, k, v, m, b: softmax(torch.bmm(flat(q), flat(k).mT)) @ flat(v.transpose(0, 1).reshape(v.shape)),
        "",
    ),
    "an einsum over heads": (
        lambda q, k, v, m, b: torch.einsum("bhqk,bhkd->bqhd", softmax(q @ k.mT), v),
        "",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, reason = REFUSED[name]
    q, k, v, *caches = tensors(BATCH, HEADS, HEADS, PAST, NEW, DIM)
    k_cache, v_cache = packed(*caches)
    dense = (k_cache.dequantize(), v_cache.dequantize())
    expected, keys, values = refused(function)(q, k, v, *dense, keep(), bias())
    with compiled(refused(function)) as (fast, plans):
        out, new_keys, new_values = fast(q, k, v, k_cache, v_cache, keep(), bias())
    for site in plans[0].sites:
        assert site.action == DENSE and reason in site.reason, site
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    for new, old in ((new_keys, keys), (new_values, values)):
        assert error(new.dequantize() if isinstance(new, PackedTensor) else new, old) < 1e-6


@pytest.mark.parametrize("product, order", [("matmul", "mask first"), ("bmm", "scale first")])
def test_half_precision(product: str, order: str) -> None:
    """A mask of float16 keeps hiding what it hides when it is scaled in float32."""
    q, k, v, *caches = tensors(BATCH, HEADS, HEADS, PAST, NEW, DIM, torch.float16)
    k_cache, v_cache = packed(*caches)

    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor, b: Tensor) -> Tensor:
        mask = torch.where(m, 0.0, torch.finfo(torch.float16).min).to(q.dtype)
        scores = split(PRODUCTS[product](q, k, b))
        scores = (scores + mask) / 4.0 if order == "mask first" else scores / 4.0 + mask
        return softmax(scores + split(b).half()) @ v

    expected, *_ = refused(function)(q, k, v, k_cache.dequantize(), v_cache.dequantize(), keep(), bias())
    with compiled(refused(function)) as (fast, plans):
        out, *_ = fast(q, k, v, k_cache, v_cache, keep(), bias())
    assert only_site(plans).action == FUSE
    assert error(out, expected) < 0.02
