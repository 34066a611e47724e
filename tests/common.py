"""Small caches, and the options that compiled ones are made with."""

from __future__ import annotations

from typing import Any

import torch

from tqc import ops

# Few recent tokens, so that 80 tokens make pages; 8 bits, so that only mistakes show.
OPTIONS: dict[str, Any] = {
    "provider": "reference",
    "rest": "eager",
    "residual_window": 32,
    "sink_tokens": 4,
    "bits_k": 8,
    "bits_v": 8,
}


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def empty(fmt, heads=2, batch=1, pages=12, dtype=torch.float32):
    """Storage of a cache without tokens, full of junk where nothing may be read."""
    dense = torch.full((batch, heads, fmt.dense_rows, fmt.head_dim), 77.0, dtype=dtype)
    page = torch.full((batch, heads, pages, fmt.page_bytes), 0xAB, dtype=torch.uint8)
    return page, dense, torch.zeros(2, dtype=torch.int64)


def filled(x, fmt, **kwargs):
    parts = empty(fmt, x.shape[1], x.shape[0], dtype=x.dtype, **kwargs)
    ops.append(*parts, x, None, str(fmt))
    return parts
