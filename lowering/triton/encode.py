"""Encoding of pages on the device, step by step as `tqc.format.quantizer` does it.

A program holds the 32 tokens of one page as a tile [32, D], with D = head_dim padded to a power of two; padded elements
are zeros. `fmt` is a `TileFormat`, a compile-time constant.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tqc.format import quantizer
from tqc.lowering.triton.format import PAGE, SCALE_NAN, SCALE_STEPS, SCALE_ZERO

SCALES_TRIED = tl.constexpr(len(quantizer.SCALE_SEARCH))
SCALE_SEARCH_BITS = tl.constexpr(quantizer.SCALE_SEARCH_BITS)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
# Adding and taking off 1.5 * 2**23 rounds a float32 to the nearest integer, halves to even.
ROUND = tl.constexpr(12582912.0)


@triton.jit
def all_finite(y):
    """Whether each row of `y` holds neither NaN nor infinity."""
    return tl.max((tl.abs(y) < float("inf")).to(tl.int32) ^ 1, axis=1) == 0


@triton.jit
def finite_mean(y, good):
    """Mean of the rows of `y` that are `good`, 0 where none is."""
    count = tl.maximum(tl.sum(good.to(tl.float32)), 1.0)
    return tl.sum(tl.where(good[:, None], y, 0.0) / count, axis=0)


@triton.jit
def _scale_code(scale, base):
    ratio = scale / tl.where(base > 0, base, 1.0)
    code = (-SCALE_STEPS * tl.log2(tl.where(ratio > 0, ratio, 1.0)) + ROUND) - ROUND
    code = tl.minimum(tl.maximum(code, 0.0), SCALE_NAN - 1.0)
    return tl.where(ratio > 0, code, SCALE_ZERO * 1.0).to(tl.int32)


@triton.jit
def _nearest_level(t, levels, boundaries, fmt: tl.constexpr):
    """The level nearest to each `t`. Both tables are symmetric about 0."""
    HALF: tl.constexpr = 1 << (fmt.bits - 1)
    size = tl.abs(t)
    level = tl.zeros(t.shape, tl.float32) + tl.load(levels + HALF)
    for i in range(1, HALF):
        level = tl.where(size > tl.load(boundaries + HALF - 1 + i), tl.load(levels + HALF + i), level)
    return tl.where(t > 0, level, -level)


@triton.jit
def _nearest_code(t, boundaries, fmt: tl.constexpr):
    """The code of that level, int32."""
    HALF: tl.constexpr = 1 << (fmt.bits - 1)
    size = tl.abs(t)
    code = tl.zeros(t.shape, tl.int32)
    for i in range(1, HALF):
        code += (size > tl.load(boundaries + HALF - 1 + i)).to(tl.int32)
    return tl.where(t > 0, HALF + code, HALF - 1 - code)


@triton.jit
def _store_plane(out, codes, width: tl.constexpr, shift: tl.constexpr, head_dim: tl.constexpr):
    """Pack bits shift .. shift + width of `codes` [rows, D] to `out`, as `tqc.format.pack_plane` does."""
    ROWS: tl.constexpr = codes.shape[0]
    D: tl.constexpr = codes.shape[1]
    STRIDE: tl.constexpr = head_dim * width // 8
    BYTES: tl.constexpr = triton.next_power_of_2(STRIDE)
    byte = tl.arange(0, BYTES)
    packed = tl.zeros([ROWS, BYTES], tl.int32)
    for field in tl.static_range(8 // width):
        element = tl.minimum(field * STRIDE + byte, D - 1)
        value = tl.gather(codes, tl.broadcast_to(element[None, :], [ROWS, BYTES]), 1)
        packed |= ((value >> shift) & ((1 << width) - 1)) << (field * width)
    row = tl.arange(0, ROWS)[:, None]
    tl.store(out + row * STRIDE + byte[None, :], packed.to(tl.uint8), mask=(byte < STRIDE)[None, :])


@triton.jit
def encode_page(page, y, centre, levels, boundaries, search, fmt: tl.constexpr):
    """Write one page from its rotated tokens `y` [32, D] and the head's centre [D]."""
    D: tl.constexpr = y.shape[1]
    inside = tl.arange(0, D) < fmt.head_dim
    token = tl.arange(0, PAGE)
    r = y
    if fmt.centred:
        r = r - centre[None, :]
    good = all_finite(r)
    step = 0.0
    if fmt.centred:
        mean = finite_mean(r, good)
        step = tl.max(tl.abs(mean)) / 7.0
        code = mean / tl.where(step > 0, step, 1.0)
        code = tl.where(tl.abs(code) < 8.0, (code + ROUND) - ROUND, 0.0)
        r = r - (code * step)[None, :]
        # Between the centre and the planes there may be a gap, of zeros.
        CENTRE: tl.constexpr = triton.next_power_of_2(fmt.planes[0][2] - fmt.centre_offset)
        gap = tl.arange(0, CENTRE)
        zeros = tl.zeros([CENTRE], tl.uint8)
        in_gap = (gap >= fmt.head_dim // 2) & (gap < fmt.planes[0][2] - fmt.centre_offset)
        tl.store(page + fmt.centre_offset + gap, zeros, mask=in_gap)
        _store_plane(page + fmt.centre_offset, (code + 8.0).to(tl.int32)[None, :], 4, 0, fmt.head_dim)
    r = tl.where(good[:, None], r, 0.0)

    # |r| by way of its largest coordinate, so that squares neither overflow nor vanish. From here on r is in its unit.
    peak = tl.max(tl.abs(r), axis=1)
    r = r / tl.maximum(peak, TINY)[:, None]
    scale = peak * tl.sqrt(tl.sum(r * r, axis=1) / fmt.head_dim)
    base = tl.max(scale)
    code = _scale_code(scale, base)
    scale = tl.where(code == SCALE_ZERO, 0.0, tl.exp2(-code.to(tl.float32) / SCALE_STEPS) * base)
    best = tl.full([PAGE], -1.0, tl.float32)
    unit = tl.zeros([PAGE], tl.float32)
    factor = tl.zeros([PAGE], tl.float32)
    for i in range(SCALES_TRIED if fmt.bits <= SCALE_SEARCH_BITS else 1):
        tried = peak / tl.maximum(scale * tl.load(search + i), TINY)
        level = _nearest_level(r * tried[:, None], levels, boundaries, fmt)
        level = tl.where(inside[None, :], level, 0.0)
        product, square = tl.sum(r * level, axis=1), tl.sum(level * level, axis=1)
        fit = product * product / square
        better = fit > best
        best = tl.where(better, fit, best)
        unit = tl.where(better, tried, unit)
        factor = tl.where(better, product / square, factor)
    codes = _nearest_code(r * unit[:, None], boundaries, fmt)
    scale = tl.maximum(peak * factor, 0.0)
    base = tl.max(scale)
    code = tl.where(good, _scale_code(scale, base), SCALE_NAN)

    header = page.to(tl.pointer_type(tl.float32))
    tl.store(header, base)
    tl.store(header + 1, step)
    tl.store(header + 2 + tl.arange(0, 2), tl.zeros([2], tl.float32))
    tl.store(page + fmt.scales_offset + token, code.to(tl.uint8))
    for i in tl.static_range(len(fmt.planes)):
        _store_plane(page + fmt.planes[i][2], codes, fmt.planes[i][0], fmt.planes[i][1], fmt.head_dim)
