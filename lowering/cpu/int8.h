// Scores and weighted sums of one page by int8 dot products (AVX-512 VBMI and VNNI), for codes of at most 4 bits: above, the error of the
// products would show beside that of the codes.
//
// Scores: the levels are bytes biased by 128, the rotated query is int8 with one scale per row. 16 tokens lie in the 16
// lanes: the packed rows are transposed by dwords, so that a dword holds 4 neighbouring elements of one token.
// Sums: the weights times the scales are uint8 with one scale per row and page, the levels int8. 16 elements lie in the
// 16 lanes: the packed rows of 4 tokens are interleaved by bytes, so that a dword holds one element of 4 tokens.
#pragma once
#include "page.h"

namespace tqc {

constexpr int INT8_BITS = 4;
constexpr int AS_BYTES = 0;  // in place of a width: codes unpacked to bytes beforehand, for awkward head dims

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

template <int bits>
struct Planes {
  static constexpr int fields = bits == AS_BYTES ? 1 : bits & 1 ? 8 : bits & 2 ? 4 : 2;  // of the narrowest plane
  static constexpr int widths[3] = {bits & 4, bits & 2, bits & 1};
};

// Packed rows of one page: where each plane begins, and the bytes of a row of the narrowest plane.
struct PackedRows {
  const uint8_t* plane[3];  // widths 4, 2 and 1; the first one alone for AS_BYTES
  int stride;               // of the narrowest plane
};

template <int bits>
inline PackedRows packed_rows(const uint8_t* page, const uint8_t* codes, int ld, const Format& f) {
  if (bits == AS_BYTES) return {{codes, nullptr, nullptr}, ld};
  PackedRows rows{};
  for (int p = 0; p < f.plane_count; ++p) {
    int width = f.planes[p].width;
    rows.plane[width == 4 ? 0 : width == 2 ? 1 : 2] = page + f.planes[p].offset;
  }
  rows.stride = f.dim / Planes<bits>::fields;
  return rows;
}

template <int shift>
inline __m512i shifted(__m512i x) {
  if constexpr (shift > 0) return _mm512_srli_epi32(x, shift);
  else if constexpr (shift < 0) return _mm512_slli_epi32(x, -shift);
  else return x;
}
// Bits [from, from + width) of each byte, moved to bit `to`.
template <int width, int from, int to>
inline __m512i field_of(__m512i x) {
  return _mm512_and_si512(shifted<from - to>(x), _mm512_set1_epi8(((1 << width) - 1) << to));
}

template <int bits>
inline __m512i levels_of(__m512i codes, __m512i table) {
  if constexpr (bits == AS_BYTES || bits > 4) return _mm512_permutexvar_epi8(codes, table);
  else return _mm512_shuffle_epi8(table, codes);
}

inline __m512i four_rows(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, __mmask16 dwords) {
  __m512i x = _mm512_castsi128_si512(_mm_maskz_loadu_epi32(dwords, a));
  x = _mm512_inserti32x4(x, _mm_maskz_loadu_epi32(dwords, b), 1);
  x = _mm512_inserti32x4(x, _mm_maskz_loadu_epi32(dwords, c), 2);
  return _mm512_inserti32x4(x, _mm_maskz_loadu_epi32(dwords, d), 3);
}
inline __m512i four_rows(const uint8_t* p, int64_t step) {
  auto row = [&](int i) { return _mm_loadu_si128((const __m128i*)(p + i * step)); };
  __m512i x = _mm512_castsi128_si512(row(0));
  x = _mm512_inserti32x4(x, row(1), 1);
  x = _mm512_inserti32x4(x, row(2), 2);
  return _mm512_inserti32x4(x, row(3), 3);
}

// out[dword][16 tokens] from 16 rows of `stride` bytes, a multiple of 4.
inline void transpose_dwords(__m512i* out, const uint8_t* rows, int stride) {
  if (stride == 8) {
    __m512i a = _mm512_loadu_si512(rows), b = _mm512_loadu_si512(rows + 64);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    out[0] = _mm512_permutex2var_epi32(a, even, b);
    out[1] = _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
    return;
  }
  for (int c = 0; c < stride; c += 16) {
    const int at = c + 16 <= stride ? c : stride >= 16 ? stride - 16 : 0;
    __m512i r[4];
    for (int k = 0; k < 4; ++k) {
      const uint8_t* p = rows + k * stride + at;
      if (stride >= 16) r[k] = four_rows(p, 4 * stride);
      else r[k] = four_rows(p, p + 4 * stride, p + 8 * stride, p + 12 * stride, (1 << stride / 4) - 1);
    }
    __m512i low = _mm512_unpacklo_epi32(r[0], r[1]), high = _mm512_unpackhi_epi32(r[0], r[1]);
    __m512i low2 = _mm512_unpacklo_epi32(r[2], r[3]), high2 = _mm512_unpackhi_epi32(r[2], r[3]);
    __m512i* o = out + at / 4;
    o[0] = _mm512_unpacklo_epi64(low, low2);
    o[1] = _mm512_unpackhi_epi64(low, low2);
    o[2] = _mm512_unpacklo_epi64(high, high2);
    o[3] = _mm512_unpackhi_epi64(high, high2);
  }
}

// Codes of 4 neighbouring elements of 16 tokens, in field `field` of the narrowest plane, dword j of `per_row`.
template <int bits, int field>
inline __m512i codes_by_token(const __m512i* const (&turned)[3], int j, int per_row) {
  constexpr int fields = Planes<bits>::fields;
  if constexpr (bits == AS_BYTES) return turned[0][j];
  __m512i codes = _mm512_setzero_si512();
  if constexpr (bits & 4) {
    constexpr int ratio = fields / 2;
    codes = field_of<4, field / ratio * 4, 0>(turned[0][field % ratio * per_row + j]);
  }
  if constexpr (bits & 2) {
    constexpr int ratio = fields / 4;
    codes = _mm512_or_si512(codes, field_of<2, field / ratio * 2, bits & 4 ? 4 : 0>(turned[1][field % ratio * per_row + j]));
  }
  if constexpr (bits & 1) codes = _mm512_or_si512(codes, field_of<1, field, bits - 1 ? (bits == 3 ? 2 : 4) : 0>(turned[2][j]));
  return codes;
}

template <int bits, int rows, int field>
inline void score_fields(__m512i (&sum)[rows][2], const __m512i* const (&turned)[2][3], int j, int per_row, __m512i table,
                         const int8_t* query, int ld) {
  __m512i low = levels_of<bits>(codes_by_token<bits, field>(turned[0], j, per_row), table);
  __m512i high = levels_of<bits>(codes_by_token<bits, field>(turned[1], j, per_row), table);
  for (int r = 0; r < rows; ++r) {
    int32_t four;
    memcpy(&four, query + r * ld + 4 * (field * per_row + j), 4);
    const __m512i q = _mm512_set1_epi32(four);
    sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], low, q);
    sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], high, q);
  }
  if constexpr (field + 1 < Planes<bits>::fields)
    score_fields<bits, rows, field + 1>(sum, turned, j, per_row, table, query, ld);
}

