"""Encoding and decoding of pages in ONNX, step by step as `tqc.format.quantizer` does it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.format.packed import CENTRE_LIMIT, CENTRE_ZERO, SCALE_NAN, SCALE_STEPS, SCALE_ZERO, scale_table
from tqc.format.quantizer import SCALE_SEARCH, SCALE_SEARCH_BITS
from tqc.lowering.onnx.builder import Body, Value

TINY = float(np.finfo(np.float32).tiny)


@dataclass
class Tables:
    """What functions get as inputs because all layers share it.

    Attributes:
        rotation: float32 [d, d].
        levels: float32 [2**bits].
        factors: float32 [256], of scale codes.
        lookup: float32 [n, fields], levels of all fields of a byte (see `lookup_table`).
    """

    rotation: Value
    levels: Value
    factors: Value
    lookup: Value


def table_arrays(fmt: PackedFormat) -> dict[str, np.ndarray]:
    """The tables of a format by the names that they have in a graph."""
    return {
        f"tqc.rotation.{fmt.rotation}{fmt.seed}.d{fmt.head_dim}": fmt.rotation_matrix().numpy(),
        f"tqc.levels.d{fmt.head_dim}.b{fmt.bits}": fmt.levels().numpy(),
        "tqc.factors": scale_table().numpy(),
        f"tqc.lookup.d{fmt.head_dim}.b{fmt.bits}": lookup_table(fmt),
    }


def lookup_table(fmt: PackedFormat) -> np.ndarray:
    """Levels of the elements whose codes begin in one byte of the widest plane, float32 [n, fields].

    Row `low + 256 * high`: `low` is that byte, and field f of `high`, of the same width, has the bits that the narrower
    planes hold of the same element (see `_high_bits`).
    """
    width = fmt.planes[0][0]
    fields, rest = 8 // width, fmt.bits - width
    field = np.arange(fields) * width
    highest = int((((1 << rest) - 1) << field).sum()) if rest else 0
    low, high = np.meshgrid(np.arange(256), np.arange(highest + 1))
    code = (low[..., None] >> field) & ((1 << width) - 1) | ((high[..., None] >> field) & ((1 << rest) - 1)) << width
    return fmt.levels().numpy()[code.reshape(-1, fields)]


def element_order(fmt: PackedFormat) -> list[int]:
    """Which element of a vector each of those is that `decode_levels` makes."""
    fields = 8 // fmt.planes[0][0]
    stride = fmt.head_dim // fields
    return [field * stride + byte for byte in range(stride) for field in range(fields)]


def table_inputs(body: Body, fmt: PackedFormat, prefix: str) -> Tables:
    return Tables(*(body.input(f"{prefix}_{name}") for name in ("rotation", "levels", "factors", "lookup")))


def rotate(body: Body, x: Value, tables: Tables) -> Value:
    """R x for each vector, float32."""
    return x @ body.op("Transpose", tables.rotation, perm=[1, 0])


def head_rows(body: Body, first: Value, balance: Value, fmt: PackedFormat, tables: Tables) -> Value:
    """As `quantizer.head_rows`.

    Args:
        first: the tokens of the first page, [batch, heads, 32, d].
        balance: float32 [batch, heads, 1, d].

    Returns:
        [batch, heads, 2, d] in the dtype of `first`.
    """
    y = rotate(body, body.float(first) / balance, tables)
    mean = _finite_mean(body, y, _not_finite(body, y))
    limits = body.like(body.constant([3.4028234663852886e38], np.float32), first)
    # What exceeds the dtype becomes an infinity there, and then the largest number.
    mean = body.max(body.min(body.like(mean, first), limits), body.op("Neg", limits))
    return body.concat(body.op("Unsqueeze", mean, body.ints(2)), body.like(balance, first), axis=2)


def encode(body: Body, x: Value, head: Value | None, fmt: PackedFormat, tables: Tables) -> dict[str, Value]:
    """As `quantizer.encode_pages`.

    Args:
        x: [batch, heads, n * 32, d].
        head: [batch, heads, 2, d]; None in plain formats.

    Returns:
        By the names of `layout.page_parts`, each [batch, heads, n, bytes or numbers of a page].
    """
    d, parts = fmt.head_dim, {}
    x = body.float(x)
    if head is not None:
        x = x / body.float(body.slice(head, 1, 2, 2))
    r = x if fmt.folded else rotate(body, x, tables)
    if head is not None:
        r = r - body.float(body.slice(head, 0, 1, 2))
    r = body.reshape(r, 0, 0, -1, PAGE_TOKENS, d)
    bad = _not_finite(body, r)
    zero = body.constant(0, np.float32)
    r = body.where(bad, zero, r)
    step = None
    if fmt.centred:
        mean = _finite_mean(body, r, bad)
        step = body.reduce("Max", body.op("Abs", mean), -1) / float(CENTRE_LIMIT)
        code = body.op("Round", mean / step)
        code = body.where(body.op("IsNaN", code), zero, code)
        r = r - body.op("Unsqueeze", code * step, body.ints(-2))
        parts["centre"] = pack_plane(body, body.cast(code + float(CENTRE_ZERO), np.uint8), 4, d)
        r = body.where(bad, zero, r)

    peak = body.reduce("Max", body.op("Abs", r), -1)
    unit = r / body.max(peak, TINY)
    scale = peak * body.op("Sqrt", body.reduce("Mean", unit * unit, -1))
    base = body.reduce("Max", scale, -2)
    scale = body.gather(tables.factors, _scale_code(body, scale, base), 0) * base
    codes, factor = _codes(body, r, unit, scale, fmt, tables)
    scale = body.max(peak * factor, 0.0)
    base = body.reduce("Max", scale, -2)
    code = body.where(bad, body.constant(SCALE_NAN, np.int64), _scale_code(body, scale, base))
    parts["scales"] = body.op("Squeeze", body.cast(code, np.uint8), body.ints(-1))
    units = body.op("Squeeze", base, body.ints(-1))
    parts["units"] = units if step is None else body.concat(units, step, axis=-1)
    codes = body.cast(codes, np.uint8)
    for width, shift, _ in fmt.planes:
        plane = body.mask(body.shift(codes, shift, "RIGHT"), width)
        parts[f"plane{width}"] = body.reshape(pack_plane(body, plane, width, d), 0, 0, 0, PAGE_TOKENS * d * width // 8)
    return parts


def _codes(body: Body, r: Value, unit: Value, scale: Value, fmt: PackedFormat, tables: Tables) -> tuple[Value, Value]:
    """Codes, int64, and by what the peak is multiplied to the scale, of the best of the scales that are tried."""
    best = codes = factor = None
    for steps in SCALE_SEARCH if fmt.bits <= SCALE_SEARCH_BITS else (0,):
        divisor = body.max(scale * (2.0 ** (steps / SCALE_STEPS)), TINY)
        tried = _bucketize(body, r / divisor, fmt)
        level = body.gather(tables.levels, tried, 0)
        product, square = (body.reduce("Sum", x, -1) for x in (unit * level, level * level))
        fit, ratio = product * product / square, product / square
        if best is None:
            best, codes, factor = fit, tried, ratio
        else:
            better = fit > best
            best, codes, factor = (body.where(better, *two) for two in ((fit, best), (tried, codes), (ratio, factor)))
    assert codes is not None and factor is not None
    return codes, factor


def _bucketize(body: Body, x: Value, fmt: PackedFormat) -> Value:
    """How many of the format's boundaries are less than each of `x`, int64, by halving."""
    boundaries = fmt.boundaries().numpy()
    at = None
    for bit in reversed(range(fmt.bits)):
        if at is None:
            middle = body.constant(boundaries[2**bit - 1], np.float32)
        else:
            middle = body.gather(body.constant(boundaries, np.float32), at + (2**bit - 1), 0)
        above = body.cast(x > middle, np.int64) * 2**bit
        at = above if at is None else at + above
    assert at is not None
    return at


