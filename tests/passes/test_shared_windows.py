"""Two layers that look at one sliding window in the same call: the second must not miss what the first has dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.common import OPTIONS, normal
from tqc import report
from tqc.cache.packed_tensor import PackedTensor
from tqc.passes.plan import FUSE

KEEP = 60


def step(queries: list[Tensor], key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor) -> Any:
    keys, values = torch.cat([k_cache, key], dim=-2), torch.cat([v_cache, value], dim=-2)
    outputs = [scaled_dot_product_attention(query, keys, values, attn_mask=mask) for query in queries]
    return outputs, keys[:, :, -KEEP:], values[:, :, -KEEP:]


def test_the_second_layer_sees_the_whole_window() -> None:
    torch._dynamo.reset()
    compiled: Any = torch.compile(step, backend="tqai", options=OPTIONS)
    ours = theirs = (torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16))
    with report.collect() as plans, torch.no_grad():
        for number, count in enumerate((90, 1, 5, 20, 1)):
            new = [normal(1, 2, count, 16, seed=4 * number + part) for part in range(4)]
            columns = ours[0].shape[2] + count
            mask = torch.ones(count, columns, dtype=torch.bool).tril(columns - count)
            outputs, *ours = compiled(new[:2], *new[2:], *ours, mask)
            expected, *theirs = step(new[:2], *new[2:], *theirs, mask)
            for actual, wanted in zip(outputs, expected, strict=True):
                torch.testing.assert_close(actual, wanted, atol=0.03, rtol=0)
            assert all(isinstance(cache, PackedTensor) and cache.shape[2] == KEEP for cache in ours)
    assert [site.action for site in plans[-1].sites] == [FUSE, FUSE]
