"""Products of one or a few rows with a weight, as Inductor's own code instead of a BLAS call.

A decode step reads every weight once for a single row. The BLAS that torch calls for it on x86 reads them at a third of
the memory's bandwidth; a multiplication and a sum, which Inductor turns into one vectorized loop over all cores, reads
them at nearly all of it and takes the operations around it into the same loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tqc.torch_private import inductor_decompositions

# Beyond these many rows a matrix product is faster: the sum reads a weight once a row (from the caches if it fits).
MAX_ROWS = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}

aten = torch.ops.aten


def decompositions() -> dict[Any, Callable[..., Any]] | None:
    """Inductor's table of decompositions, with `mm` and `addmm` of few rows on the CPU as multiply and sum; None if
    this torch has no such table."""
    table = inductor_decompositions()
    if table is None:
        return None
    inductor_mm, inductor_addmm = table[aten.mm.default], table[aten.addmm.default]

    def mm(rows: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _few(rows, weight):
            return inductor_mm(rows, weight, *args, **kwargs)
        return _product(rows, weight).to(rows.dtype)

    def addmm(bias: Tensor, rows: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not _few(rows, weight) or bias.dtype != rows.dtype:
            return inductor_addmm(bias, rows, weight, *args, **kwargs)
        return (_product(rows, weight) + bias).to(rows.dtype)

    return {**table, aten.mm.default: mm, aten.addmm.default: addmm}


def _few(rows: Tensor, weight: Tensor) -> bool:
    """Whether sizes are constants and `rows` [n, in_features] few, for a `weight` [in_features, out_features]."""
    return (
        rows.device.type == "cpu"
        and rows.dtype == weight.dtype
        and all(isinstance(size, int) for size in (*rows.shape, *weight.shape))
        and 1 <= rows.shape[0] <= MAX_ROWS.get(rows.dtype, 0)
    )


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    return (rows.float().unsqueeze(2) * weight.float().unsqueeze(0)).sum(1)
