"""Encoding of pages, step by step as `tqc.format.quantizer` does it, and the centre of a head.

A threadgroup takes one page. Each simdgroup has some of its tokens, in registers: lane l the elements l, l + 32, ...
"""

from __future__ import annotations

from functools import cache

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.format.quantizer import SCALE_SEARCH, SCALE_SEARCH_BITS
from tqc.lowering.metal import format_functions as of
from tqc.lowering.metal.language import Kernel
from tqc.lowering.metal.tables import offsets

_FUNCTIONS = """
// Largest magnitude that `number` holds.
FUNCTION float clamped(float x) { return x > LIMIT ? LIMIT : x < -LIMIT ? -LIMIT : x; }
FUNCTION int scale_code(float scale, float base) {
  const float ratio = base > 0.0f ? scale / base : 0.0f;
  const float code = rint(-32.0f * log2(ratio));
  return ratio > 0.0f ? int(code < 0.0f ? 0.0f : code > 253.0f ? 253.0f : code) : 255;
}
// How many boundaries lie below x.
FUNCTION int nearest_code(float x, threadgroup const float* boundaries) {
  int code = 0;
  UNROLL for (int step = LEVELS / 2; step > 0; step /= 2) code += boundaries[code + step - 1] < x ? step : 0;
  return code;
}
"""

_BEGIN = """
  const int lane = thread_index_in_simdgroup;
  const int simd = simdgroup_index_in_threadgroup;
  const int head_at = threadgroup_position_in_grid.y;
  const int page_at = threadgroup_position_in_grid.x;
  SHARED float work[SIMDS * D];
  SHARED float counts[SIMDS];
  threadgroup float* own_work = work + simd * D;
  float y[TOKENS * J];
  float good[TOKENS];
"""

# The tokens of the simdgroup in the rotated basis, less `{centre}`, and which of them are finite.
_TOKENS = """
  UNROLL for (int k = 0; k < TOKENS; k++) {{
    const int64_t at = (int64_t(head_at) * tokens_shape[2] + page_at * 32 + simd * TOKENS + k) * D;
    for (int e = lane; e < D; e += 32) own_work[e] = float(tokens[at + e]){balance};
{rotate}    simd_barrier();
    float bad = 0.0f;
    UNROLL for (int j = 0; j < J; j++) {{
      const int e = lane + 32 * j;
      y[k * J + j] = e < D ? own_work[e]{centre} : 0.0f;
      if (!isfinite(y[k * J + j])) bad = 1.0f;
    }}
    good[k] = 1.0f - simd_max(bad);
    simd_barrier();
  }}
"""

# Their mean over the page, 0 where no token is finite.
_MEAN = """
  float count = 0.0f;
  UNROLL for (int k = 0; k < TOKENS; k++) count += good[k];
  if (lane == 0) counts[simd] = count;
  group_barrier();
  count = 0.0f;
  for (int s = 0; s < SIMDS; s++) count += counts[s];
  count = larger(count, 1.0f);
  for (int e = lane; e < D; e += 32) own_work[e] = 0.0f;
  UNROLL for (int k = 0; k < TOKENS; k++) {
    UNROLL for (int j = 0; j < J; j++) {
      if (lane + 32 * j < D && good[k] > 0.0f) own_work[lane + 32 * j] += y[k * J + j] / count;
    }
  }
  group_barrier();
  float mean[J];
  UNROLL for (int j = 0; j < J; j++) {
    mean[j] = 0.0f;
    for (int s = 0; s < SIMDS; s++) mean[j] += lane + 32 * j < D ? work[s * D + lane + 32 * j] : 0.0f;
  }
"""

_PAGE_CENTRE = """
  float step = 0.0f;
  UNROLL for (int j = 0; j < J; j++) step = larger(fabs(mean[j]), step);
  step = simd_max(step) / 7.0f;
  UNROLL for (int j = 0; j < J; j++) {
    const float ratio = rint(mean[j] / step);
    const float code = isfinite(ratio) ? ratio : 0.0f;
    UNROLL for (int k = 0; k < TOKENS; k++) y[k * J + j] -= code * step;
    if (lane + 32 * j < D) own_codes[lane + 32 * j] = uint8_t(int(code) + 8);
  }
  simd_barrier();
  if (simd == 0) {
    for (int i = lane; i < PLANES - CENTRE; i += 32) {
      page[CENTRE + i] = i < D / 2 ? own_codes[i] | own_codes[i + D / 2] << 4 : 0;
    }
  }
  simd_barrier();
"""

