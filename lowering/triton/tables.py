"""Constants that kernels read from the device's memory: rotations, levels, scales to try. Made once for each format."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tqc.format import SCALE_STEPS, PackedFormat
from tqc.format.quantizer import SCALE_SEARCH


@cache
def attend_tables(k_spec: str, v_spec: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Of `attend_kernel`, for stored tokens of `dtype`: rotations of keys and values, their levels."""
    fmts, exact = [PackedFormat.parse(spec) for spec in (k_spec, v_spec)], dtype == torch.float32
    return *(scaled_rotation(fmt, device, exact) for fmt in fmts), *(fmt.levels(device) for fmt in fmts)


@cache
def append_tables(spec: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Of `append_kernel`: levels, boundaries between them, scales to try, the rotation."""
    fmt = PackedFormat.parse(spec)
    search = torch.tensor([2.0 ** (steps / SCALE_STEPS) for steps in SCALE_SEARCH]).to(device)
    return fmt.levels(device), fmt.boundaries(device), search, transposed_rotation(fmt, dtype, device)


@cache
def read_tables(spec: str, device: torch.device) -> tuple[Tensor, ...]:
    """Of `read_kernel`: the rotation, the levels."""
    fmt = PackedFormat.parse(spec)
    return transposed_rotation(fmt, torch.float32, device), fmt.levels(device)


@cache
def scaled_rotation(fmt: PackedFormat, device: torch.device, exact: bool) -> Tensor:
    """sqrt(head_dim) R: all signs for a Hadamard matrix of a power of two, so that float16 holds it exactly."""
    return (fmt.rotation_matrix(device) * fmt.head_dim**0.5).to(torch.float32 if exact else torch.float16)


def transposed_rotation(fmt: PackedFormat, dtype: torch.dtype, device: torch.device) -> Tensor:
    """R' over its `rotation_gain`, [head_dim, head_dim].

    A Hadamard matrix is all +-1 but for a factor. Made of powers of two it is exact in half precision, and so are the
    products of the matrix units with it, whose sums are float32.
    """
    matrix = fmt.rotation_matrix().T
    if not _exact_in_halves(fmt, dtype):
        return matrix.to(device).contiguous()
    # Balanced vectors come as sums of bfloat16 numbers. The interpreter, on a CPU, has no products of these.
    half = torch.bfloat16 if fmt.centred else dtype
    exact = torch.float32 if device.type == "cpu" else half
    return (matrix.sign() * 2.0 ** -(fmt.head_dim.bit_length() // 2)).to(device, exact).contiguous()


def rotation_gain(fmt: PackedFormat, dtype: torch.dtype) -> float:
    """The factor that products with `transposed_rotation` lack."""
    return 2**0.5 if _exact_in_halves(fmt, dtype) and fmt.head_dim.bit_length() % 2 == 0 else 1.0


def _exact_in_halves(fmt: PackedFormat, dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2 and fmt.rotation == "hadamard" and fmt.head_dim.bit_count() == 1
