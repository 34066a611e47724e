// Packed codes as int8 products take them: units of 64 bytes, 4 tokens by 16 bytes of their rows, put together in
// registers from where they lie.
#pragma once
#include "page.h"

namespace tqc {

constexpr int UNIT = 64;
constexpr int PARTS = UNIT / BYTES;
// In place of the bits: codes are a byte each, unpacked first unless they have 8 bits. So it is with more than 4 bits,
// and where rows of planes are no whole number of 16 bytes.
constexpr int AS_BYTES = 0;

// How the codes of a format are read. Each 16 bytes of the narrowest plane's rows give `BLOCKS` blocks of 16 elements.
struct Layout {
  int bits;    // 1 to 4 or AS_BYTES
  int dim;     // 64 or 128, for which units have ways of their own, or 0
  int chunks;  // 16-byte pieces of a row of the narrowest plane
  bool many_steps;  // from codes to levels

  explicit Layout(const Format& f) {
    const int narrowest = f.dim * (f.bits & -f.bits);
    const bool half = f.dim == 64 && f.bits % 2;
    bits = f.bits <= INT8_BITS && (half || narrowest % 128 == 0) ? f.bits : AS_BYTES;
    dim = bits != AS_BYTES && (f.dim == 64 || f.dim == 128) ? f.dim : 0;
    many_steps = bits == 3 || f.bits == 8;
    chunks = bits == AS_BYTES ? padded(f.dim) / 16 : std::max(1, narrowest / 128);
  }
};

// The 1-bit plane's rows are 8 bytes: these are taken twice, the second time shifted by one field.
template <int bits, int dim>
constexpr bool HALF = dim == 64 && bits % 2;
template <int bits, int dim>
constexpr int BLOCKS = bits == AS_BYTES ? 1 : HALF<bits, dim> ? 4 : bits == 4 ? 2 : bits == 2 ? 4 : 8;

// The order in which sums take blocks: with 3 bits those of one chunk of the wider plane follow each other.
template <int bits, int dim>
constexpr int nth_block(int i) { return bits == 3 && !HALF<bits, dim> ? i % 4 * 2 + i / 4 : i; }

template <int shift>
inline vb shifted(vb x) {
  if constexpr (shift > 0) return (vb)((vu)x >> shift);
  else if constexpr (shift < 0) return (vb)((vu)x << -shift);
  else return x;
}

// A plane of pages that follow each other.
struct Rows {
  const uint8_t* first = nullptr;
  int64_t page_bytes = 0;
  int stride = 0;
  const uint8_t* at(int t) const { return first + t / PAGE * page_bytes + t % PAGE * stride; }
};

// The planes of some pages `page_bytes` apart; two for 3 bits alone. `scratch` has room for a page more, unpacked.
struct Planes {
  Rows first, second;

  Planes(const uint8_t* page, int64_t page_bytes, int pages, uint8_t* scratch, const Format& f, const Layout& layout) {
    if (f.bits == 8 && f.dim % 16 == 0) {
      first = rows(page, page_bytes, f, 0);
    } else if (layout.bits == AS_BYTES) {
      const int ld = padded(f.dim);
      for (int p = 0; p < pages; ++p) unpack_page(scratch + p * PAGE * ld, ld, page + p * page_bytes, f);
      first = {scratch, PAGE * ld, ld};
    } else {
      first = rows(page, page_bytes, f, 0);
      if (layout.bits == 3) second = rows(page, page_bytes, f, 1);
    }
  }

