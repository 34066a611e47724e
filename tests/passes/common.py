"""One attention step as a function of tensors, compiled alone: small graphs for what passes must find and refuse."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.common import OPTIONS
from tqc import report
from tqc.cache.packed_tensor import PackedTensor, pack
from tqc.config import Config
from tqc.passes.plan import Plan, Site


def tensors(
    batch: int = 2,
    heads: int = 2,
    query_heads: int = 4,
    past: int = 80,
    new: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """query, key, value, and dense past keys and values."""
    generator = torch.Generator().manual_seed(0)

    def normal(count: int, tokens: int) -> Tensor:
        return torch.randn(batch, count, tokens, head_dim, generator=generator).to(dtype)

    return normal(query_heads, new), normal(heads, new), normal(heads, new), normal(heads, past), normal(heads, past)


def packed(k_cache: Tensor, v_cache: Tensor, **options: Any) -> tuple[PackedTensor, PackedTensor]:
    k_fmt, v_fmt = Config.from_options({**OPTIONS, **options}).formats(k_cache.shape[-1], v_cache.shape[-1])
    return pack(k_cache, k_fmt), pack(v_cache, v_fmt)


@contextmanager
def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """The function through the backend, and the list its plans are put in."""
    torch._dynamo.reset()
    with report.collect() as plans, torch.no_grad():
        yield torch.compile(function, backend="tqai", options={**OPTIONS, **options}), plans
    torch._dynamo.reset()


def only_site(plans: list[Plan]) -> Site:
    assert len(plans) == 1 and len(plans[0].sites) == 1
    return plans[0].sites[0]


def notes(plans: list[Plan]) -> str:
    return "; ".join(note for plan in plans for site in plan.sites for note in site.notes)


def error(actual: Tensor, expected: Tensor) -> float:
    """The worst vector's error, relative to a typical vector's length."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    difference = (actual.float() - expected.float()).norm(dim=-1).max()
    return float(difference / expected.float().norm(dim=-1).mean())
