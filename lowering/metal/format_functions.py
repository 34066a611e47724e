"""Functions of a format in the kernels' language: rotations, codes of pages, their products with queries and weights.

A simdgroup works on one page or one vector. Where lanes stand for elements, lane l has the elements l, l + 32, ...;
`j` counts them. Where they stand for tokens, lane l has the token l of a page.
"""

from __future__ import annotations

from string import Template

from tqc.format import PackedFormat
from tqc.lowering.metal.tables import Rotation, offsets

# By one simdgroup, in place. Elements lie one behind the other.
BUTTERFLY = """
FUNCTION void butterfly(threadgroup float* x, int size, int step, int lane) {
  for (int i = lane; i < size / 2; i += 32) {
    const int at = i / step * 2 * step + i % step;
    const float a = x[at];
    const float b = x[at + step];
    x[at] = a + b;
    x[at + step] = a - b;
  }
  simd_barrier();
}
"""

_SIGNS = Template("""
FUNCTION void ${p}_signs(threadgroup float* x, device const float* table, int lane) {
  for (int e = lane; e < $D; e += 32) x[e] *= table[$SIGNS + e];
  simd_barrier();
}
""")

_MIX = Template("""
FUNCTION void ${p}_mix(threadgroup float* x, device const float* table, int across, int along, int lane) {
  float mixed[$J];
  UNROLL for (int j = 0; j < $J; j++) {
    const int e = lane + 32 * j;
    mixed[j] = 0.0f;
    if (e < $D) {
      for (int i = 0; i < $M; i++) mixed[j] += table[$MIX + e % $M * across + i * along] * x[e - e % $M + i];
    }
  }
  simd_barrier();
  UNROLL for (int j = 0; j < $J; j++) {
    if (lane + 32 * j < $D) x[lane + 32 * j] = mixed[j];
  }
  simd_barrier();
}
""")


