"""`read` of the provider: the launch of `read_kernel`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.lowering.triton.read_kernels import read_kernel
from tqc.lowering.triton.tables import read_tables


def read(
    pages: Tensor, dense: Tensor, state: Tensor, length: int, spec: str, tables: Sequence[Tensor] | None = None
) -> Tensor:
    """As `tqc.ops.read`; `tables`, those of `read_tables`, are given where torch shall see the launch."""
    fmt = PackedFormat.parse(spec)
    batch, heads = dense.shape[:2]
    out = torch.empty(batch, heads, length, fmt.head_dim, dtype=dense.dtype, device=dense.device)
    if out.numel() == 0:
        return out
    # Where tokens are dropped, the first one that is held may be no sink, and may be the last one of its page.
    behind = max(length - fmt.sink_tokens, 0) if fmt.keep is None else length + PAGE_TOKENS - 1
    grid = (1 + triton.cdiv(behind, PAGE_TOKENS), batch * heads)
    kernel = read_kernel if tables is None else wrap_triton(read_kernel)
    matrix, levels = tables or read_tables(spec, dense.device)
    pages, dense = pages.contiguous(), dense.contiguous()
    warps = 8 if fmt.head_dim > 128 else 4
    stored = (pages, dense, dense.shape[2] * fmt.head_dim, state)
    kernel[grid](*stored, matrix, levels, out, length, pages.shape[2], spec, num_warps=warps)
    return out