// Sum of level8 + 128 times query8 for 32 tokens and some rows: out [rows, 32].
template <int bits, int rows>
inline void score_rows(int32_t* out, const __m512i* const (&turned)[2][3], int per_row, __m512i table,
                       const int8_t* query, int ld) {
  __m512i sum[rows][2] = {};
  for (int j = 0; j < per_row; ++j) score_fields<bits, rows, 0>(sum, turned, j, per_row, table, query, ld);
  for (int r = 0; r < rows; ++r)
    for (int half = 0; half < 2; ++half) _mm512_storeu_si512(out + r * PAGE + 16 * half, sum[r][half]);
}

template <int bits>
inline void score_page(int32_t* out, const uint8_t* page, const uint8_t* codes, const int8_t* query, int count, int ld,
                       const Format& f) {
  const PackedRows packed = packed_rows<bits>(page, codes, ld, f);
  const __m512i table = _mm512_load_si512(f.levels8_biased);
  __m512i buffer[2 * 64 + 8];
  const __m512i* turned[2][3] = {};
  __m512i* next = buffer;
  for (int half = 0; half < 2; ++half)
    for (int p = 0; p < 3; ++p) {
      if (!packed.plane[p]) continue;
      const int width = 4 >> p;
      const int stride = bits == AS_BYTES ? ld : f.dim * width / 8;
      transpose_dwords(next, packed.plane[p] + 16 * half * stride, stride);
      turned[half][p] = next;
      next += stride / 4;
    }
  const int per_row = packed.stride / 4;
  int r = 0;
  for (; r + 4 <= count; r += 4) score_rows<bits, 4>(out + r * PAGE, turned, per_row, table, query + r * ld, ld);
  out += r * PAGE, query += r * ld;
  if (count - r == 3) score_rows<bits, 3>(out, turned, per_row, table, query, ld);
  if (count - r == 2) score_rows<bits, 2>(out, turned, per_row, table, query, ld);
  if (count - r == 1) score_rows<bits, 1>(out, turned, per_row, table, query, ld);
}

