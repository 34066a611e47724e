// Packed codes in the order that int8 products take them: units of 64 bytes, 4 tokens by 16 bytes of their rows.
#pragma once
#include "page.h"

namespace tqc {

constexpr int UNIT = 64;
constexpr int AS_BYTES = 0;   // in place of the bits: rows of planes are no whole number of 16 bytes, codes are unpacked first

// How the codes of a format are staged. Each 16 bytes of the narrowest plane's rows give `blocks` blocks of 16 elements.
struct Layout {
  int bits;  // 1 to 4 or AS_BYTES
  bool half;  // rows of the 1-bit plane are 8 bytes: staged twice, the second time shifted by one field
  int first_chunks, second_chunks;  // 16-byte pieces of a row of each plane; two planes for 3 bits alone

  explicit Layout(const Format& f) {
    const int narrowest = f.dim * (f.bits & -f.bits);
    half = f.dim == 64 && f.bits % 2;
    bits = half || narrowest % 128 == 0 ? f.bits : AS_BYTES;
    first_chunks = bits == AS_BYTES ? padded(f.dim) / 16 : std::max(1, f.dim * (bits == 3 ? 2 : bits) / 128);
    second_chunks = bits == 3 ? std::max(1, f.dim / 128) : 0;
  }
};

// The codes of some pages: [tokens / 4][chunks] units for each plane.
struct Staged {
  uint8_t *first, *second;
};

#if defined(__AVX512F__)
inline __m512i four_rows(const uint8_t* p, int stride) {
  auto row = [&](int i) { return _mm_loadu_si128((const __m128i*)(p + i * stride)); };
  __m512i x = _mm512_inserti32x4(_mm512_castsi128_si512(row(0)), row(1), 1);
  return _mm512_inserti32x4(_mm512_inserti32x4(x, row(2), 2), row(3), 3);
}

template <bool by_element>
inline void put_unit(uint8_t* out, __m512i x) {
  const __m512i order = _mm512_set_epi32(
      0x3f2f1f0f, 0x3e2e1e0e, 0x3d2d1d0d, 0x3c2c1c0c, 0x3b2b1b0b, 0x3a2a1a0a, 0x39291909, 0x38281808, 0x37271707,
      0x36261606, 0x35251505, 0x34241404, 0x33231303, 0x32221202, 0x31211101, 0x30201000);
  _mm512_store_si512(out, by_element ? _mm512_permutexvar_epi8(order, x) : x);
}

// Two units from 32 bytes each of tokens 0 and 1 in `a`, 2 and 3 in `b`.
template <bool by_element>
inline void put_units(uint8_t* out, __m512i a, __m512i b) {
  if (!by_element) {
    _mm512_store_si512(out, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_store_si512(out + UNIT, _mm512_shuffle_i32x4(a, b, 0xdd));
    return;
  }
  const __m512i order = _mm512_set_epi32(
      0x6f4f2f0f, 0x6e4e2e0e, 0x6d4d2d0d, 0x6c4c2c0c, 0x6b4b2b0b, 0x6a4a2a0a, 0x69492909, 0x68482808, 0x67472707,
      0x66462606, 0x65452505, 0x64442404, 0x63432303, 0x62422202, 0x61412101, 0x60402000);
  _mm512_store_si512(out, _mm512_permutex2var_epi8(a, order, b));
  _mm512_store_si512(out + UNIT, _mm512_permutex2var_epi8(a, order | _mm512_set1_epi8(16), b));
}

template <bool by_element, int stride>
inline void stage_rows_of(uint8_t* out, const uint8_t* rows) {
  for (int t = 0; t < PAGE; t += 4, rows += 4 * stride) {
    auto row = [&](int i, int c) { return _mm512_loadu_si512(rows + i * stride + 16 * c); };
    if constexpr (stride >= 64) {
      for (int c = 0; c < stride / 16; c += 4, out += 4 * UNIT) {
        put_units<by_element>(out, _mm512_shuffle_i32x4(row(0, c), row(1, c), 0x44), _mm512_shuffle_i32x4(row(2, c), row(3, c), 0x44));
        put_units<by_element>(out + 2 * UNIT, _mm512_shuffle_i32x4(row(0, c), row(1, c), 0xee), _mm512_shuffle_i32x4(row(2, c), row(3, c), 0xee));
      }
    } else if constexpr (stride == 32) {
      put_units<by_element>(out, row(0, 0), row(2, 0));
      out += 2 * UNIT;
    } else if constexpr (stride == 16) {
      put_unit<by_element>(out, row(0, 0));
      out += UNIT;
    } else {
      const __m512i twice = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3),
                                                     _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)rows)));
      put_unit<by_element>(out, _mm512_mask_srli_epi64(twice, 0xaa, twice, 1));
      out += UNIT;
    }
  }
}

