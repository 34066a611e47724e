"""Pages of the packed format in ops of MLX: the same as `tqc.format.quantizer`, which says what each step is for."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.format.packed import CENTRE_LIMIT, CENTRE_ZERO, HEADER_BYTES, SCALE_NAN, SCALE_STEPS, SCALE_ZERO, scale_table
from tqc.format.quantizer import SCALE_SEARCH, SCALE_SEARCH_BITS
from tqc.mlx_trace.arrays import array_of

_TINY = 1.1754943508222875e-38


@cache
def _tables(head_dim: int, bits: int, kind: str, seed: int) -> dict[str, mx.array]:
    fmt = PackedFormat(head_dim, bits, False, rotation=kind, seed=seed)
    made = {"levels": fmt.levels(), "boundaries": fmt.boundaries(), "rotation": fmt.rotation_matrix()}
    arrays = {name: array_of(tensor) for name, tensor in made.items()} | {"scales": array_of(scale_table())}
    mx.eval(arrays)  # what a trace asks for first must outlive it
    return arrays


def table(fmt: PackedFormat, name: str) -> mx.array:
    """Float32 numbers that go with a format: "levels", "boundaries", "rotation", "scales"."""
    return _tables(fmt.head_dim, fmt.bits, fmt.rotation, fmt.seed)[name]


def rotate(x: mx.array, fmt: PackedFormat) -> mx.array:
    """R x for each vector of `x` [..., head_dim], float32."""
    return x.astype(mx.float32) @ table(fmt, "rotation").T


def unrotate(y: mx.array, fmt: PackedFormat) -> mx.array:
    """R' y for each vector of `y` [..., head_dim], float32."""
    return y.astype(mx.float32) @ table(fmt, "rotation")


def head_rows(first_page: mx.array, balance: mx.array, fmt: PackedFormat) -> mx.array:
    """Centre and balance of each head, [batch, heads, 2, head_dim] in `first_page`'s dtype.

    Args:
        first_page: [batch, heads, 32, head_dim], as they came.
        balance: [batch, heads, 1, head_dim].
    """
    balance = balance.astype(first_page.dtype)
    y = rotate(first_page.astype(mx.float32) / balance.astype(mx.float32), fmt)
    limits = mx.finfo(first_page.dtype)
    mean = mx.clip(_finite_mean(y), limits.min, limits.max)
    return mx.concatenate([mx.expand_dims(mean, 2).astype(first_page.dtype), balance], axis=2)