_ENCODE_BEGIN = """
  SHARED uint8_t codes[SIMDS * D];
  SHARED float tops[SIMDS];
  SHARED float levels[LEVELS];
  SHARED float boundaries[LEVELS];
  threadgroup uint8_t* own_codes = codes + simd * D;
  device uint8_t* page = pages + (int64_t(head_at) * (tokens_shape[2] / 32) + page_at) * PAGE_BYTES;
  for (int i = simd * 32 + lane; i < LEVELS; i += SIMDS * 32) {
    levels[i] = table[i];
    boundaries[i] = table[BOUNDARIES + i];
  }
"""

_ENCODE = """
  float peak[TOKENS];
  float scale[TOKENS];
  float base = 0.0f;
  UNROLL for (int k = 0; k < TOKENS; k++) {
    float most = 0.0f;
    UNROLL for (int j = 0; j < J; j++) {
      if (good[k] == 0.0f || lane + 32 * j >= D) y[k * J + j] = 0.0f;
      most = larger(fabs(y[k * J + j]), most);
    }
    // |y| by way of its largest coordinate, so that squares neither overflow nor vanish.
    peak[k] = simd_max(most);
    float square = 0.0f;
    UNROLL for (int j = 0; j < J; j++) {
      const float unit = y[k * J + j] / larger(peak[k], TINY);
      square += unit * unit;
    }
    scale[k] = peak[k] * sqrt(simd_sum(square) / float(D));
    base = larger(scale[k], base);
  }
  if (lane == 0) tops[simd] = base;
  group_barrier();
  for (int s = 0; s < SIMDS; s++) base = larger(tops[s], base);
  group_barrier();
  float largest_scale = 0.0f;
  UNROLL for (int k = 0; k < TOKENS; k++) {
    const int rounded = scale_code(scale[k], base);
    const float middle = rounded == 255 ? 0.0f : exp2(float(rounded) * -0.03125f) * base;
    float best = 0.0f;
    float chosen = 0.0f;
    float factor = 0.0f;
    for (int i = 0; i < TRIED; i++) {
      const float steps = i == 0 ? 0.0f : (i % 2 == 0 ? STEP : -STEP) * float((i + 1) / 2);
      const float divisor = larger(middle * exp2(steps / 32.0f), TINY);
      float product = 0.0f;
      float square = 0.0f;
      UNROLL for (int j = 0; j < J; j++) {
        if (lane + 32 * j < D) {
          const float level = levels[nearest_code(y[k * J + j] / divisor, boundaries)];
          product += y[k * J + j] / larger(peak[k], TINY) * level;
          square += level * level;
        }
      }
      product = simd_sum(product);
      square = simd_sum(square);
      // The squared error that the scale of least squares leaves is |y|^2 - fit.
      const float fit = product * product / square;
      if (i == 0 || fit > best) {
        best = fit;
        chosen = divisor;
        factor = product / square;
      }
    }
    scale[k] = larger(peak[k] * factor, 0.0f);
    largest_scale = larger(scale[k], largest_scale);
    UNROLL for (int j = 0; j < J; j++) {
      if (lane + 32 * j < D) own_codes[lane + 32 * j] = uint8_t(nearest_code(y[k * J + j] / chosen, boundaries));
    }
    simd_barrier();
    const int token = simd * TOKENS + k;
"""

_PLANE = """\
    for (int i = lane; i < {row}; i += 32) {{
      int packed = 0;
      UNROLL for (int f = 0; f < {fields}; f++) packed |= (own_codes[f * {row} + i] >> {shift} & {mask}) << f * {width};
      page[{offset} + token * {row} + i] = uint8_t(packed);
    }}
"""

_ENCODE_END = """\
    simd_barrier();
  }
  if (lane == 0) tops[simd] = largest_scale;
  group_barrier();
  base = 0.0f;
  for (int s = 0; s < SIMDS; s++) base = larger(tops[s], base);
  UNROLL for (int k = 0; k < TOKENS; k++) {
    if (lane == 0) page[16 + simd * TOKENS + k] = uint8_t(good[k] > 0.0f ? scale_code(scale[k], base) : 254);
  }
  if (simd == 0 && lane < 4) ((device float*)page)[lane] = lane == 0 ? base : lane == 1 ? {step} : 0.0f;
"""