template <bool by_element>
inline void stage_rows(uint8_t* out, const uint8_t* rows, int chunks, int stride) {
  switch (stride) {
    case 8: return stage_rows_of<by_element, 8>(out, rows);
    case 16: return stage_rows_of<by_element, 16>(out, rows);
    case 32: return stage_rows_of<by_element, 32>(out, rows);
    case 64: return stage_rows_of<by_element, 64>(out, rows);
    case 128: return stage_rows_of<by_element, 128>(out, rows);
  }
  for (int t = 0; t < PAGE; t += 4, rows += 4 * stride)
    for (int c = 0; c < chunks; ++c, out += UNIT) put_unit<by_element>(out, four_rows(rows + 16 * c, stride));
}
#else
inline b16 staged_row(const uint8_t* p, int stride) {
  typedef uint64_t two __attribute__((vector_size(16)));
  if (stride >= 16) return load_as<b16>(p);
  const uint64_t x = load_as<uint64_t>(p);
  return (b16)two{x, x >> 1};
}

template <bool by_element>
inline void stage_rows(uint8_t* out, const uint8_t* rows, int chunks, int stride) {
  for (int t = 0; t < PAGE; t += 4, rows += 4 * stride)
    for (int c = 0; c < chunks; ++c, out += UNIT) {
      b16 x[4];
      for (int i = 0; i < 4; ++i) x[i] = staged_row(rows + i * stride + 16 * c, stride);
      if (by_element) {
        const b16 low = zip_low<1>(x[0], x[1]), high = zip_high<1>(x[0], x[1]);
        const b16 low2 = zip_low<1>(x[2], x[3]), high2 = zip_high<1>(x[2], x[3]);
        x[0] = zip_low<2>(low, low2), x[1] = zip_high<2>(low, low2);
        x[2] = zip_low<2>(high, high2), x[3] = zip_high<2>(high, high2);
      }
      memcpy(out, x, UNIT);
    }
}
#endif

// Page number p of the staged ones. `by_element`: in each unit, the bytes of the 4 tokens alternate. `codes` is scratch
// of 64 rows of padded(dim).
template <bool by_element>
inline void stage_page(const Staged& to, int p, const uint8_t* page, uint8_t* codes, const Format& f, const Layout& layout) {
  const int units = p * PAGE / 4;
  if (layout.bits == AS_BYTES) {
    unpack_page(codes, padded(f.dim), page, f);
    return stage_rows<by_element>(to.first + units * layout.first_chunks * UNIT, codes, layout.first_chunks, padded(f.dim));
  }
  stage_rows<by_element>(to.first + units * layout.first_chunks * UNIT, page + f.planes[0].offset, layout.first_chunks,
                         f.dim * f.planes[0].width / 8);
  if (layout.bits == 3)
    stage_rows<by_element>(to.second + units * layout.second_chunks * UNIT, page + f.planes[1].offset,
                           layout.second_chunks, f.dim / 8);
}

}  // namespace tqc