def encode_pages(x: mx.array, head: mx.array, fmt: PackedFormat) -> mx.array:
    """Encode whole pages.

    Args:
        x: [batch, heads, n * 32, head_dim], any float dtype.
        head: [batch, heads, 2, head_dim] from `head_rows` in centred formats; else nothing is read of it.

    Returns:
        uint8 [batch, heads, n, page_bytes].
    """
    batch, heads, tokens, dim = x.shape
    x = x.astype(mx.float32).reshape(batch, heads, tokens // PAGE_TOKENS, PAGE_TOKENS, dim)
    head = mx.expand_dims(head.astype(mx.float32), 2)
    r = rotate(x / head[:, :, :, 1:] if fmt.centred else x, fmt)
    if fmt.centred:
        r = r - head[:, :, :, :1]
    bad = mx.logical_not(mx.isfinite(r).all(-1, keepdims=True))
    r = mx.where(bad, 0.0, r)
    header = mx.zeros((*r.shape[:3], HEADER_BYTES), mx.uint8)
    nibbles = header[..., :0]
    if fmt.centred:
        mean = _finite_mean(mx.where(bad, mx.nan, r))
        step = mx.abs(mean).max(-1, keepdims=True) / CENTRE_LIMIT
        code = _finite(mx.round(mean / step))
        r = r - mx.expand_dims(code * step, -2)
        header = mx.concatenate([header[..., :4], step.view(mx.uint8), header[..., 8:]], axis=-1)
        nibbles = _pack_plane((code + CENTRE_ZERO).astype(mx.uint8), 4)
    r = mx.where(bad, 0.0, r)

    peak = mx.abs(r).max(-1, keepdims=True)
    unit = r / mx.maximum(peak, _TINY)
    scale = peak * mx.sqrt(mx.square(unit).mean(-1, keepdims=True))
    base = scale.max(-2, keepdims=True)
    scale = scales_of(_scale_code(scale, base), base, fmt)
    best: Any = None
    codes = factor = scale
    for steps in SCALE_SEARCH if fmt.bits <= SCALE_SEARCH_BITS else (0,):
        tried = _nearest(r / mx.maximum(scale * 2.0 ** (steps / SCALE_STEPS), _TINY), fmt)
        level = table(fmt, "levels")[tried]
        product, square = (unit * level).sum(-1, keepdims=True), mx.square(level).sum(-1, keepdims=True)
        fit = mx.square(product) / square
        if best is None:
            best, codes, factor = fit, tried, product / square
        else:
            better = fit > best
            best, codes = mx.where(better, fit, best), mx.where(better, tried, codes)
            factor = mx.where(better, product / square, factor)
    scale = mx.maximum(peak * factor, 0.0)
    base = scale.max(-2, keepdims=True)
    scale_code = mx.where(bad, mx.array(SCALE_NAN, mx.uint8), _scale_code(scale, base))

    header = mx.concatenate([base.squeeze(-1).view(mx.uint8), header[..., 4:]], axis=-1)
    codes = codes.astype(mx.uint8)
    parts = [header, scale_code.squeeze(-1), nibbles]
    for width, shift, offset in fmt.planes:
        parts.append(_zeros_up_to(parts, offset))
        parts.append(_pack_plane((codes >> shift) & (2**width - 1), width).flatten(-2))
    parts.append(_zeros_up_to(parts, fmt.page_bytes))
    return mx.concatenate(parts, axis=-1)


def _zeros_up_to(parts: list[mx.array], offset: int) -> mx.array:
    return mx.zeros((*parts[0].shape[:-1], offset - sum(part.shape[-1] for part in parts)), mx.uint8)


def decode_pages(pages: mx.array, head: mx.array, fmt: PackedFormat) -> mx.array:
    """Pages, uint8 [batch, heads, n, page_bytes], as float32 [batch, heads, n * 32, head_dim], *rotated*."""
    y = levels_of(pages, fmt) * mx.expand_dims(token_scales(pages, fmt), -1)
    if fmt.centred:
        y = y + mx.expand_dims(page_centres(pages, fmt), 3) + mx.expand_dims(head[:, :, :1].astype(mx.float32), 3)
    return y.flatten(2, 3)


def decoded(y: mx.array, head: mx.array, fmt: PackedFormat) -> mx.array:
    """Vectors of pages as dense rows hold them, float32."""
    x = unrotate(y, fmt)
    return x * head[:, :, 1:].astype(mx.float32) if fmt.centred else x


def levels_of(pages: mx.array, fmt: PackedFormat) -> mx.array:
    """Levels of the codes without their scales: float32 [batch, heads, n, 32, head_dim]."""
    codes: Any = None
    for width, shift, offset in fmt.planes:
        plane = pages[..., offset : offset + PAGE_TOKENS * fmt.head_dim * width // 8]
        part = _unpack_plane(mx.unflatten(plane, -1, (PAGE_TOKENS, -1)), width)
        codes = part if codes is None else codes | (part << shift)
    return table(fmt, "levels")[codes]


def page_centres(pages: mx.array, fmt: PackedFormat) -> mx.array:
    """The centre of each page, float32 [batch, heads, n, head_dim], rotated."""
    step = mx.contiguous(pages[..., 4:8]).view(mx.float32)
    nibbles = _unpack_plane(pages[..., fmt.centre_offset : fmt.centre_offset + fmt.head_dim // 2], 4)
    return (nibbles.astype(mx.float32) - CENTRE_ZERO) * step


def token_scales(pages: mx.array, fmt: PackedFormat) -> mx.array:
    """Scale of each packed token, float32 [batch, heads, n, 32]."""
    base = mx.contiguous(pages[..., :4]).view(mx.float32)
    return scales_of(pages[..., fmt.scales_offset : fmt.scales_offset + PAGE_TOKENS], base, fmt)


def scales_of(code: mx.array, base: mx.array, fmt: PackedFormat) -> mx.array:
    return table(fmt, "scales")[code] * base


def _nearest(x: mx.array, fmt: PackedFormat) -> mx.array:
    """Codes of the levels that are nearest: how many boundaries are below, by bisection."""
    boundaries = table(fmt, "boundaries")
    made = mx.zeros(x.shape, mx.int32)
    for bit in reversed(range(fmt.bits)):
        tried = made + 2**bit
        made = mx.where(x > boundaries[tried - 1], tried, made)
    return made


def _pack_plane(values: mx.array, width: int) -> mx.array:
    fields = 8 // width
    split = mx.unflatten(values, -1, (fields, values.shape[-1] // fields))
    packed = split[..., 0, :]
    for field in range(1, fields):
        packed = packed | (split[..., field, :] << (field * width))
    return packed


def _unpack_plane(packed: mx.array, width: int) -> mx.array:
    mask = 2**width - 1
    return mx.concatenate([(packed >> (field * width)) & mask for field in range(8 // width)], axis=-1)


def _finite(x: mx.array) -> mx.array:
    return mx.where(mx.isfinite(x), x, 0.0)


def _finite_mean(y: mx.array) -> mx.array:
    """Mean over the tokens (axis -2) that hold no NaN or infinity; 0 where none is left."""
    good = mx.isfinite(y).all(-1, keepdims=True)
    count = mx.maximum(good.astype(mx.float32).sum(-2), 1.0)
    return (mx.where(good, y, 0.0) / mx.expand_dims(count, -2)).sum(-2)


def _scale_code(scale: mx.array, base: mx.array) -> mx.array:
    ratio = mx.where(base > 0, scale / base, 0.0)
    code = mx.clip(mx.round(-SCALE_STEPS * mx.log2(ratio)), 0, SCALE_NAN - 1)
    return mx.where(ratio > 0, code, float(SCALE_ZERO)).astype(mx.uint8)
