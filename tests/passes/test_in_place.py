"""A packed cache that is written in ways no pass fuses: the caller's tensor holds what a dense one would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.common import compiled, error, only_site, packed, tensors
from tqc.cache.packed_tensor import PackedTensor
from tqc.passes.plan import FUSE

WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "scaled": lambda cache, new: cache.mul_(2),
    "a view of it": lambda cache, new: cache[:, :, 5:6].copy_(new),
    "along its length": lambda cache, new: cache.index_copy_(2, torch.tensor([50]), new),
    "twice": lambda cache, new: (cache.index_copy_(2, torch.tensor([50]), new), cache.add_(1)),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_kept_and_seen(name: str, caplog: pytest.LogCaptureFixture) -> None:
    _, new, _, keys, values = tensors()

    def step(cache: Tensor, new: Tensor) -> Tensor:
        before = cache.sum(-1)
        WRITES[name](cache, new)
        return before + cache.amax(-1)

    cache, _ = packed(keys, values)
    dense = cache.dequantize()
    expected = step(dense, new)
    with compiled(step) as (fast, _):
        actual = fast(cache, new)
    assert isinstance(cache, PackedTensor) and error(actual, expected) < 0.02
    assert error(cache.dequantize(), dense) < 0.02
    assert any("packs it anew" in line for line in caplog.messages) == (name != "along its length")


def longer_than_stored(dense: Tensor, cache: PackedTensor, length: int) -> tuple[Tensor, PackedTensor]:
    """A cache with room for more tokens, and the dense one."""
    zeros = dense.new_zeros(*dense.shape[:2], length - dense.shape[2], dense.shape[3])
    cache.packed_storage.reserve(length)
    return torch.cat([dense, zeros], 2), PackedTensor(cache.packed_storage, length)


@pytest.mark.parametrize("grows", [True, False])
def test_attention_counts_the_zeros_behind_what_is_stored(grows: bool) -> None:
    query, key, value, keys, values = tensors()

    def step(query: Tensor, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor) -> Any:
        if grows:
            k_cache, v_cache = torch.cat([k_cache, key], 2), torch.cat([v_cache, value], 2)
        return F.scaled_dot_product_attention(query, k_cache, v_cache, enable_gqa=True), k_cache, v_cache

    pairs = zip((keys, values), packed(keys, values), strict=True)
    (keys, k_cache), (values, v_cache) = (longer_than_stored(dense, cache, 130) for dense, cache in pairs)
    expected, longer, _ = step(query, key, value, keys, values)
    with compiled(step) as (fast, plans):
        actual, longer_packed, _ = fast(query, key, value, k_cache, v_cache)
    assert only_site(plans).action == FUSE
    assert error(actual, expected) < 0.02 and error(longer_packed.dequantize(), longer) < 0.02
    assert k_cache.packed_storage.length == 80 and error(k_cache.dequantize(), keys) < 0.02


def test_a_write_spares_a_longer_cache_of_the_same_prefix() -> None:
    query, key, value, keys, values = tensors()

    def step(query: Tensor, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        k_cache[:, :, 70:71], v_cache[:, :, 70:71] = key, value
        return F.scaled_dot_product_attention(query, k_cache[:, :, :71], v_cache[:, :, :71], enable_gqa=True)

    k_cache, v_cache = packed(keys, values)
    longer = [torch.cat([cache, new], 2) for cache, new in ((k_cache, key), (v_cache, value))]
    kept = [cache.dequantize() for cache in longer]
    expected = step(query, key, value, keys, values)
    with compiled(step) as (fast, plans):
        assert error(fast(query, key, value, k_cache, v_cache), expected) < 0.02
    assert only_site(plans).action == FUSE
    assert all(torch.equal(cache.dequantize(), before) for cache, before in zip(longer, kept, strict=True))
