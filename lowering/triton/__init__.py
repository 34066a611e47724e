"""The CUDA provider: Triton kernels that decode pages in registers and never wait for the device.

Keys and values that hold different tokens, which the reference refuses, therefore give NaNs. With TRITON_INTERPRET=1
the functions also take CPU tensors, slowly: for tests.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from tqc.format import PackedFormat
from tqc.lowering.provider import Provider, Unavailable

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
MIN_CAPABILITY = (8, 0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(k_fmt: PackedFormat, v_fmt: PackedFormat, dtype: torch.dtype, device_type: str) -> str | None:
    if device_type != "cuda":
        return f"runs on cuda, not on {device_type}"
    if dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, not {dtype}"
    for fmt in (k_fmt, v_fmt):
        if not MIN_HEAD_DIM <= fmt.head_dim <= MAX_HEAD_DIM:
            return f"takes a head_dim of {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, not {fmt.head_dim}"
    for name in ("sink_tokens", "residual_window", "keep"):
        if getattr(k_fmt, name) != getattr(v_fmt, name):
            return f"takes one {name} for keys and values, not {getattr(k_fmt, name)} and {getattr(v_fmt, name)}"
    return None


def load() -> Any:
    if not torch.cuda.is_available() or torch.version.hip:
        raise Unavailable("there is no CUDA device")
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        raise Unavailable("needs a GPU of compute capability 8.0 or later, this one has {}.{}".format(*capability))
    if find_spec("triton") is None:
        raise Unavailable("triton is not installed (pip install 'tqai-compiler[triton]')")
    from tqc.lowering.triton import kernels

    return kernels


PROVIDER = Provider("triton", rank=0, supports=supports, load=load, pairs=True, waits_for_device=False)
