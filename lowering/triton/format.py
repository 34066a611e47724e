"""What kernels know at compile time of a packed format: the order of a tile's columns, and its levels as a table."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cache, cached_property

import numpy as np
import triton
import triton.language as tl

from tqc.format import PackedFormat, packed
from tqc.torch_private import no_modes

PAGE = tl.constexpr(packed.PAGE_TOKENS)
HEADER_BYTES = tl.constexpr(packed.HEADER_BYTES)
SCALE_NAN = tl.constexpr(packed.SCALE_NAN)
SCALE_STEPS = tl.constexpr(packed.SCALE_STEPS)
SCALE_ZERO = tl.constexpr(packed.SCALE_ZERO)
CENTRE_ZERO = tl.constexpr(packed.CENTRE_ZERO)
# Widest codes that are looked up by byte permutes.
PERMUTED_BITS = tl.constexpr(4)
# Offset of the logarithm and number of coefficients for wider codes. The error added is 1/180 of the coding error at 8
# bits, 1/1000 or less below.
_POLYNOMIAL = {5: (2.5, 4), 6: (2.5, 6), 7: (3.5, 6), 8: (5.0, 6)}


@dataclass(frozen=True)
class TileFormat(PackedFormat):
    """A format with what its tiles need at compile time. Hashed and compared by the format's own fields."""

    @classmethod
    @cache
    def of(cls, fmt: PackedFormat) -> TileFormat:
        return cls(*astuple(fmt))

    @cached_property
    def narrowest(self) -> int:
        """Width of the narrowest plane."""
        return self.bits & -self.bits

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one token in the narrowest plane."""
        return self.head_dim * self.narrowest // 8

    @cached_property
    def row_words(self) -> int:
        """32-bit words that hold `row_bytes`, a power of two."""
        return triton.next_power_of_2(-(-self.row_bytes // 4))

    @cached_property
    def columns(self) -> int:
        """Columns of a tile: a power of two, at least head_dim."""
        return 8 // self.narrowest * 4 * self.row_words

    @cached_property
    def plane_shift(self) -> tuple[int, ...]:
        """Place in a code of the plane of each width."""
        return tuple(next((shift for w, shift, _ in self.planes if w == width), 0) for width in range(9))

    @cached_property
    def plane_offset(self) -> tuple[int, ...]:
        """Place in a page of the plane of each width, in bytes."""
        return tuple(next((offset for w, _, offset in self.planes if w == width), 0) for width in range(9))

    @cached_property
    def level_table(self) -> tuple[int | float, ...]:
        """Words of a byte table (low bytes of 8 float16 levels, then high ones), or coefficients for wide codes."""
        with no_modes():  # torch compiles kernels while it traces
            levels = self.levels().double().numpy()
        if self.bits <= PERMUTED_BITS.value:
            # Of 16 levels the negative half, from 0 on; fewer are repeated, the upper bits of their codes being zeros.
            halves = np.resize(-levels[-8:] if self.bits == 4 else levels, 8).astype(np.float16).view(np.uint16)
            parts = [(halves & 255).astype(np.uint8), (halves >> 8).astype(np.uint8)]
            return tuple(int(word) for part in parts for word in part.view(np.int32))
        offset, count = _POLYNOMIAL[self.bits]
        half = len(levels) // 2
        positive = levels[half:]
        # The density of the levels times their spacing weighs the squared error as it occurs.
        weight = np.sqrt(np.exp(-(positive**2) / 2) * np.gradient(positive))
        powers = np.log2(half - np.arange(half) - 0.5 + offset)[:, None] ** np.arange(count)
        solution = np.linalg.lstsq(powers * weight[:, None], positive * weight, rcond=None)[0]
        return tuple(float(c) for c in solution)

    @cached_property
    def log_offset(self) -> float:
        """The polynomial's variable is log2(log_offset - distance of the code from the middle)."""
        return 2.0 ** (self.bits - 1) + _POLYNOMIAL[self.bits][0]


@triton.constexpr_function
def tile_format(spec: str):
    """The `TileFormat` of a spec. Kernels take the spec: it is what torch can keep in a graph."""
    # Inductor copies the text of this function to where it compiles a kernel: what it needs is imported here.
    from tqc.lowering.triton import format as module

    return module.TileFormat.of(module.PackedFormat.parse(spec))