def rotation(p: str, fmt: PackedFormat, back: bool = False) -> str:
    """`p`_rotate(x, table, lane), R x in place by one simdgroup; or `back`, `p`_unrotate, R' x."""
    factors, d, at = Rotation.of(fmt), fmt.head_dim, offsets(fmt)
    m = factors.mixed
    numbers = {"p": p, "D": d, "J": -(-d // 32), "SIGNS": at["signs"], "MIX": at["mix"], "M": m}
    text, steps = "", [f"butterfly(x, {d}, {m << i}, lane);" for i in range((d // m).bit_length() - 1)]
    if m > 1:
        text += _MIX.substitute(numbers)
        mix = f"{p}_mix(x, table, {f'1, {m}' if back else f'{m}, 1'}, lane);"
        steps = [*steps, mix] if back else [mix, *steps]
    if factors.signed:
        text += _SIGNS.substitute(numbers)
        signs = f"{p}_signs(x, table, lane);"
        steps = [*steps, signs] if back else [signs, *steps]
    name = f"{p}_{'unrotate' if back else 'rotate'}"
    lines = "".join(f"  {step}\n" for step in ["simd_barrier();", *steps])
    return f"{text}\nFUNCTION void {name}(threadgroup float* x, device const float* table, int lane) {{\n{lines}}}\n"


TOKEN_SCALE = """
FUNCTION float token_scale(device const uint8_t* page, int token) {
  const int code = page[16 + token];
  const float base = *(device const float*)page;
  return (code == 255 ? 0.0f : code == 254 ? NAN : exp2(float(code) * -0.03125f)) * base;
}
"""

_LOADS = {
    16: """
FUNCTION void load_16(device const uint8_t* at, thread uint32_t* words) {
  const uint4 loaded = *(device const uint4*)at;
  words[0] = loaded.x;
  words[1] = loaded.y;
  words[2] = loaded.z;
  words[3] = loaded.w;
}
""",
    8: """
FUNCTION void load_8(device const uint8_t* at, thread uint32_t* words) {
  const uint2 loaded = *(device const uint2*)at;
  words[0] = loaded.x;
  words[1] = loaded.y;
}
""",
    4: """
FUNCTION void load_4(device const uint8_t* at, thread uint32_t* words) { words[0] = *(device const uint32_t*)at; }
""",
    2: """
FUNCTION void load_2(device const uint8_t* at, thread uint32_t* words) { words[0] = *(device const uint16_t*)at; }
""",
    1: """
FUNCTION void load_1(device const uint8_t* at, thread uint32_t* words) { words[0] = at[0]; }
""",
}

# Levels lie in threadgroup memory: up to 32 of them are one word of each bank.
_PRODUCTS = Template("""
// Adds to p[r] the products of the levels of a token with row r of q.
FUNCTION void ${p}_products(device const uint8_t* page, int token, threadgroup const float* q,
                        threadgroup const float* levels, thread float* p) {
  for (int b = 0; b < $ROW; b += $UNIT) {
$loads    UNROLL for (int f = 0; f < $FIELDS; f++) {
      UNROLL for (int i = 0; i < $WORDS; i++) {
        const uint32_t codes = $codes;
        UNROLL for (int c = 0; c < $EACH; c++) {
          const float level = levels[codes >> 8 * c & 255];
          UNROLL for (int r = 0; r < ROWS; r++) p[r] += q[r * $D + f * $ROW + b + 4 * i + c] * level;
        }
      }
    }
  }
}
""")


def _narrowest_row(fmt: PackedFormat) -> int:
    """Bytes of a token in the narrowest plane."""
    return fmt.head_dim * fmt.planes[-1][0] // 8


def _unit(fmt: PackedFormat) -> int:
    """How many bytes of it are loaded at once."""
    return next(unit for unit in (16, 8, 4, 2, 1) if _narrowest_row(fmt) % unit == 0)


def _mask(width: int) -> str:
    return f"0x{(2**width - 1) * 0x01010101:08x}"


def products(p: str, fmt: PackedFormat) -> str:
    """`p`_products(page, token, q, levels, p), lanes being tokens: four codes are found at once, in a word.

    Element e of a token is field f = e // row of byte e % row of the narrowest plane, and in one of ratio times its
    width field f // ratio of a byte in its (f % ratio)-th piece of as many bytes.
    """
    row, unit = _narrowest_row(fmt), _unit(fmt)
    low, lines, terms = fmt.planes[-1][0], [], []
    for width, shift, offset in reversed(fmt.planes):
        ratio, words = width // low, max(1, unit // 4)
        lines.append(f"    uint32_t plane_{width}[{ratio}][{words}];\n")
        for piece in range(ratio):
            at = f"page + {offset + piece * row} + token * {row * ratio} + b"
            lines.append(f"    load_{unit}({at}, plane_{width}[{piece}]);\n")
        field = f"plane_{width}[f % {ratio}][i] >> f / {ratio} * {width}"
        terms.append(f"(({field}) & {_mask(width)}) << {shift}")
    return _LOADS[unit] + _PRODUCTS.substitute(
        p=p, D=fmt.head_dim, ROW=row, UNIT=unit, FIELDS=8 // low, WORDS=max(1, unit // 4), EACH=min(unit, 4),
        loads="".join(lines), codes=" | ".join(terms),
    )  # fmt: skip


def _field(head_dim: int, width: int) -> tuple[str, str]:
    """Byte and field of element lane + 32 * j in the row of a plane."""
    row = head_dim * width // 8
    if row % 32 == 0:
        return f"(lane + 32 * (j % {row // 32}))", f"(j / {row // 32})"
    if 32 % row == 0:
        return f"(lane % {row})", f"(j * {32 // row} + lane / {row})"
    return f"((lane + 32 * j) % {row})", f"((lane + 32 * j) / {row})"


_CODE = Template("""
// Code of element lane + 32 * j of a token; behind the last element it is any.
FUNCTION int ${p}_code(device const uint8_t* page, int token, int j, int lane) {
  return $codes;
}
""")

_NIBBLE = Template("""
// Element lane + 32 * j of the page's centre, in its unit.
FUNCTION float ${p}_centre(device const uint8_t* page, int j, int lane) {
  return float(page[$OFFSET + $byte] >> $field * 4 & 15) - 8.0f;
}
FUNCTION float ${p}_unit(device const uint8_t* page) { return ((device const float*)page)[1]; }
""")


def codes(p: str, fmt: PackedFormat) -> str:
    """`p`_code(page, token, j, lane)."""
    terms = []
    for width, shift, offset in fmt.planes:
        byte, field = _field(fmt.head_dim, width)
        row = fmt.head_dim * width // 8
        term = f"page[{offset} + token * {row} + {byte}] >> {field} * {width} & {2**width - 1}"
        terms.append(f"({term}) << {shift}")
    return _CODE.substitute(p=p, codes=" | ".join(terms))


def page_centre(p: str, fmt: PackedFormat) -> str:
    """`p`_centre(page, j, lane) and `p`_unit(page) of a centred format."""
    if not fmt.centred:
        return ""
    byte, field = _field(fmt.head_dim, 4)
    return _NIBBLE.substitute(p=p, OFFSET=fmt.centre_offset, byte=byte, field=field)
