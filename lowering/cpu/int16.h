// Scores and weighted sums of whole pages by int16 products, for codes of 5 to 8 bits: as int8.h has them, with levels
// looked up as two bytes, and each vector of codes making two of levels.
#pragma once
#include "int8.h"

namespace tqc {

static_assert(int64_t(TILE) * LEVEL16_MAX * WEIGHT16_MAX <= INT32_MAX);

// Levels of the low and the high half of each 16 bytes of codes. `table`: see Format::levels16.
template <int bits>
inline void levels_of(vb (&out)[2], vb codes, const uint8_t* table) {
  const vb low = pick_of_many<bits>(table, codes), high = pick_of_many<bits>(table + 256, codes);
  out[0] = zip_low<1>(low, high);
  out[1] = zip_high<1>(low, high);
}

// The query of `a` is of 16-bit numbers, pieces of 8 elements.
template <int bits, int rows>
inline void score_words(const ScoreArgs& a, int row, Prefetch& ahead) {
  constexpr int vectors = rows > 4 ? 2 : 4;
  const int8_t* query = a.query + row * a.layout.chunks * 2 * BYTES;
  const int stride = a.planes.first.stride;
  for (int t = 0; t < a.tokens; t += W) {
    ahead.step();
    vi pairs[rows][2];
    for (int begin = 0; begin < 4; begin += vectors) {
      const uint8_t* first = a.planes.first.at(t + begin * LANES);
      vi sum[rows][vectors] = {};
      for (int c = 0; c < a.layout.chunks; ++c) {
        vb codes[vectors], level[vectors][2];
        for (int i = 0; i < vectors; i += PARTS) unit<false, 0>(codes + i, first + 4 * i / PARTS * stride, stride, c);
        for (int j = 0; j < vectors; ++j) levels_of<bits>(level[j], codes[j], a.table);
        for (int half = 0; half < 2; ++half)
          for (int r = 0; r < rows; ++r) {
            const vb q = load_as<vb>(query + ((2 * c + half) * rows + r) * BYTES);
            for (int j = 0; j < vectors; ++j) sum[r][j] = dot2(sum[r][j], level[j][half], q);
          }
      }
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < vectors; i += 2) pairs[r][(begin + i) / 2] = halves_by_lane<4>(sum[r][i], sum[r][i + 1]);
    }
    put_scores<rows>(a, row, t, pairs);
  }
}

// The weights of `a` are 16-bit numbers. A dword holds one element of 2 tokens.
template <int bits, int rows>
inline void sum_words(const SumArgs& a, int row, Prefetch& ahead) {
  const int stride = a.planes.first.stride;
  for (int c = 0; c < a.layout.chunks; ++c) {
    vi sum[rows][PARTS][2] = {};
    const uint8_t* weights = a.weights + row * 2 * TILE;
    for (int t = 0; t < a.tokens; t += PAGE) {
      const uint8_t* first = a.planes.first.at(t);
      for (int i = 0; i < PAGE; i += 4, first += 4 * stride, weights += 8) {
        ahead.step();
        vb codes[PARTS], level[2], weight[rows];
        unit<true, 0>(codes, first, stride, c);
        for (int r = 0; r < rows; ++r) weight[r] = repeat<8>(weights + r * 2 * TILE);
        for (int part = 0; part < PARTS; ++part) {
          levels_of<bits>(level, codes[part], a.table);
          for (int r = 0; r < rows; ++r)
            for (int half = 0; half < 2; ++half) sum[r][part][half] = dot2(sum[r][part][half], level[half], weight[r]);
        }
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int part = 0; part < PARTS; ++part) {
        float* o = a.out + (row + r) * a.ld + c * 16 + part * W;
        const vi total = neighbours_added(sum[r][part][0], sum[r][part][1], std::make_integer_sequence<int, W>{});
        store(o, load(o) + __builtin_convertvector(total, vf) * a.factor[row + r]);
      }
  }
}

template <int bits>
inline void score_words(const ScoreArgs& a, Prefetch ahead) {
  for (int r = 0, rows; r < a.count; r += rows) {
    rows = score_rows_at_once(a.count - r, a.layout);
    switch (rows) {
      case 1: score_words<bits, 1>(a, r, ahead); break;
      case 2: score_words<bits, 2>(a, r, ahead); break;
      case 3: score_words<bits, 3>(a, r, ahead); break;
      case 4: score_words<bits, 4>(a, r, ahead); break;
      case 8:
        if constexpr (bits == 8) score_words<bits, 8>(a, r, ahead);
    }
  }
}
template <int bits>
inline void sum_words(const SumArgs& a, Prefetch ahead) {
  for (int r = 0, rows; r < a.count; r += rows) {
    rows = sum_rows_at_once(a.count - r);
    switch (rows) {
      case 1: sum_words<bits, 1>(a, r, ahead); break;
      case 2: sum_words<bits, 2>(a, r, ahead); break;
      case 3: sum_words<bits, 3>(a, r, ahead); break;
      case 4: sum_words<bits, 4>(a, r, ahead); break;
      case 8: sum_words<bits, 8>(a, r, ahead); break;
    }
  }
}
inline void score_words(const ScoreArgs& a, Prefetch ahead, int bits) {
  if (bits == 8) score_words<8>(a, ahead);
  else if (bits == 7) score_words<7>(a, ahead);
  else score_words<6>(a, ahead);
}
inline void sum_words(const SumArgs& a, Prefetch ahead, int bits) {
  if (bits == 8) sum_words<8>(a, ahead);
  else if (bits == 7) sum_words<7>(a, ahead);
  else sum_words<6>(a, ahead);
}

// q16 = round(q / step) of one row of padded(dim); returns the step.
inline float quantize_query16(int16_t* out, const float* q, int ld) {
  const float limit = query16_max(ld);
  vf top{};
  for (int i = 0; i < ld; i += W) top = vmax(vabs(load(q + i)), top);
  const float peak = hmax(top), inverse = peak > 0 ? limit / peak : 0.0f;
  for (int i = 0; i < ld; i += W) {
    const vh words = __builtin_convertvector(nearest(load(q + i) * inverse), vh);
    memcpy(out + i, &words, sizeof words);
  }
  return peak / limit;
}

// As `quantize_weights`.
inline float quantize_weights16(uint16_t* out, const float* w, int tokens, float peak) {
  const vf inverse = splat(peak > 0 ? WEIGHT16_MAX / peak : 0.0f);
  for (int t = 0; t < tokens; t += W) {
    const vh words = __builtin_convertvector(nearest(load(w + t) * inverse), vh);
    memcpy(out + t, &words, sizeof words);
  }
  return peak / WEIGHT16_MAX;
}

}  // namespace tqc