// 16 bytes of each of 4 tokens, byte by byte.
inline __m512i interleaved(const uint8_t* p, int stride, __m512i order) {
  return _mm512_permutexvar_epi8(order, stride == 16 ? _mm512_loadu_si512(p) : four_rows(p, stride));
}

// Level bytes of 16 elements of 4 tokens: block `block` of the `blocks` blocks that the loaded chunk spans.
template <int bits, bool half, int block>
inline __m512i codes_by_element(const __m512i (&four)[4], const __m512i (&two)[2], __m512i one) {
  // `half`: head_dim 64, where a 16-element block is two fields of the 1-bit plane.
  constexpr int fields = half ? 4 : Planes<bits>::fields;
  if constexpr (bits == AS_BYTES) return four[0];
  __m512i codes = _mm512_setzero_si512();
  if constexpr (bits & 4) codes = field_of<4, block / (fields / 2) * 4, 0>(four[block % (fields / 2)]);
  if constexpr (bits & 2)
    codes = _mm512_or_si512(codes, field_of<2, block / (fields / 4) * 2, bits & 4 ? 4 : 0>(two[block % (fields / 4)]));
  if constexpr (bits & 1)
    codes = _mm512_or_si512(codes, field_of<1, half ? 2 * block : block, bits - 1 ? (bits == 3 ? 2 : 4) : 0>(one));
  return codes;
}

template <int bits, bool half, int rows, int block, int end, int first>
inline void sum_blocks(__m512i (&sum)[rows][end - first], const __m512i (&four)[4], const __m512i (&two)[2], __m512i one,
                       __m512i table, const __m512i (&weight)[rows]) {
  const __m512i level = levels_of<bits>(codes_by_element<bits, half, block>(four, two, one), table);
  for (int r = 0; r < rows; ++r) sum[r][block - first] = _mm512_dpbusd_epi32(sum[r][block - first], weight[r], level);
  if constexpr (block + 1 < end)
    sum_blocks<bits, half, rows, block + 1, end, first>(sum, four, two, one, table, weight);
}

