"""Decoding of packed pages in registers: the device functions that every Triton kernel shares.

A tile is a number of packed tokens of one head. Planes are read as 32-bit words, 16 bytes to a load where a token's row
is that long. The narrowest plane sets the order of a tile's columns: column p is field p // W of byte p % W of that
plane's row, W being the bytes of the row rounded up to a power of two, so that all planes of a code meet in one lane.
`column_element` names the element that a column holds; kernels read the rotation matrix in that order, and nothing is
ever moved.

Codes of 1 to 4 bits become float16 levels by byte permutes on a table in registers, eight codes to a word; wider ones
by a polynomial in log2 of the distance from the end of the code range. With EXACT the levels are read from memory, in
float32. `fmt` is a `TileFormat` throughout, a compile-time constant.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tqc.lowering.triton.format import (
    CENTRE_ZERO,
    HEADER_BYTES,
    PAGE,
    PERMUTED_BITS,
    SCALE_NAN,
    SCALE_STEPS,
    SCALE_ZERO,
)
from tqc.lowering.triton.placement import head_balance, head_centre

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def mask_word(width: int, every: int) -> int:
    """32-bit word in which the lowest `width` of each `every` bits are set, as a signed number."""
    word = sum(((1 << width) - 1) << at for at in range(0, 32, every))
    return word - (1 << 32) if word >> 31 else word


@triton.jit
def column_element(fmt: tl.constexpr):
    """Element that each column of a tile holds, int32 [columns], and whether it holds one."""
    WIDTH: tl.constexpr = 4 * fmt.row_words
    COLUMNS: tl.constexpr = fmt.columns
    column = tl.arange(0, COLUMNS)
    valid = column % WIDTH < fmt.row_bytes
    return tl.where(valid, column // WIDTH * fmt.row_bytes + column % WIDTH, 0), valid


@triton.jit
def prmt(a, b, selector):
    """PTX `prmt.b32`: each nibble of the low half of `selector` picks a byte of a (0 to 3) or b (4 to 7); from 8 on
    eight copies of the topmost bit of byte nibble - 8."""
    if INTERPRET:
        result = a & 0
        for i in tl.static_range(4):
            index = (selector >> (4 * i)) & 15
            source = tl.where(index & 4 == 0, a, b) >> (8 * (index & 3))
            source = tl.where(index < 8, source, 0 - ((source >> 7) & 1))
            result |= (source & 255) << (8 * i)
        return result
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def log2_approx(x):
    """log2 to about 2**-22, by one instruction."""
    if INTERPRET:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _minus(x, CONSTANT: tl.constexpr):
    """x - CONSTANT in float16, two numbers at a time, which the compiler does not find."""
    if INTERPRET:
        return x - CONSTANT
    else:
        y = tl.full(x.shape, CONSTANT, tl.float16)
        return tl.inline_asm_elementwise(
            "sub.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=tl.float16, is_pure=True, pack=2
        )


@triton.jit
def beside(a, b):
    """[n, m] and [n, m] side by side, [n, 2 m]."""
    return tl.join(a, b).permute(0, 2, 1).reshape(a.shape[0], 2 * a.shape[1])


@triton.jit
def interleave(a, b):
    """[n, m] and [n, m] column by column, [n, 2 m]."""
    return tl.join(a, b).reshape(a.shape[0], 2 * a.shape[1])


@triton.jit
def _bytes(words):
    """The four bytes of each word, [n, m] to [n, 4 m], with other bits above them."""
    return interleave(interleave(words, words >> 16), interleave(words >> 8, words >> 24))


@triton.jit
def _halves(words):
    """The two float16 numbers of each word, [n, m] to [n, 2 m]."""
    return interleave(words.to(tl.int16), (words >> 16).to(tl.int16)).to(tl.float16, bitcast=True)


@triton.jit
def _plane(pages, at, row, fmt: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr):
    """Words of a plane's rows, int32 [tokens, words]: the PART-th piece of as many bytes as the narrowest plane has."""
    WORDS: tl.constexpr = fmt.row_words
    BYTES: tl.constexpr = fmt.row_bytes
    OFFSET: tl.constexpr = fmt.plane_offset[WIDTH] + PART * BYTES
    ROW: tl.constexpr = fmt.head_dim * WIDTH // 8
    word = tl.arange(0, WORDS)[None, :]
    if BYTES % 4 == 0:
        address = pages.to(tl.pointer_type(tl.int32)) + ((at * 4 + (row * (ROW // 4) + OFFSET // 4))[:, None] + word)
        if BYTES == 4 * WORDS:
            return tl.load(address)
        else:
            return tl.load(address, mask=word < BYTES // 4, other=0)
    else:
        # Rows that are no whole words, as of 80 elements in a plane of width 1: by 2 bytes where that divides them.
        UNIT: tl.constexpr = 2 if BYTES % 2 == 0 else 1
        address = pages + ((at * 16 + (row * ROW + OFFSET))[:, None] + 4 * word)
        if UNIT == 2:
            address = address.to(tl.pointer_type(tl.uint16))
        result = tl.zeros((at.shape[0], WORDS), tl.int32)
        for i in tl.static_range(4 // UNIT):
            part = tl.load(address + i, mask=4 * word + i * UNIT < BYTES, other=0).to(tl.int32)
            result |= part << (8 * UNIT * i)
        return result


@triton.jit
def _nibbles(pages, at, row, fmt: tl.constexpr, S: tl.constexpr):
    """Eight codes to a word, [tokens, words]: nibble 2 i is field S of byte i, nibble 2 i + 1 field S + fields / 2."""
    LOW: tl.constexpr = fmt.narrowest
    result = (_plane(pages, at, row, fmt, LOW, 0) >> (S * LOW)) & mask_word(LOW, 4)
    if fmt.bits == 3:
        wide = _plane(pages, at, row, fmt, 2, S % 2) >> (2 * (S // 2))
        result = (wide & mask_word(2, 4)) | (result << 2)
    return result


@triton.jit
def _word(like, VALUE: tl.constexpr):
    return tl.full(like.shape, VALUE, tl.int32)


@triton.constexpr_function
def _of_lane(value: int) -> str:
    """PTX that makes `value` from the mask of the lanes before this one, which never holds the last one."""
    return (
        f"{{ .reg .b32 lane; mov.u32 lane, %lanemask_lt; and.b32 lane, lane, 0x80000000; xor.b32 $0, lane, {value}; }}"
    )


@triton.jit
def _register(like, VALUE: tl.constexpr):
    """A constant of the shape of `like`, as the compiler cannot know it to be one: constants live in uniform registers,
    from which a permute cannot read, so that every use would cost a move."""
    if INTERPRET:
        return tl.full(like.shape, VALUE, tl.int32)
    else:
        return tl.inline_asm_elementwise(_of_lane(VALUE), "=r,r", [like], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _pairs(low, high):
    """Four numbers from their low and high bytes, as pairs: the first and third, the second and fourth."""
    return prmt(low, high, _word(low, 0x6240)), prmt(low, high, _word(low, 0x7351))


@triton.jit
def _look_up(index, fmt: tl.constexpr):
    """Low and high bytes of the float16 entries that the four nibbles in the low half of `index` name."""
    WORDS: tl.constexpr = fmt.level_table
    low = prmt(_register(index, WORDS[0]), _word(index, WORDS[1]), index)
    return low, prmt(_register(index, WORDS[2]), _word(index, WORDS[3]), index)


@triton.jit
def _signed(high, nibbles):
    """High bytes of numbers whose sign bits are to be the inverse of bit 3 of the nibbles in the low half."""
    # Bytes of 128, or of 255 where the bit is set: the bit in question is bit 6.
    bit = prmt(_register(nibbles, -0x7F7F7F80), _word(nibbles, -0x7F7F7F80), nibbles) << 1
    return high ^ (bit & -0x7F7F7F80)


@triton.jit
def _level_pairs(pages, at, row, fmt: tl.constexpr, S: tl.constexpr):
    """Pairs of float16 levels, int32 [tokens, 2 words]: those of field S and those of field S + fields / 2."""
    nibbles = _nibbles(pages, at, row, fmt, S)
    index = nibbles
    if fmt.bits == 4:
        # Codes 7 to 0 are the entries 0 to 7, codes 8 to 15 the same with a plus.
        positive = ((nibbles >> 3) & 0x11111111) * 15
        index = ~(nibbles ^ positive) & 0x77777777
    low, high = _look_up(index, fmt)
    low_2, high_2 = _look_up(index >> 16, fmt)
    if fmt.bits == 4:
        high = _signed(high, nibbles)
        high_2 = _signed(high_2, nibbles >> 16)
    first, second = _pairs(low, high)
    first_2, second_2 = _pairs(low_2, high_2)
    return interleave(first, first_2), interleave(second, second_2)


@triton.jit
def _permuted_tile(pages, at, row, fmt: tl.constexpr):
    a, b = _level_pairs(pages, at, row, fmt, 0)
    if fmt.bits != 4:
        a1, b1 = _level_pairs(pages, at, row, fmt, 1)
        a = beside(a, a1)
        b = beside(b, b1)
    if fmt.bits % 2 == 1:
        a2, b2 = _level_pairs(pages, at, row, fmt, 2)
        a3, b3 = _level_pairs(pages, at, row, fmt, 3)
        a = beside(a, beside(a2, a3))
        b = beside(b, beside(b2, b3))
    return _halves(beside(a, b))


@triton.jit
def _field_codes(pages, at, row, fmt: tl.constexpr, FIELD: tl.constexpr):
    """Codes of one field, four to a word, int32 [tokens, words]."""
    LOW: tl.constexpr = fmt.narrowest
    result = _plane(pages, at, row, fmt, LOW, 0)
    if LOW < 8:
        result = ((result >> (FIELD * LOW)) & mask_word(LOW, 8)) << (fmt.bits - LOW)
    if fmt.bits & (2 * LOW) and LOW < 4:
        wide = _plane(pages, at, row, fmt, 2 * LOW, FIELD % 2) >> (2 * LOW * (FIELD // 2))
        result |= (wide & mask_word(2 * LOW, 8)) << fmt.plane_shift[2 * LOW]
    if fmt.bits & (4 * LOW) and LOW < 2:
        wide = _plane(pages, at, row, fmt, 4 * LOW, FIELD % 4) >> (4 * LOW * (FIELD // 4))
        result |= (wide & mask_word(4 * LOW, 8)) << fmt.plane_shift[4 * LOW]
    return result


@triton.jit
def codes_tile(pages, at, row, fmt: tl.constexpr):
    """Codes, int32 [tokens, columns]. Arguments as of `levels_tile`."""
    words = _field_codes(pages, at, row, fmt, 0)
    if fmt.narrowest <= 4:
        words = beside(words, _field_codes(pages, at, row, fmt, 1))
    if fmt.narrowest <= 2:
        third = _field_codes(pages, at, row, fmt, 2)
        words = beside(words, beside(third, _field_codes(pages, at, row, fmt, 3)))
    if fmt.narrowest == 1:
        fifth = _field_codes(pages, at, row, fmt, 4)
        seventh = _field_codes(pages, at, row, fmt, 6)
        upper = beside(seventh, _field_codes(pages, at, row, fmt, 7))
        words = beside(words, beside(beside(fifth, _field_codes(pages, at, row, fmt, 5)), upper))
    return _bytes(words) & 255


@triton.jit
def levels_tile(pages, at, row, levels, fmt: tl.constexpr, EXACT: tl.constexpr):
    """Levels of a tile's codes, [tokens, columns], not yet times their tokens' scales; columns without an element hold
    anything finite.

    Args:
        pages: pointer to the pages of a head, uint8.
        at: where the page of each token begins, in units of 16 bytes, [tokens].
        row: place of each token in its page, [tokens].
        levels: pointer to the format's levels, float32, which EXACT alone reads.
        EXACT: float32 levels from memory, else float16 ones.
    """
    if EXACT:
        return tl.load(levels + codes_tile(pages, at, row, fmt))
    elif fmt.bits <= PERMUTED_BITS:
        return _permuted_tile(pages, at, row, fmt)
    else:
        COEFFICIENTS: tl.constexpr = fmt.level_table
        # The code is the last bits of a float32 that starts at 2**23: cheaper than a conversion.
        code = (codes_tile(pages, at, row, fmt) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
        centred = code - (2 ** (fmt.bits - 1) - 0.5)
        log = log2_approx(fmt.log_offset - tl.abs(centred))
        level = tl.full(log.shape, COEFFICIENTS[len(COEFFICIENTS) - 1], tl.float32)
        for i in tl.static_range(2, len(COEFFICIENTS) + 1):
            level = level * log + COEFFICIENTS[len(COEFFICIENTS) - i]
        return tl.where(centred < 0, -level, level).to(tl.float16)


@triton.jit
def scale_parts(pages, at, row):
    """What `token_scales` makes scales of: codes and the pages' largest scales. Arguments as of `levels_tile`."""
    return tl.load(pages + (at * 16 + (row + HEADER_BYTES))), page_base(pages, at)


@triton.jit
def token_scales(code, base):
    """Scale of each token, float32 [tokens]."""
    factor = tl.exp2(code.to(tl.float32) * (-1.0 / SCALE_STEPS))
    return tl.where(code == SCALE_ZERO, 0.0, tl.where(code == SCALE_NAN, float("nan"), factor)) * base


@triton.jit
def page_base(pages, at):
    """Largest scale of each page, float32. Arguments as of `levels_tile`."""
    return tl.load(pages.to(tl.pointer_type(tl.float32)) + at * 4)


@triton.jit
def centre_codes(pages, at, fmt: tl.constexpr):
    """Pages' centres in their units, float16 [n, columns], zeros in columns without an element. `at`: of pages, [n]."""
    HALF: tl.constexpr = fmt.head_dim // 2
    if fmt.columns == fmt.head_dim:  # columns are in the natural order
        word = (tl.arange(0, HALF // 4) + fmt.centre_offset // 4)[None, :]
        words = tl.load(pages.to(tl.pointer_type(tl.int32)) + ((at * 4)[:, None] + word))
        nibbles = beside(words, words >> 4) & 0x0F0F0F0F
        # Bytes between those of 1024.0: no conversion from integers.
        k = _word(nibbles, 0x64646464)
        pairs = interleave(prmt(nibbles, k, _word(nibbles, 0x4140)), prmt(nibbles, k, _word(nibbles, 0x4342)))
        return _minus(_halves(pairs), 1024 + CENTRE_ZERO)
    else:
        element, valid = column_element(fmt)
        byte = tl.load(pages + ((at * 16)[:, None] + (fmt.centre_offset + element % HALF)[None, :])).to(tl.int32)
        nibble = (byte >> (element // HALF * 4)[None, :]) & 15
        return tl.where(valid[None, :], nibble - CENTRE_ZERO, 0).to(tl.float16)


@triton.jit
def centre_unit(pages, at):
    """Unit of each page's centre, float32. Arguments as of `levels_tile`."""
    return tl.load(pages.to(tl.pointer_type(tl.float32)) + (at * 4 + 1))


@triton.jit
def power_of_two(x):
    """The power of two that is at most float32 `x` >= 0 and at least half of it, and its inverse; at the ends of the
    range the nearest one that has an inverse."""
    exponent = tl.minimum(tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23), 253 << 23)
    return exponent.to(tl.float32, bitcast=True), (0x7F000000 - exponent).to(tl.float32, bitcast=True)


@triton.jit
def decode_page(page, dense, levels, matrix, gain, fmt: tl.constexpr):
    """The 32 tokens of a page, float32 [32, D].

    Args:
        dense: pointer to the head's rows, with its centre and balance.
        matrix, gain: `transposed_rotation` and `rotation_gain` of `tables`.
    """
    D: tl.constexpr = triton.next_power_of_2(fmt.head_dim)
    # float32 takes twice the registers.
    STEP: tl.constexpr = 16 if D > 128 and matrix.dtype.element_ty == tl.float32 else min(D, 32)
    column = tl.arange(0, D)
    x = tl.zeros([PAGE, D], tl.float32)
    for e in range(0, D, STEP):
        element = e + tl.arange(0, STEP)
        y = _decode_elements(page, dense, element, levels, fmt)
        inside = (element < fmt.head_dim)[:, None] & (column < fmt.head_dim)[None, :]
        m = tl.load(matrix + column[None, :] * fmt.head_dim + element[:, None], mask=inside, other=0.0)
        x = tl.dot(y, m.to(tl.float32), x, input_precision="tf32x3")
    x *= gain
    if fmt.centred:
        x *= head_balance(dense, column, fmt)[None, :]
    return x


@triton.jit
def _decode_elements(page, dense, element, levels, fmt: tl.constexpr):
    """Elements `element` [E] of a page's 32 tokens, rotated, float32 [32, E]: a plain way, for a page now and then."""
    token = tl.arange(0, PAGE)
    inside = element < fmt.head_dim
    codes = tl.zeros([PAGE, element.shape[0]], tl.int32)
    for i in tl.static_range(len(fmt.planes)):
        codes |= _load_plane(page + fmt.planes[i][2], token, element, fmt.planes[i][0], fmt) << fmt.planes[i][1]
    header = page.to(tl.pointer_type(tl.float32))
    code = tl.load(page + fmt.scales_offset + token).to(tl.float32)
    scale = tl.exp2(-code / SCALE_STEPS) * tl.load(header)
    scale = tl.where(code == SCALE_ZERO, 0.0, tl.where(code == SCALE_NAN, float("nan"), scale))
    y = tl.load(levels + codes) * scale[:, None]
    if fmt.centred:
        step = tl.load(header + 1)
        nibble = _load_plane(page + fmt.centre_offset, tl.zeros([1], tl.int32), element, 4, fmt).to(tl.float32)
        centre = tl.load(head_centre(dense, fmt) + element, mask=inside, other=0.0).to(tl.float32)
        y += (nibble - 8.0) * step + centre[None, :]
    return tl.where(inside[None, :], y, 0.0)


@triton.jit
def _load_plane(plane, row, element, width: tl.constexpr, fmt: tl.constexpr):
    STRIDE: tl.constexpr = fmt.head_dim * width // 8
    byte = row[:, None] * STRIDE + (element % STRIDE)[None, :]
    packed = tl.load(plane + byte, mask=(element < fmt.head_dim)[None, :], other=0).to(tl.int32)
    return (packed >> (element // STRIDE * width)[None, :]) & ((1 << width) - 1)