_CENTRE_END = """
  UNROLL for (int j = 0; j < J; j++) {
    const int e = lane + 32 * j;
    if (simd == 0 && e < D) centre[int64_t(head_at) * D + e] = number(clamped(mean[j]));
  }
"""

_LIMITS = {"float32": "3.402823466e38f", "float16": "65504.0f", "bfloat16": "3.3895313892515355e38f"}


def _tokens(fmt: PackedFormat, centre: str) -> str:
    balance = " / float(head[(int64_t(head_at) * 2 + 1) * D + e])" if fmt.centred else ""
    rotate = "" if fmt.folded else "    rows_rotate(own_work, table, lane);\n"
    return _TOKENS.format(balance=balance, rotate=rotate, centre=centre)


def _kernel(name: str, fmt: PackedFormat, dtype: str, outputs: str, body: str) -> Kernel:
    # 4 tokens a simdgroup, so that registers hold them; with very long ones threadgroup memory does not hold more.
    simdgroups = 8 if fmt.head_dim <= 512 else 4
    functions = _FUNCTIONS.replace("LIMIT", _LIMITS[dtype])
    if not fmt.folded:
        functions = of.BUTTERFLY + of.rotation("rows", fmt) + functions
    d, planes = fmt.head_dim, fmt.planes
    constants = {
        **{"D": d, "J": -(-d // 32), "SIMDS": simdgroups, "TOKENS": PAGE_TOKENS // simdgroups},
        **{"LEVELS": 2**fmt.bits, "BOUNDARIES": offsets(fmt)["boundaries"], "PAGE_BYTES": fmt.page_bytes},
        **{"CENTRE": fmt.centre_offset, "PLANES": planes[0][2]},
        "TRIED": len(SCALE_SEARCH) if fmt.bits <= SCALE_SEARCH_BITS else 1,
    }
    inputs = ("tokens", *(("head",) if fmt.centred else ()), "table")
    return Kernel(name, inputs, (outputs,), dtype, tuple(constants.items()), functions, body, simdgroups)


@cache
def encode_kernel(fmt: PackedFormat, dtype: str) -> Kernel:
    """Pages of whole pages of tokens; see `tqc.format.quantizer.encode_pages`.

    Grid, in threadgroups: (pages, batch * heads). tokens [batch, heads, n * 32, head_dim], head [batch, heads, 2,
    head_dim] in centred formats, pages uint8 [batch, heads, n, page_bytes].
    """
    assert SCALE_SEARCH == (0, -4, 4, -8, 8)
    encode = _ENCODE.replace("STEP", "4.0f").replace("TINY", "1.17549435e-38f")
    parts = [_BEGIN, _ENCODE_BEGIN, _tokens(fmt, " - float(head[int64_t(head_at) * 2 * D + e])" if fmt.centred else "")]
    parts += ["  group_barrier();\n", _MEAN, _PAGE_CENTRE] if fmt.centred else []
    parts.append(encode)
    for width, shift, offset in fmt.planes:
        row = fmt.head_dim * width // 8
        numbers = {"width": width, "shift": shift, "offset": offset, "row": row}
        parts.append(_PLANE.format(fields=8 // width, mask=2**width - 1, **numbers))
    parts.append(_ENCODE_END.replace("{step}", "step" if fmt.centred else "0.0f"))
    name = f"tqc_encode_d{fmt.head_dim}_b{fmt.bits}_{'centred' if fmt.centred else 'plain'}"
    return _kernel(name, fmt, dtype, "pages", "".join(parts))


@cache
def centre_kernel(fmt: PackedFormat, dtype: str) -> Kernel:
    """The centre of each head, [batch, heads, 1, head_dim], from its first page of tokens; see
    `tqc.format.quantizer.head_rows`. Grid: (1, batch * heads); the row of `head` with the balance alone is read."""
    body = _BEGIN + _tokens(fmt, "") + "  group_barrier();\n" + _MEAN + _CENTRE_END
    return _kernel(f"tqc_centre_d{fmt.head_dim}", fmt, dtype, "centre", body)
