// Encoding of one page, step by step as the reference does it.
#pragma once
#include <cfloat>

#include "page.h"

namespace tqc {

inline vf gather_boundaries(vi index, const Format& f) {
#if defined(__AVX512F__)
  if (f.bits <= 5)
    return (vf)_mm512_permutex2var_ps(_mm512_loadu_ps(f.boundaries), (__m512i)index, _mm512_loadu_ps(f.boundaries + 16));
  return (vf)_mm512_i32gather_ps((__m512i)index, f.boundaries, 4);
#elif defined(__AVX2__)
  return (vf)_mm256_i32gather_ps(f.boundaries, (__m256i)index, 4);
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = f.boundaries[index[i]];
  return v;
#endif
}

// Number of boundaries below each x, by bisection without branches.
inline vi search(vf x, const Format& f) {
  vi code{};
  for (int half = 1 << (f.bits - 1); half; half >>= 1) code += (x > gather_boundaries(code + (half - 1), f)) & half;
  return code;
}

inline bool all_finite(const float* x, int n) {
  vf sum{};
  for (int i = 0; i < n; i += W) sum += load(x + i) * 0.0f;
  return hsum(sum) == 0.0f;
}

// Bit t is set for row t if it holds a NaN or an infinity.
inline uint32_t bad_rows(const float* x, int ld) {
  uint32_t bad = 0;
  for (int t = 0; t < PAGE; ++t) bad |= uint32_t(!all_finite(x + t * ld, ld)) << t;
  return bad;
}

// Mean of the rows that are not bad, out [ld].
inline void good_mean(float* out, const float* y, int ld, uint32_t bad) {
  int count = 0;
  for (int t = 0; t < PAGE; ++t) count += !(bad >> t & 1);
  vf divisor = splat(float(count ? count : 1));
  for (int i = 0; i < ld; i += W) {
    vf sum{};
    for (int t = 0; t < PAGE; ++t)
      if (!(bad >> t & 1)) sum += load(y + t * ld + i) / divisor;
    store(out + i, sum);
  }
}

// Scales tried for each vector, in steps of the scale code around its root mean square.
constexpr int SCALE_SEARCH[] = {0, -4, 4, -8, 8};
constexpr int SCALE_SEARCH_BITS = 5;  // wider codes err little as it is

inline int scale_code(float scale, float base) {
  float ratio = base > 0 ? scale / base : 0.0f;
  if (!(ratio > 0)) return SCALE_ZERO;
  float code = std::nearbyint(-32.0f * std::log2(ratio));
  return code < 0 ? 0 : code > SCALE_NAN - 1 ? SCALE_NAN - 1 : int(code);
}

inline void pack_row(uint8_t* page, const uint8_t* codes, int t, const Format& f) {
  for (int p = 0; p < f.plane_count; ++p) {
    const Plane& plane = f.planes[p];
    int fields = 8 / plane.width, stride = f.dim / fields, mask = (1 << plane.width) - 1;
    uint8_t* out = page + plane.offset + t * stride;
    memset(out, 0, stride);
    for (int field = 0; field < fields; ++field)
      for (int i = 0; i < stride; ++i)
        out[i] |= ((codes[field * stride + i] >> plane.shift) & mask) << (field * plane.width);
  }
}

// Head centre from the first page, x [32, padded(dim)] as it came; `y` is scratch of the same shape.
inline void head_centre(float* out, const float* x, float* y, Dtype dtype, const Format& f) {
  const int ld = padded(f.dim);
  rotate_rows(y, x, PAGE, f);
  good_mean(out, y, ld, bad_rows(y, ld));
  const float limit = dtype == F16 ? 65504.0f : dtype == BF16 ? 3.3895314e38f : FLT_MAX;
  for (int i = 0; i < ld; i += W) store(out + i, vmax(vmin(load(out + i), splat(limit)), splat(-limit)));
}

// Encode x [32, padded(dim)], zeros in the padding; `r` is scratch of the same shape.
inline void encode_page(uint8_t* page, const float* x, float* r, const float* centre, const Format& f) {
  const int ld = padded(f.dim);
  rotate_rows(r, x, PAGE, f);
  if (f.centred)
    for (int t = 0; t < PAGE; ++t)
      for (int i = 0; i < ld; i += W) store(r + t * ld + i, load(r + t * ld + i) - load(centre + i));
  const uint32_t bad = bad_rows(r, ld);
  memset(page, 0, f.page_bytes);
  alignas(64) float mean[512], real[512];
  for (int i = 0; i < ld; ++i) real[i] = i < f.dim;
  if (f.centred) {
    good_mean(mean, r, ld, bad);
    float peak = 0;
    for (int i = 0; i < f.dim; ++i) peak = std::max(peak, std::fabs(mean[i]));
    const float step = peak / CENTRE_LIMIT;
    memcpy(page + 4, &step, 4);
    for (int i = 0; i < f.dim; ++i) {
      float code = std::nearbyint(mean[i] / step);
      if (!std::isfinite(code)) code = 0;
      page[f.centre_offset + i % (f.dim / 2)] |= (int(code) + CENTRE_ZERO) << (i < f.dim / 2 ? 0 : 4);
      mean[i] = code * step;
    }
    for (int i = f.dim; i < ld; ++i) mean[i] = 0;
    for (int t = 0; t < PAGE; ++t)
      for (int i = 0; i < ld; i += W) store(r + t * ld + i, load(r + t * ld + i) - load(mean + i));
  }
  for (int t = 0; t < PAGE; ++t)
    if (bad >> t & 1) memset(r + t * ld, 0, ld * sizeof(float));

  float peaks[PAGE], scales[PAGE], base = 0;
  for (int t = 0; t < PAGE; ++t) {
    float* row = r + t * ld;
    vf top{};
    for (int i = 0; i < ld; i += W) top = vmax(top, vabs(load(row + i) * load(real + i)));
    peaks[t] = hmax(top);
    vf divisor = splat(std::max(peaks[t], FLT_MIN)), squares{};
    for (int i = 0; i < ld; i += W) {
      vf unit = load(row + i) * load(real + i) / divisor;
      squares += unit * unit;
    }
    scales[t] = peaks[t] * std::sqrt(hsum(squares) / f.dim);
    base = std::max(base, scales[t]);
  }
  float corrected[PAGE], top = 0;
  for (int t = 0; t < PAGE; ++t) {
    const float* row = r + t * ld;
    const float scale = scale_factors[scale_code(scales[t], base)] * base;
    const vf by = splat(std::max(peaks[t], FLT_MIN));
    uint8_t codes[512], tried[512];
    float best = -1.0f;
    for (int steps : SCALE_SEARCH) {
      if (steps != 0 && f.bits > SCALE_SEARCH_BITS) break;
      vf divisor = splat(std::max(scale * std::exp2(steps / 32.0f), FLT_MIN)), product{}, square{};
      for (int i = 0; i < ld; i += W) {
        vf x_i = load(row + i);
        vi code = search(x_i / divisor, f);
        vf level;
        for (int lane = 0; lane < W; ++lane) level[lane] = f.levels[code[lane]];
        level *= load(real + i);
        product += x_i / by * level;
        square += level * level;
        for (int lane = 0; lane < W; ++lane) tried[i + lane] = uint8_t(code[lane]);
      }
      const float dot = hsum(product), energy = hsum(square), fit = dot * dot / energy;
      if (fit > best) {
        best = fit;
        corrected[t] = std::max(peaks[t] * dot / energy, 0.0f);
        memcpy(codes, tried, f.dim);
      }
    }
    top = std::max(top, corrected[t]);
    pack_row(page, codes, t, f);
  }
  memcpy(page, &top, 4);
  for (int t = 0; t < PAGE; ++t)
    page[SCALES_OFFSET + t] = (bad >> t & 1) ? SCALE_NAN : scale_code(corrected[t], top);
}

}  // namespace tqc