// out[r, e] += factor[r] * sum over 32 tokens of weight8 level8, for elements of the blocks [first, end) of chunk c.
template <int bits, bool half, int rows, int first, int end>
inline void sum_chunk(float* out, int ld, const PackedRows& packed, int c, __m512i table, const uint8_t* weights,
                      const float* factor, const Format& f) {
  const int s = half ? 16 : packed.stride;  // elements from one block to the next
  __m512i sum[rows][end - first] = {};
  const __m512i order = _mm512_set_epi32(
      0x3f2f1f0f, 0x3e2e1e0e, 0x3d2d1d0d, 0x3c2c1c0c, 0x3b2b1b0b, 0x3a2a1a0a, 0x39291909, 0x38281808, 0x37271707,
      0x36261606, 0x35251505, 0x34241404, 0x33231303, 0x32221202, 0x31211101, 0x30201000);
  for (int t = 0; t < PAGE; t += 4) {
    __m512i four[4], two[2], one = {};
    if constexpr (bits == AS_BYTES) four[0] = interleaved(packed.plane[0] + t * s + c, s, order);
    if constexpr (bits & 4) {
      constexpr int fields = half ? 4 : Planes<bits>::fields;
      const int stride = s * fields / 2;
      for (int i = 0; i < fields / 2; ++i)
        four[i] = interleaved(packed.plane[0] + t * stride + c + i * s, stride, order);
    }
    if constexpr (bits & 2) {
      constexpr int fields = half ? 4 : Planes<bits>::fields;
      const int stride = s * fields / 4;
      for (int i = 0; i < fields / 4; ++i)
        two[i] = interleaved(packed.plane[1] + t * stride + c + i * s, stride, order);
    }
    if constexpr (bits & 1) {
      if constexpr (half) {
        const __m256i rows32 = _mm256_loadu_si256((const __m256i*)(packed.plane[2] + t * 8));
        const __m512i twice = _mm512_set_epi32(0x1f170f07, 0x1e160e06, 0x1d150d05, 0x1c140c04, 0x1b130b03, 0x1a120a02,
                                               0x19110901, 0x18100800, 0x1f170f07, 0x1e160e06, 0x1d150d05, 0x1c140c04,
                                               0x1b130b03, 0x1a120a02, 0x19110901, 0x18100800);
        one = _mm512_permutexvar_epi8(twice, _mm512_castsi256_si512(rows32));
        one = _mm512_mask_srli_epi32(one, 0xff00, one, 1);
      } else {
        one = interleaved(packed.plane[2] + t * s + c, s, order);
      }
    }
    __m512i weight[rows];
    for (int r = 0; r < rows; ++r) {
      int32_t w;
      memcpy(&w, weights + r * PAGE + t, 4);
      weight[r] = _mm512_set1_epi32(w);
    }
    sum_blocks<bits, half, rows, first, end, first>(sum, four, two, one, table, weight);
  }
  for (int r = 0; r < rows; ++r)
    for (int block = first; block < end; ++block) {
      float* o = out + r * ld + block * s + c;
      store(o, load(o) + splat(factor[r]) * (vf)_mm512_cvtepi32_ps(sum[r][block - first]));
    }
}

template <int bits, bool half, int rows>
inline void sum_rows(float* out, int ld, const PackedRows& packed, __m512i table, const uint8_t* weights,
                     const float* factor, const Format& f) {
  constexpr int blocks = half ? 4 : Planes<bits>::fields;
  const int span = half ? 16 : packed.stride;
  for (int c = 0; c < span; c += 16) {
    if constexpr (blocks <= 4) {
      sum_chunk<bits, half, rows, 0, blocks>(out, ld, packed, c, table, weights, factor, f);
    } else {
      sum_chunk<bits, half, rows, 0, 4>(out, ld, packed, c, table, weights, factor, f);
      sum_chunk<bits, half, rows, 4, 8>(out, ld, packed, c, table, weights, factor, f);
    }
  }
}

template <int bits, bool half>
inline void sum_page(float* out, int ld, const uint8_t* page, const uint8_t* codes, const uint8_t* weights,
                     const float* factor, int count, const Format& f) {
  const PackedRows packed = packed_rows<bits>(page, codes, ld, f);
  const __m512i table = _mm512_load_si512(f.levels8);
  int r = 0;
  for (; r + 4 <= count; r += 4)
    sum_rows<bits, half, 4>(out + r * ld, ld, packed, table, weights + r * PAGE, factor + r, f);
  out += r * ld, weights += r * PAGE, factor += r;
  if (count - r == 3) sum_rows<bits, half, 3>(out, ld, packed, table, weights, factor, f);
  if (count - r == 2) sum_rows<bits, half, 2>(out, ld, packed, table, weights, factor, f);
  if (count - r == 1) sum_rows<bits, half, 1>(out, ld, packed, table, weights, factor, f);
}

