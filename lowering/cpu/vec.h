// Vectors of W floats on GCC vector extensions, and rows of the dense dtypes. One source for AVX-512, AVX2 and any other CPU.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tqc {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
constexpr int W = 16;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int PAD = 16;  // rows of float scratch are padded to this many elements

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint8_t vw __attribute__((vector_size(W)));
typedef uint8_t b16 __attribute__((vector_size(16)));

inline int padded(int n) { return (n + PAD - 1) / PAD * PAD; }

template <class V, class T>
inline V load_as(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline vf load(const float* p) { return load_as<vf>(p); }
inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
inline vf splat(float x) { return x - vf{}; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline vf vmin(vf a, vf b) { return a < b ? a : b; }
inline vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }

inline bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= mask[i];
  return bits;
#endif
}
inline float hsum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s = 0;
  for (int i = 0; i < W; ++i) s += v[i];
  return s;
#endif
}
inline float hmax(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float s = v[0];
  for (int i = 1; i < W; ++i) s = v[i] > s ? v[i] : s;
  return s;
#endif
}

// e**x for x <= 88, to about one unit in the last place; 0 or next to it below -87, NaN for NaN.
inline vf vexp(vf x) {
#if defined(__AVX512F__)
  x = (vf)_mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x);  // the second one where either is NaN
  const vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT);
#else
  x = x > 88.0f ? splat(88.0f) : x;
  const vf n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
#endif
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = r * (1.0f / 720) + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vu bits = (vu)p + ((vu)__builtin_convertvector(n, vi) << 23);
  return x < -87.0f ? vf{} : (vf)bits;
#endif
}

inline vf vtanh(vf x) {
  vf a = vmin(vabs(x), splat(20.0f));
  a = x != x ? x : a;
  vf y = 1.0f - 2.0f / (vexp(2.0f * a) + 1.0f);
  return x < 0.0f ? -y : y;
}

enum Dtype : int { F32 = 0, BF16 = 1, F16 = 2, BOOL = 3 };
inline int dtype_bytes(Dtype t) { return t == F32 ? 4 : t == BOOL ? 1 : 2; }

inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023, bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | fraction << 13;
  } else if (exponent) {
    bits = sign | (exponent + 112) << 23 | fraction << 13;
  } else {
    float f = float(fraction) * (1.0f / 16777216);
    return sign ? -f : f;
  }
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline uint16_t float_to_half(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {  // subnormal: let the addition of 0.5 round
    float shifted;
    memcpy(&shifted, &magnitude, 4);
    shifted += 0.5f;
    memcpy(&bits, &shifted, 4);
    return sign | (bits - 0x3f000000);
  }
  return sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

inline vf load_bf16(const uint16_t* p) {
  return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16);
}
inline void store_bf16(uint16_t* p, vf v) {
  vu bits = (vu)v;
  vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = v != v ? (bits >> 16) | 0x40 : rounded;
  vh h = __builtin_convertvector(rounded, vh);
  memcpy(p, &h, sizeof h);
}
inline vf load_f16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = half_to_float(p[i]);
  return v;
#endif
}
inline void store_f16(uint16_t* p, vf v) {
#if defined(__AVX512F__)
  __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  memcpy(p, &h, sizeof h);
#elif defined(__F16C__)
  __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  memcpy(p, &h, sizeof h);
#else
  for (int i = 0; i < W; ++i) p[i] = float_to_half(v[i]);
#endif
}

template <Dtype T>
inline vf load_vector(const void* p) {
  return T == F32 ? load((const float*)p) : T == BF16 ? load_bf16((const uint16_t*)p) : load_f16((const uint16_t*)p);
}
template <Dtype T>
inline void store_vector(void* p, vf v) {
  if (T == F32) store((float*)p, v);
  if (T == BF16) store_bf16((uint16_t*)p, v);
  if (T == F16) store_f16((uint16_t*)p, v);
}

template <Dtype T>
inline void row_to_float(float* out, const void* in, int n) {
  constexpr int bytes = T == F32 ? 4 : 2;
  const char* p = (const char*)in;
  int i = 0;
  for (; i + W <= n; i += W) store(out + i, load_vector<T>(p + i * bytes));
  if (i < n) {
    char rest[W * 4] = {};
    memcpy(rest, p + i * bytes, (n - i) * bytes);
    store(out + i, load_vector<T>(rest));
  }
}
// `out` has room for padded(n) floats; the padding up to a whole vector becomes zeros.
inline void to_float(float* out, const void* in, int n, Dtype t) {
  if (t == F32) return row_to_float<F32>(out, in, n);
  if (t == BF16) return row_to_float<BF16>(out, in, n);
  row_to_float<F16>(out, in, n);
}

template <Dtype T>
inline void row_from_float(void* out, const float* in, int n) {
  constexpr int bytes = T == F32 ? 4 : 2;
  char* p = (char*)out;
  int i = 0;
  for (; i + W <= n; i += W) store_vector<T>(p + i * bytes, load(in + i));
  if (i < n) {
    char rest[W * 4];
    store_vector<T>(rest, load(in + i));
    memcpy(p + i * bytes, rest, (n - i) * bytes);
  }
}
// `in` is readable up to padded(n).
inline void from_float(void* out, const float* in, int n, Dtype t) {
  if (t == F32) return row_from_float<F32>(out, in, n);
  if (t == BF16) return row_from_float<BF16>(out, in, n);
  row_from_float<F16>(out, in, n);
}

inline float scalar_to_float(const void* p, Dtype t) {
  if (t == F32) return *(const float*)p;
  uint16_t h = *(const uint16_t*)p;
  if (t == F16) return half_to_float(h);
  uint32_t bits = uint32_t(h) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

}  // namespace tqc
