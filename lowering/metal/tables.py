"""The numbers that kernels read of a format, one array: levels, boundaries, and the rotation by its factors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from tqc.format import PackedFormat


@dataclass(frozen=True)
class Rotation:
    """R as (H (x) C) S: Hadamard matrix, mixing matrix, signs times 1 / sqrt(order of H).

    Attributes:
        mixed: order of C, 1 where there is none.
        signed: whether there is S.
    """

    mixed: int
    signed: bool

    @staticmethod
    def of(fmt: PackedFormat) -> Rotation:
        if fmt.rotation == "haar":
            return Rotation(fmt.head_dim, False)
        odd = fmt.head_dim
        while odd % 2 == 0:
            odd //= 2
        return Rotation(odd, True)


def offsets(fmt: PackedFormat) -> dict[str, int]:
    """Where the parts of `table` begin."""
    return {"boundaries": 2**fmt.bits, "signs": 2 * 2**fmt.bits, "mix": 2 * 2**fmt.bits + fmt.head_dim}


@cache
def table(spec: str) -> np.ndarray:
    """float32 [n]: levels, ascending; boundaries between them and a 0; signs [head_dim]; the mixing matrix, by rows."""
    fmt = PackedFormat.parse(spec)
    matrix, rotation = fmt.rotation_matrix().double().numpy(), Rotation.of(fmt)
    signs, mix = np.ones(fmt.head_dim), matrix
    if rotation.signed:
        # The first row of H, and of C, is one positive number.
        gain = np.sqrt(rotation.mixed / fmt.head_dim)
        signs = np.sign(matrix[0]) * gain
        mix = matrix[: rotation.mixed, : rotation.mixed] / signs[: rotation.mixed]
    parts = [fmt.levels().numpy(), fmt.boundaries().numpy(), [0.0], signs, mix.ravel()]
    return np.concatenate([np.asarray(part, np.float32) for part in parts])