using ScorePage = void (*)(int32_t*, const uint8_t*, const uint8_t*, const int8_t*, int, int, const Format&);
using SumPage = void (*)(float*, int, const uint8_t*, const uint8_t*, const uint8_t*, const float*, int, const Format&);

inline bool scores_from_planes(const Format& f) { return f.dim * (f.bits & -f.bits) / 8 % 4 == 0; }
inline bool sums_from_planes(const Format& f) {
  return f.dim * (f.bits & -f.bits) / 8 % 16 == 0 || (f.dim == 64 && f.bits & 1);
}
inline ScorePage score_page_of(const Format& f) {
  constexpr ScorePage pages[] = {score_page<AS_BYTES>, score_page<1>, score_page<2>, score_page<3>, score_page<4>};
  return f.bits > INT8_BITS ? nullptr : pages[scores_from_planes(f) ? f.bits : AS_BYTES];
}
inline SumPage sum_page_of(const Format& f) {
  constexpr SumPage pages[] = {sum_page<AS_BYTES, false>, sum_page<1, false>, sum_page<2, false>, sum_page<3, false>,
                               sum_page<4, false>};
  constexpr SumPage halves[] = {nullptr, sum_page<1, true>, nullptr, sum_page<3, true>};
  if (f.bits > INT8_BITS) return nullptr;
  if (!sums_from_planes(f)) return pages[AS_BYTES];
  return f.dim == 64 && f.bits & 1 ? halves[f.bits] : pages[f.bits];
}

// q8 = round(q / step) for one row of padded(dim); returns the step. `bias_sum` is 128 times the sum of q8.
inline float quantize_query(int8_t* out, const float* q, int ld, int32_t* bias_sum) {
  vf top{};
  for (int i = 0; i < ld; i += W) top = vmax(vabs(load(q + i)), top);
  const float peak = hmax(top), inverse = peak > 0 ? 127.0f / peak : 0.0f;
  int32_t sum = 0;
  for (int i = 0; i < ld; i += 16) {
    const __m512i x = _mm512_cvtps_epi32((__m512)(load(q + i) * inverse));
    _mm_storeu_si128((__m128i*)(out + i), _mm512_cvtsepi32_epi8(x));
    sum += _mm512_reduce_add_epi32(x);
  }
  *bias_sum = 128 * sum;
  return peak / 127.0f;
}

// w8 = round(w / step) for the 32 weights of one row, each >= 0; returns the step, or NaN if a weight is not finite.
inline float quantize_weights(uint8_t* out, const float* w) {
  const __m512 a = _mm512_loadu_ps(w), b = _mm512_loadu_ps(w + 16);
  if (_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q)) return NAN;
  const float peak = _mm512_reduce_max_ps(_mm512_max_ps(a, b));
  const __m512 inverse = _mm512_set1_ps(peak > 0 ? 255.0f / peak : 0.0f);
  _mm_storeu_si128((__m128i*)out, _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(a, inverse))));
  _mm_storeu_si128((__m128i*)(out + 16), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(b, inverse))));
  return peak / 255.0f;
}
#else
using ScorePage = void (*)(int32_t*, const uint8_t*, const uint8_t*, const int8_t*, int, int, const Format&);
using SumPage = void (*)(float*, int, const uint8_t*, const uint8_t*, const uint8_t*, const float*, int, const Format&);
inline bool scores_from_planes(const Format&) { return true; }
inline bool sums_from_planes(const Format&) { return true; }
inline ScorePage score_page_of(const Format&) { return nullptr; }
inline SumPage sum_page_of(const Format&) { return nullptr; }
inline float quantize_query(int8_t*, const float*, int, int32_t*) { return 0; }
inline float quantize_weights(uint8_t*, const float*) { return 0; }
#endif

}  // namespace tqc