def _scale_code(body: Body, scale: Value, base: Value) -> Value:
    ratio = body.where(base > 0.0, scale / base, body.constant(0, np.float32))
    exponent = body.op("Log", body.cast(ratio, np.float64)) / body.constant(math.log(2), np.float64)
    code = body.op("Round", body.float(exponent) * -float(SCALE_STEPS))
    code = body.op("Clip", code, 0.0, float(SCALE_NAN - 1))
    code = body.where(ratio > 0.0, code, body.constant(SCALE_ZERO, np.float32))
    return body.cast(code, np.int64)


def pack_plane(body: Body, x: Value, width: int, d: int) -> Value:
    """As `tqc.format.packed.pack_plane`, of uint8."""
    fields = 8 // width
    stride, packed = d // fields, None
    for field in range(fields):
        part = body.slice(x, field * stride, (field + 1) * stride, -1) if fields > 1 else x
        part = body.shift(part, field * width, "LEFT")
        packed = part if packed is None else packed | part
    assert packed is not None
    return packed


def unpack_plane(body: Body, packed: Value, width: int) -> Value:
    """Inverse of `pack_plane`."""
    fields = (body.shift(packed, field * width, "RIGHT") for field in range(8 // width))
    return body.concat(*(body.mask(field, width) if width < 8 else field for field in fields), axis=-1)


def decode_levels(body: Body, parts: dict[str, Value], fmt: PackedFormat, tables: Tables) -> Value:
    """Levels of the codes of pages, float32 [batch, heads, n * 32, d], rotated and without scales, their elements in
    `element_order`: all fields of a byte are looked up at once."""
    width, *narrower = [width for width, _, _ in fmt.planes]
    stride = fmt.head_dim * width // 8
    index = body.cast(body.reshape(parts[f"plane{width}"], 0, 0, -1, stride), np.int32)
    high, shift = None, 0
    for narrow in narrower:
        bits = body.shift(_high_bits(body, parts[f"plane{narrow}"], narrow, width, fmt.head_dim), shift, "LEFT")
        high, shift = bits if high is None else high | bits, shift + narrow
    if high is not None:
        index = index + body.cast(high, np.int32) * body.constant(256, np.int32)
    return body.reshape(body.gather(tables.lookup, index, 0), 0, 0, -1, fmt.head_dim)


def _high_bits(body: Body, plane: Value, narrow: int, width: int, d: int) -> Value:
    """The bits that a narrower plane holds of the elements in each byte of the widest, uint8 [batch, heads, tokens,
    bytes of the widest plane], in fields of its width.

    Element f * stride + j, field f of byte j of the widest plane, is in byte j % s of the narrower one, s = d * narrow
    / 8, at bit narrow * (j // s) + f * width.
    """
    packed = body.reshape(plane, 0, 0, -1, d * narrow // 8)
    wanted = sum(((1 << narrow) - 1) << field for field in range(0, 8, width))
    shifted = (body.shift(packed, narrow * part, "RIGHT") for part in range(width // narrow))
    return body.concat(*(body.op("BitwiseAnd", x, body.constant(wanted, np.uint8)) for x in shifted), axis=-1)


def in_element_order(body: Body, x: Value, fmt: PackedFormat) -> Value:
    """Vectors as `decode_levels` orders their elements."""
    return body.op("Gather", x, body.constant(element_order(fmt), np.int64), axis=-1)


def back_in_order(body: Body, x: Value, fmt: PackedFormat) -> Value:
    """Inverse of `in_element_order`."""
    return body.op("Gather", x, body.constant(np.argsort(element_order(fmt)), np.int64), axis=-1)


def token_scales(body: Body, parts: dict[str, Value], tables: Tables) -> Value:
    """Scale of each packed token, float32 [batch, heads, n, 32]."""
    table = body.gather(tables.factors, body.cast(parts["scales"], np.int32), 0)
    return table * body.slice(parts["units"], 0, 1, -1)


def page_centres(body: Body, parts: dict[str, Value]) -> Value:
    """The centre of each page, float32 [batch, heads, n, d], without that of the head."""
    code = body.float(unpack_plane(body, parts["centre"], 4)) - float(CENTRE_ZERO)
    return code * body.slice(parts["units"], 1, 2, -1)


def _not_finite(body: Body, y: Value) -> Value:
    """Whether a vector holds a NaN or an infinity, bool [..., 1]."""
    worst = body.reduce("Max", body.float(body.op("IsNaN", y * 0.0)), -1)
    return worst > 0.0


def _finite_mean(body: Body, y: Value, bad: Value) -> Value:
    """As `quantizer._finite_mean`."""
    good = body.float(body.op("Not", bad))
    count = body.max(body.reduce("Sum", good, -2), 1.0)
    return body.reduce("Sum", body.where(bad, body.constant(0, np.float32), y) / count, -2, keep=False)
