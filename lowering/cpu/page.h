// Decoding of one page: codes, levels, scales and centres.
#pragma once
#include "linear.h"

namespace tqc {

template <class Block, int width>
inline void unpack_row(uint8_t* out, const uint8_t* in, int stride, int shift) {
  constexpr int size = sizeof(Block);
  Block mask;
  memset(&mask, (1 << width) - 1, size);
  for (int field = 0; field < 8 / width; ++field, out += stride)
    for (int i = 0; i < stride; i += size) {
      const int at = i + size <= stride ? i : stride - size;  // the last block overlaps the one before
      Block value = ((load_as<Block>(in + at) >> (field * width)) & mask) << shift;
      memcpy(out + at, &value, size);
    }
}

template <int width>
inline void unpack_rows(uint8_t* out, int ld, const uint8_t* in, int dim, int shift) {
  const int stride = dim * width / 8;
  for (int t = 0; t < PAGE; ++t, in += stride, out += ld) {
    if (stride >= 16) unpack_row<b16, width>(out, in, stride, shift);
    else if (stride >= 8) unpack_row<uint64_t, width>(out, in, stride, shift);
    else unpack_row<uint8_t, width>(out, in, stride, shift);
  }
}

// The codes of some elements of a token, put together from all planes: `in` are its rows from byte i of the narrowest
// plane's `stride` on, and `field` is the field there.
template <class Block, int bits, int field>
inline Block merged(const uint8_t* const* in, int stride) {
  Block code{}, mask;
  int shift = 0;
  auto add = [&](auto width) {
    if constexpr (bits & width) {
      constexpr int ratio = width / (bits & -bits);  // of the plane's stride to the narrowest one's
      memset(&mask, (1 << width) - 1, sizeof mask);
      code |= ((load_as<Block>(*in++ + field % ratio * stride) >> (field / ratio * width)) & mask) << shift;
      shift += width;
    }
  };
  add(std::integral_constant<int, 4>{});
  add(std::integral_constant<int, 2>{});
  add(std::integral_constant<int, 1>{});
  return code;
}

template <class Block, int bits, int... field>
inline void merge_planes(uint8_t* out, int ld, const uint8_t* page, const Format& f,
                         std::integer_sequence<int, field...>) {
  const int stride = f.dim / int(sizeof...(field));
  for (int t = 0; t < PAGE; ++t, out += ld)
    for (int i = 0; i < stride; i += sizeof(Block)) {
      const uint8_t* in[3];
      for (int p = 0; p < f.plane_count; ++p)
        in[p] = page + f.planes[p].offset + t * (f.dim * f.planes[p].width / 8) + i;
      auto put = [&](int at, Block code) { memcpy(out + at * stride + i, &code, sizeof code); };
      (put(field, merged<Block, bits, field>(in, stride)), ...);
    }
}
template <int bits>
inline bool merge_planes(uint8_t* out, int ld, const uint8_t* page, const Format& f) {
  constexpr int fields = 8 / (bits & -bits);
  const std::make_integer_sequence<int, fields> each{};
  if (f.dim % (16 * fields) == 0) merge_planes<b16, bits>(out, ld, page, f, each);
  else if (f.dim % (8 * fields) == 0) merge_planes<uint64_t, bits>(out, ld, page, f, each);
  else return false;
  return true;
}

// Codes of a page, [32, ld] bytes; what lies between dim and ld is left as it was. `out` has room for 64 rows: where
// planes cannot be merged by whole blocks, those behind the first are unpacked there, since reading back what was just
// written in pieces would stall.
inline void unpack_page(uint8_t* out, int ld, const uint8_t* page, const Format& f) {
  switch (f.bits) {
    case 3: if (merge_planes<3>(out, ld, page, f)) return; break;
    case 5: if (merge_planes<5>(out, ld, page, f)) return; break;
    case 6: if (merge_planes<6>(out, ld, page, f)) return; break;
    case 7: if (merge_planes<7>(out, ld, page, f)) return; break;
  }
  for (int p = 0; p < f.plane_count; ++p) {
    const Plane& plane = f.planes[p];
    uint8_t* to = p ? out + PAGE * ld : out;
    const uint8_t* in = page + plane.offset;
    switch (plane.width) {
      case 8: unpack_rows<8>(to, ld, in, f.dim, plane.shift); break;
      case 4: unpack_rows<4>(to, ld, in, f.dim, plane.shift); break;
      case 2: unpack_rows<2>(to, ld, in, f.dim, plane.shift); break;
      case 1: unpack_rows<1>(to, ld, in, f.dim, plane.shift); break;
    }
    for (int i = 0; p && i < PAGE * ld; i += 16) {
      const b16 merged = load_as<b16>(out + i) | load_as<b16>(to + i);
      memcpy(out + i, &merged, 16);
    }
  }
}

#if defined(__AVX512F__)
// Levels in registers, 32 to a permute; for 8 bits it takes 8 of them, which is still faster than a gather.
template <int tables>
inline void look_up_of(float* out, const uint8_t* codes, int count, const float* levels) {
  __m512 low[tables], high[tables];
  for (int k = 0; k < tables; ++k) {
    low[k] = _mm512_loadu_ps(levels + 32 * k);
    high[k] = _mm512_loadu_ps(levels + 32 * k + 16);
  }
  for (int i = 0; i < count; i += 16) {
    const __m512i code = _mm512_cvtepu8_epi32(load_as<__m128i>(codes + i));
    __m512 level = _mm512_permutex2var_ps(low[0], code, high[0]);
    for (int k = 1; k < tables; ++k)
      level = _mm512_mask_mov_ps(level, _mm512_cmpge_epi32_mask(code, _mm512_set1_epi32(32 * k)),
                                 _mm512_permutex2var_ps(low[k], code, high[k]));
    _mm512_storeu_ps(out + i, level);
  }
}
#endif

// out[i] = levels[codes[i]]; count is a multiple of 16.
inline void look_up(float* out, const uint8_t* codes, int count, const Format& f) {
#if defined(__AVX512F__)
  switch (f.bits) {
    case 6: return look_up_of<2>(out, codes, count, f.levels);
    case 7: return look_up_of<4>(out, codes, count, f.levels);
    case 8: return look_up_of<8>(out, codes, count, f.levels);
    default: return look_up_of<1>(out, codes, count, f.levels);
  }
#elif defined(__AVX2__)
  for (int i = 0; i < count; i += 8)
    _mm256_storeu_ps(out + i,
                     _mm256_i32gather_ps(f.levels, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(codes + i))), 4));
