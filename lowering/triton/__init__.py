"""The CUDA provider: Triton kernels that decode pages in registers.

Under TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly: for tests. Nothing here waits for the device. Keys and
values that hold different tokens, which the reference refuses, therefore give NaNs.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from tqc.format import PackedFormat

NAME = "triton"
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
MIN_CAPABILITY = (8, 0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def supported() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'tqai-compiler[triton]')"
    import triton

    if triton.knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available() or torch.version.hip:
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return "needs a GPU of compute capability 8.0 or later, this one has {}.{}".format(*capability)
    return None
