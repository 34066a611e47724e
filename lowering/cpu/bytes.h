// Byte vectors for int8 products, as wide as the float vectors: AVX-512 (VBMI, VNNI), AVX2, NEON with dot products, and
// plain code that is right but too slow to be worth it.
#pragma once
#include "vec.h"
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace tqc {

constexpr int BYTES = 4 * W;
constexpr int LANES = W / 4;  // of 16 bytes
typedef uint8_t vb __attribute__((vector_size(BYTES)));
typedef uint64_t vq __attribute__((vector_size(BYTES)));
typedef int32_t i4 __attribute__((vector_size(16)));

#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool HAS_INT8 = true;
#else
constexpr bool HAS_INT8 = false;
#endif
// Largest byte that `dot4` takes on its unsigned side: AVX2 adds pairs of products in 16 bits, NEON reads it as signed.
constexpr int UNSIGNED_MAX = W == 16 ? 255 : 127;
constexpr int LEVEL_BIAS = (UNSIGNED_MAX + 1) / 2;
// Largest bits of codes whose levels are looked up as 16-bit numbers; with AVX2 it takes too many steps above.
constexpr int INT16_BITS = W == 8 ? 7 : 8;

// sum[i] + a[4i] b[4i] + ... + a[4i + 3] b[4i + 3]; a unsigned, b signed.
inline vi dot4(vi sum, vb a, vb b) {
#if defined(__AVX512F__)
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)a, (__m256i)b), _mm256_set1_epi16(1));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b);
#else
  for (int i = 0; i < BYTES; ++i) sum[i / 4] += int(a[i]) * int8_t(b[i]);
  return sum;
#endif
}

// table[code & mask] in each byte, for a table of at most 16 entries that is repeated up to 64.
inline vb pick(const uint8_t* table, vb codes, int mask) {
#if defined(__AVX512F__)
  return (vb)_mm512_permutexvar_epi8((__m512i)codes, _mm512_load_si512(table));
#elif defined(__AVX2__)
  return (vb)_mm256_shuffle_epi8(_mm256_load_si256((const __m256i*)table), (__m256i)(codes & uint8_t(mask)));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (vb)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)(codes & uint8_t(mask)));
#else
  for (int i = 0; i < BYTES; ++i) codes[i] = table[codes[i] & mask];
  return codes;
#endif
}

// sum[i] + a[2i] b[2i] + a[2i + 1] b[2i + 1] of signed 16-bit numbers.
inline vi dot2(vi sum, vb a, vb b) {
#if defined(__AVX512F__)
  return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__ARM_FEATURE_DOTPROD)
  const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  return sum + (vi)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#else
  int16_t x[BYTES / 2], y[BYTES / 2];
  memcpy(x, &a, BYTES), memcpy(y, &b, BYTES);
  for (int i = 0; i < BYTES / 2; ++i) sum[i / 2] += x[i] * y[i];
  return sum;
#endif
}

// table[code] in each byte, for codes of 5 to 8 bits.
template <int bits>
inline vb pick_of_many(const uint8_t* table, vb codes) {
#if defined(__AVX512F__)
  const __m512i* t = (const __m512i*)table;
  const __m512i x = (__m512i)codes;
  if constexpr (bits <= 6) return (vb)_mm512_permutexvar_epi8(x, t[0]);
  else if constexpr (bits == 7) return (vb)_mm512_permutex2var_epi8(t[0], x, t[1]);
  else return (vb)_mm512_mask_blend_epi8(_mm512_movepi8_mask(x), _mm512_permutex2var_epi8(t[0], x, t[1]),
                                         _mm512_permutex2var_epi8(t[2], x, t[3]));
#elif defined(__AVX2__)
  __m256i picked = _mm256_setzero_si256();
  for (int i = 0; i < 1 << bits; i += 16) {  // indices of other tables become 128 and more, which give 0
    const __m256i at = _mm256_adds_epu8(_mm256_xor_si256((__m256i)codes, _mm256_set1_epi8(i)), _mm256_set1_epi8(0x70));
    picked = _mm256_or_si256(picked, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_as<__m128i>(table + i)), at));
  }
  return (vb)picked;
#elif defined(__ARM_FEATURE_DOTPROD)
  uint8x16_t picked = vqtbl4q_u8(vld1q_u8_x4(table), (uint8x16_t)codes);
  for (int i = 64; i < 1 << bits; i += 64)
    picked = vqtbx4q_u8(picked, vld1q_u8_x4(table + i), (uint8x16_t)(codes - uint8_t(i)));
  return (vb)picked;
#else
  for (int i = 0; i < BYTES; ++i) codes[i] = table[codes[i]];
  return codes;
#endif
}

// The bits of a that are in `mask`, which is the same for each byte, and the others of b.
inline vb either(vb a, vb b, uint8_t mask) {
#if defined(__AVX512F__)
  return (vb)_mm512_ternarylogic_epi32(_mm512_set1_epi8(mask), (__m512i)a, (__m512i)b, 0xca);
#else
  return (a & mask) | (b & uint8_t(~mask));
#endif
}

// `size` bytes from p on, again and again; a power of two of at least 4.
template <int size>
inline vb repeat(const uint8_t* p) {
  if constexpr (size == BYTES) return load_as<vb>(p);
  else if constexpr (size == 4) return (vb)(load_as<uint32_t>(p) - vu{});
  else if constexpr (size == 8) return (vb)(load_as<uint64_t>(p) - vq{});
#if defined(__AVX512F__)
  else if constexpr (size == 16) return (vb)_mm512_broadcast_i32x4(load_as<__m128i>(p));
  else return (vb)_mm512_broadcast_i64x4(load_as<__m256i>(p));
#elif defined(__AVX2__)
  else return (vb)_mm256_broadcastsi128_si256(load_as<__m128i>(p));
#endif
}

// In each lane of 16 bytes, the low or high halves of a and b, `size` bytes of each in turn.
template <int size, bool high, class V, int... I>
inline V zip(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof(V) / size, lane = 16 / size;
  typedef std::conditional_t<size == 1, uint8_t, std::conditional_t<size == 2, uint16_t, std::conditional_t<size == 4, uint32_t, uint64_t>>> T;
  typedef T V2 __attribute__((vector_size(sizeof(V))));
  return (V)__builtin_shufflevector((V2)a, (V2)b, (I / lane * lane + (high ? lane / 2 : 0) + I % lane / 2 + I % 2 * n)...);
}
template <int size, class V>
inline V zip_low(V a, V b) { return zip<size, false>(a, b, std::make_integer_sequence<int, sizeof(V) / size>{}); }
template <int size, class V>
inline V zip_high(V a, V b) { return zip<size, true>(a, b, std::make_integer_sequence<int, sizeof(V) / size>{}); }

inline i4 lane(vi v, int i) {
#if defined(__AVX512F__)
  switch (i) {
    case 0: return (i4)_mm512_castsi512_si128((__m512i)v);
    case 1: return (i4)_mm512_extracti32x4_epi32((__m512i)v, 1);
    case 2: return (i4)_mm512_extracti32x4_epi32((__m512i)v, 2);
    default: return (i4)_mm512_extracti32x4_epi32((__m512i)v, 3);
  }
#elif defined(__AVX2__)
  return (i4)(i ? _mm256_extracti128_si256((__m256i)v, 1) : _mm256_castsi256_si128((__m256i)v));
#else
  return (i4)v;
#endif
}

}  // namespace tqc
