"""The reference implementation as a provider: runs everywhere, in plain torch."""

from __future__ import annotations

import torch

from tqc.format import PackedFormat
from tqc.ops.planes import append, attend, read

__all__ = ["FOLDED", "NAME", "accepts", "append", "attend", "read", "supported"]

NAME = "reference"
FOLDED = True


def supported() -> str | None:
    return None


def accepts(k_fmt: PackedFormat, v_fmt: PackedFormat, dtype: torch.dtype, device_type: str) -> str | None:
    return None
