"""The CPU provider: C++ kernels for x86-64 with AVX-512 or AVX2, for 64-bit ARM with dot products, and plain vector
code for any other CPU; compiled at first use (see `build`)."""

from __future__ import annotations

from typing import Any

import torch

from tqc.format import PackedFormat
from tqc.lowering.cpu.limits import DTYPES, MAX_HEAD_DIM
from tqc.lowering.provider import Provider


def supports(k_fmt: PackedFormat, v_fmt: PackedFormat, dtype: torch.dtype, device_type: str) -> str | None:
    if device_type != "cpu":
        return f"runs on cpu, not on {device_type}"
    if dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, not {dtype}"
    for fmt in (k_fmt, v_fmt):
        if fmt.head_dim > MAX_HEAD_DIM:
            return f"takes a head_dim of at most {MAX_HEAD_DIM}, not {fmt.head_dim}"
    return None


def load() -> Any:
    from tqc.lowering.cpu import kernels

    kernels.loaded()
    return kernels


PROVIDER = Provider("cpu", rank=10, supports=supports, load=load, folded=True, grouped=True, chains=True)