 private:
  static Rows rows(const uint8_t* page, int64_t page_bytes, const Format& f, int plane) {
    return {page + f.planes[plane].offset, page_bytes, f.dim * f.planes[plane].width / 8};
  }
};

// Chunk `chunk` of 4 rows. `by_element`: the bytes of the 4 tokens alternate. `known` is the stride where a way of its
// own pays, else 0.
#if defined(__AVX512F__)
// Indices of bytes: 16 times 4 bytes, each one further.
inline __m512i alternating(uint32_t first_bytes) {
  const vu piece = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (__m512i)(piece * 0x01010101 + first_bytes);
}

template <bool by_element, int known>
inline void unit(vb* out, const uint8_t* rows, int stride, int chunk) {
  auto permuted = [](__m512i x) { return by_element ? _mm512_permutexvar_epi8(alternating(0x30201000), x) : x; };
  __m512i x;
  if constexpr (known == 8) {
    const __m512i twice = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3),
                                                   _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)rows)));
    x = permuted(_mm512_mask_srli_epi64(twice, 0xaa, twice, 1));
  } else if constexpr (known == 16) {
    x = permuted(_mm512_loadu_si512(rows));
  } else if constexpr (known == 32) {
    const __m512i a = _mm512_loadu_si512(rows), b = _mm512_loadu_si512(rows + 64);
    x = by_element ? _mm512_permutex2var_epi8(a, alternating(0x60402000 + 0x10101010 * chunk), b)
        : chunk    ? _mm512_shuffle_i32x4(a, b, 0xdd)
                   : _mm512_shuffle_i32x4(a, b, 0x88);
  } else {
    auto row = [&](int i) { return _mm_loadu_si128((const __m128i*)(rows + i * stride + 16 * chunk)); };
    const __m256i a = _mm256_inserti128_si256(_mm256_castsi128_si256(row(0)), row(1), 1);
    const __m256i b = _mm256_inserti128_si256(_mm256_castsi128_si256(row(2)), row(3), 1);
    const __m512i low = _mm512_castsi256_si512(a);
    x = by_element ? _mm512_permutex2var_epi8(low, alternating(0x50401000), _mm512_castsi256_si512(b)) : _mm512_inserti64x4(low, b, 1);
  }
  *out = (vb)x;
}
#else
// LANES times 16 bytes.
template <class V, int... I>
inline V joined(const b16* x, std::integer_sequence<int, I...>) {
  if constexpr (sizeof...(I) == 16) return (V)x[0];
  else return (V)__builtin_shufflevector(x[0], x[1], I...);
}

template <bool by_element, int known>
inline void unit(vb* out, const uint8_t* rows, int stride, int chunk) {
  typedef uint64_t two __attribute__((vector_size(16)));
  b16 x[4];
  for (int i = 0; i < 4; ++i) {
    const uint64_t half = load_as<uint64_t>(rows + i * stride);
    x[i] = known == 8 ? (b16)two{half, half >> 1} : load_as<b16>(rows + i * stride + 16 * chunk);
  }
  if (by_element) {
    const b16 low = zip_low<1>(x[0], x[1]), high = zip_high<1>(x[0], x[1]);
    const b16 low2 = zip_low<1>(x[2], x[3]), high2 = zip_high<1>(x[2], x[3]);
    x[0] = zip_low<2>(low, low2), x[1] = zip_high<2>(low, low2);
    x[2] = zip_low<2>(high, high2), x[3] = zip_high<2>(high, high2);
  }
  for (int part = 0; part < PARTS; ++part) out[part] = joined<vb>(x + part * LANES, std::make_integer_sequence<int, BYTES>{});
}
#endif

// The same chunk of all planes of some tokens, 4 to a unit. For 3 bits the blocks of the narrower plane take two chunks
// of the wider one by turns.
template <int bits, int dim, bool by_element, int units>
struct Chunk {
  vb first[2][units * PARTS], second[units * PARTS];

  Chunk(const uint8_t* p, const uint8_t* p2, const Planes& planes, int chunks, int chunk) {
    constexpr bool two = bits == 3 && !HALF<bits, dim>;
    constexpr int stride = bits == 1 ? dim / 8 : bits == 4 ? dim / 2 : dim / 4;
    constexpr int known = stride > 32 ? 0 : stride;
    for (int i = 0; i < units; ++i) {
      for (int half = 0; half <= two; ++half)
        unit<by_element, known>(first[half] + i * PARTS, p + 4 * i * planes.first.stride, planes.first.stride, chunk + half * chunks);
      if constexpr (bits == 3)
        unit<by_element, dim / 8>(second + i * PARTS, p2 + 4 * i * planes.second.stride, planes.second.stride, chunk);
    }
  }

  // Bytes of levels of block number `block`.
  template <int block>
  vb levels(int i, const uint8_t* table) const {
    constexpr bool half = HALF<bits, dim>;
    constexpr int mask = bits == AS_BYTES ? 15 : (1 << bits) - 1;
    if constexpr (bits == 3) {
      const vb low = shifted<half ? 2 * block : block / 2 * 2>(first[half ? 0 : block % 2][i]);
      const vb high = shifted<(half ? 2 * block : block) - 2>(second[i]);
      return pick(table, either(low, high, 3), mask);
    } else {
      return pick(table, shifted<half ? 2 * block : bits * block>(first[0][i]), mask);
    }
  }
};

}  // namespace tqc
