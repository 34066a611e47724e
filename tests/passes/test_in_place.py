"""A packed cache that is written in ways no pass fuses: the caller's tensor holds what a dense one would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes.common import compiled, error, packed, tensors
from tqc.cache.packed_tensor import PackedTensor

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