#else
  for (int i = 0; i < count; ++i) out[i] = f.levels[codes[i]];
#endif
}

inline float read_float(const uint8_t* p) {
  float x;
  memcpy(&x, p, 4);
  return x;
}

// Scale of each token of the page, out [32].
inline void page_scales(float* out, const uint8_t* page) {
  float base = read_float(page);
  const uint8_t* code = page + SCALES_OFFSET;
#if defined(__AVX512F__)
  __m512 low = _mm512_loadu_ps(scale_factors), high = _mm512_loadu_ps(scale_factors + 16);
  for (int i = 0; i < PAGE; i += 16) {
    __m512i c = _mm512_cvtepu8_epi32(load_as<__m128i>(code + i));
    __m512 factor = _mm512_permutex2var_ps(low, c, high);
    __m512i exponent = _mm512_slli_epi32(_mm512_srli_epi32(c, 5), 23);
    factor = _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(factor), exponent));
    factor = _mm512_mask_mov_ps(factor, _mm512_cmpeq_epi32_mask(c, _mm512_set1_epi32(SCALE_NAN)),
                                _mm512_set1_ps(NAN));
    factor = _mm512_maskz_mov_ps(_mm512_cmpneq_epi32_mask(c, _mm512_set1_epi32(SCALE_ZERO)), factor);
    _mm512_storeu_ps(out + i, _mm512_mul_ps(factor, _mm512_set1_ps(base)));
  }
#else
  for (int i = 0; i < PAGE; ++i) out[i] = scale_factors[code[i]] * base;
#endif
}

// Low nibbles of some bytes, then their high ones; writes whole vectors.
inline void unpack_nibbles(uint8_t* out, const uint8_t* in, int count) {
  if (count % 16) {
    for (int i = 0; i < count; ++i) out[i] = in[i] & 15, out[count + i] = in[i] >> 4;
    return;
  }
  for (int i = 0; i < count; i += 16) {
    const b16 x = load_as<b16>(in + i), low = x & 15, high = x >> 4;
    memcpy(out + i, &low, 16);
    memcpy(out + count + i, &high, 16);
  }
}

// The page's own centre, out [padded(dim)], zeros behind dim.
inline void page_centre(float* out, const uint8_t* page, const Format& f) {
  const float step = read_float(page + 4);
  uint8_t codes[512];
  unpack_nibbles(codes, page + f.centre_offset, f.dim / 2);
  for (int i = 0; i < f.dim; i += W)
    store(out + i, (__builtin_convertvector(load_as<vw>(codes + i), vf) - float(CENTRE_ZERO)) * step);
  for (int i = f.dim; i < padded(f.dim); ++i) out[i] = 0;
}

// Decoded tokens [offset, offset + count) of a page, in the model's basis: out [count, padded(dim)].
// `rotated` is scratch of 32 rows of padded(dim), `codes` of 64.
inline void decode_page(float* out, const uint8_t* page, const HeadRows& head, const Format& f, int offset, int count,
                        uint8_t* codes, float* rotated) {
  int ld = padded(f.dim);
  float scales[PAGE], centre[512];
  unpack_page(codes, ld, page, f);
  page_scales(scales, page);
  look_up(rotated, codes + offset * ld, count * ld, f);
  if (f.centred) {
    page_centre(centre, page, f);
    for (int i = 0; i < ld; i += W) store(centre + i, load(centre + i) + load(head.centre + i));
  }
  for (int t = 0; t < count; ++t) {
    vf scale = splat(scales[offset + t]);
    float* row = rotated + t * ld;
    for (int i = 0; i < ld; i += W) {
      vf y = load(row + i) * scale;
      store(row + i, f.centred ? y + load(centre + i) : y);
    }
    for (int i = f.dim; i < ld; ++i) row[i] = 0;
  }
  unrotate_rows(out, rotated, count, f, head.balance);
}

}  // namespace tqc
