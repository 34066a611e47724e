// Scores and weighted sums of whole pages by int8 products.
//
// Scores: levels are biased to be unsigned, the rotated query is int8 with one scale per row. The 16-byte lanes of a
// vector hold tokens, 16 elements each; a product leaves 4 sums in a lane, which are added at the end.
// Sums: the weights times the scales are unsigned bytes with one scale per row and tile, the levels are signed. A dword
// holds one element of 4 tokens.
#pragma once
#include "units.h"

namespace tqc {

constexpr int TILE = (UNSIGNED_MAX == 255 ? 4 : 1) * PAGE;  // weights of 7 bits need a scale for each page
constexpr int TILE_PAGES = TILE / PAGE;

// Memory that will be read soon, fetched piece by piece while the core is busy with products. Into the second-level
// cache: what waits for the first one holds up the loads of the products (32K tokens took 1.5 to 2 times as long).
struct Prefetch {
  const uint8_t *next, *end;
  int64_t bytes_per_step;
  Prefetch(const uint8_t* begin, int64_t bytes, int steps)
      : next(begin), end(begin + bytes), bytes_per_step((bytes / steps + 63) / 64 * 64) {}
  void step() {
    for (int64_t i = 0; i < bytes_per_step && next < end; i += 64, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// Lane by lane, the sums of the halves of a and b, `size` bytes of each in turn.
template <int size>
inline vi halves_by_lane(vi a, vi b) { return zip_low<size>(a, b) + zip_high<size>(a, b); }
// Lane by lane, the sums of the 4 dwords of each of 4 vectors.
inline vi sums_by_lane(const vi (&x)[4]) {
  return halves_by_lane<8>(halves_by_lane<4>(x[0], x[1]), halves_by_lane<4>(x[2], x[3]));
}
// Sums of neighbouring dwords, those of a and then those of b within each lane of 16 bytes.
template <int... I>
inline vi neighbours_added(vi a, vi b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 2 * 2 + I % 4 / 2 * n)...) +
         __builtin_shufflevector(a, b, (I / 4 * 4 + I % 2 * 2 + 1 + I % 4 / 2 * n)...);
}
template <int... I>
inline vi in_token_order(vi x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I % LANES * 4 + I / LANES)...);
}

// How many of the rows that are left share units and levels in scores. More rows take fewer tokens at a time, and so
// more loads of the query; that pays where levels take the most steps.
inline int score_rows_at_once(int left, const Layout& layout) {
  return W == 16 && left >= 8 && layout.many_steps ? 8 : std::min(left, W == 8 ? 2 : 4);
}
// The same in sums.
inline int sum_rows_at_once(int left) { return W == 16 && left >= 8 ? 8 : std::min(left, W == 16 ? 4 : 2); }

// A line of products: slope * product + intercept.
struct Line {
  float slope, intercept;
};

// What makes a score of a product: the higher one of two lines, `stretched` being the one behind the threshold, times
// the token's scale, + constants[page].
struct ScoreRow {
  Line plain, stretched;
  float constants[4];
};

struct ScoreArgs {
  float* out;  // [count, tokens], rows ldo apart
  int ldo, tokens, count;
  Planes planes;
  Layout layout;
  const uint8_t* table;
  const int8_t* query;  // of each group of rows that is taken at once [pieces, rows, BYTES]: see `put_query`
  const ScoreRow* rows;  // [count]
  const float* scales;   // [tokens]
};

// Scores of W tokens from t on, of `rows` rows; see `halves_by_lane` for `pairs`.
template <int rows>
inline void put_scores(const ScoreArgs& a, int row, int t, const vi (&pairs)[rows][2]) {
  const vf scale = load(a.scales + t);
  for (int r = 0; r < rows; ++r) {
    const ScoreRow& as = a.rows[row + r];
    const vi sums = halves_by_lane<8>(pairs[r][0], pairs[r][1]);
    const vi products = in_token_order(sums, std::make_integer_sequence<int, W>{});
    const vf product = __builtin_convertvector(products, vf);
    const vf level_part = vmax(product * as.plain.slope + as.plain.intercept,
                               product * as.stretched.slope + as.stretched.intercept);
    store(a.out + (row + r) * a.ldo + t, level_part * scale + as.constants[t / PAGE]);
  }
}

template <int bits, int dim, int rows, int vectors, int block = 0>
inline void score_blocks(vi (&sum)[rows][vectors], const Chunk<bits, dim, false, vectors / PARTS>& codes,
                         const uint8_t* table, const int8_t* query) {
  vb level[vectors];
  for (int j = 0; j < vectors; ++j) level[j] = codes.template levels<block>(j, table);
  for (int r = 0; r < rows; ++r) {
    const vb q = load_as<vb>(query + (block * rows + r) * BYTES);
    for (int j = 0; j < vectors; ++j) sum[r][j] = dot4(sum[r][j], level[j], q);
  }
  if constexpr (block + 1 < BLOCKS<bits, dim>) score_blocks<bits, dim, rows, vectors, block + 1>(sum, codes, table, query);
}

template <int bits, int dim, int rows>
inline void score_rows(const ScoreArgs& a, int row, Prefetch& ahead) {
  constexpr int vectors = rows > 4 ? 2 : 4;  // what the registers hold, of the 4 that W tokens take
  constexpr int piece_bytes = BLOCKS<bits, dim> * BYTES;
  const int8_t* query = a.query + row * a.layout.chunks * piece_bytes;
  for (int t = 0; t < a.tokens; t += W) {
    ahead.step();
    vi pairs[rows][2];
    for (int half = 0; half < 4; half += vectors) {
      const uint8_t *first = a.planes.first.at(t + half * LANES), *second = a.planes.second.at(t + half * LANES);
      vi sum[rows][vectors] = {};
      for (int c = 0; c < a.layout.chunks; ++c)
        score_blocks<bits, dim, rows, vectors>(sum, {first, second, a.planes, a.layout.chunks, c}, a.table,
                                               query + c * rows * piece_bytes);
      for (int r = 0; r < rows; ++r)
        for (int i = 0; i < vectors; i += 2) pairs[r][(half + i) / 2] = halves_by_lane<4>(sum[r][i], sum[r][i + 1]);
    }
    put_scores<rows>(a, row, t, pairs);
  }
}

template <int bits, int dim>
inline void score_codes(const ScoreArgs& a, Prefetch ahead) {
  for (int r = 0, rows; r < a.count; r += rows) {
    rows = score_rows_at_once(a.count - r, a.layout);
    switch (rows) {
      case 1: score_rows<bits, dim, 1>(a, r, ahead); break;
      case 2: score_rows<bits, dim, 2>(a, r, ahead); break;
      case 3: score_rows<bits, dim, 3>(a, r, ahead); break;
      case 4: score_rows<bits, dim, 4>(a, r, ahead); break;
      case 8:
        if constexpr (bits == 3) score_rows<bits, dim, 8>(a, r, ahead);
    }
  }
}

struct SumArgs {
  float* out;  // [count, ld], added to
  int ld, tokens, count;
  Planes planes;
  Layout layout;
  const uint8_t* table;
  const uint8_t* weights;  // [count, TILE]
  const float* factor;  // [count]
};

template <int bits, int dim, int rows, int begin, int end, int block = begin>
inline void sum_blocks(vi (&sum)[rows][end - begin][PARTS], const vb (&weight)[rows], const Chunk<bits, dim, true, 1>& codes,
                       const uint8_t* table) {
  for (int part = 0; part < PARTS; ++part) {
    const vb level = codes.template levels<nth_block<bits, dim>(block)>(part, table);
    for (int r = 0; r < rows; ++r)
      sum[r][block - begin][part] = dot4(sum[r][block - begin][part], weight[r], level);
  }
  if constexpr (block + 1 < end) sum_blocks<bits, dim, rows, begin, end, block + 1>(sum, weight, codes, table);
}

// Blocks [begin, end) of each chunk, then those behind.
template <int bits, int dim, int rows, int begin = 0>
inline void sum_rows(const SumArgs& a, int row, Prefetch& ahead) {
  constexpr int blocks = BLOCKS<bits, dim>, end = std::min(begin + (rows > 4 ? 2 : W == 16 ? 4 : 2), blocks);
  const int chunks = a.layout.chunks;
  for (int c = 0; c < chunks; ++c) {
    vi sum[rows][end - begin][PARTS] = {};
    const uint8_t* weights = a.weights + row * TILE;
    for (int t = 0; t < a.tokens; t += PAGE) {
      const uint8_t *first = a.planes.first.at(t), *second = a.planes.second.at(t);
      for (int i = 0; i < PAGE; i += 4, weights += 4) {
        ahead.step();
        vb weight[rows];
        for (int r = 0; r < rows; ++r) weight[r] = repeat<4>(weights + r * TILE);
        sum_blocks<bits, dim, rows, begin, end>(sum, weight, {first, second, a.planes, chunks, c}, a.table);
        first += 4 * a.planes.first.stride;
        second += 4 * a.planes.second.stride;
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int block = begin; block < end; ++block)
        for (int part = 0; part < PARTS; ++part) {
          float* o = a.out + (row + r) * a.ld + (nth_block<bits, dim>(block) * chunks + c) * 16 + part * W;
          store(o, load(o) + __builtin_convertvector(sum[r][block - begin][part], vf) * a.factor[row + r]);
        }
  }
  if constexpr (end < blocks) sum_rows<bits, dim, rows, end>(a, row, ahead);
}

template <int bits, int dim>
inline void sum_codes(const SumArgs& a, Prefetch ahead) {
  for (int r = 0, rows; r < a.count; r += rows) {
    rows = sum_rows_at_once(a.count - r);
    switch (rows) {
      case 1: sum_rows<bits, dim, 1>(a, r, ahead); break;
      case 2: sum_rows<bits, dim, 2>(a, r, ahead); break;
      case 3: sum_rows<bits, dim, 3>(a, r, ahead); break;
      case 4: sum_rows<bits, dim, 4>(a, r, ahead); break;
      case 8: sum_rows<bits, dim, 8>(a, r, ahead); break;
    }
  }
}

// Calls `run` with the layout's bits and dim as types.
template <class Run>
inline void with_layout(const Layout& l, const Run& run) {
  auto with_bits = [&](auto dim) {
    switch (l.bits) {
      case 1: return run(std::integral_constant<int, 1>{}, dim);
      case 2: return run(std::integral_constant<int, 2>{}, dim);
      case 3: return run(std::integral_constant<int, 3>{}, dim);
      case 4: return run(std::integral_constant<int, 4>{}, dim);
    }
  };
  if (l.bits == AS_BYTES) run(std::integral_constant<int, AS_BYTES>{}, std::integral_constant<int, 0>{});
  else if (l.dim == 64) with_bits(std::integral_constant<int, 64>{});
  else if (l.dim == 128) with_bits(std::integral_constant<int, 128>{});
  else with_bits(std::integral_constant<int, 0>{});
}
inline void score_codes(const ScoreArgs& a, Prefetch ahead) {
  with_layout(a.layout, [&](auto bits, auto dim) { score_codes<bits, dim>(a, ahead); });
}
inline void sum_codes(const SumArgs& a, Prefetch ahead) {
  with_layout(a.layout, [&](auto bits, auto dim) { sum_codes<bits, dim>(a, ahead); });
}

// Nearest integers of |x| < 2**22.
inline vi nearest(vf x) { return (vi)(x + 12582912.0f) - 0x4b400000; }

// q8 = round(q / step) of one row of padded(dim), out [padded(dim) rounded up to BYTES]; returns the step.
inline float quantize_query(int8_t* out, int32_t* sum, const float* q, int ld) {
  vf top{};
  for (int i = 0; i < ld; i += W) top = vmax(vabs(load(q + i)), top);
  const float peak = hmax(top), inverse = peak > 0 ? 127.0f / peak : 0.0f;
  vi total{};
  for (int i = 0; i < ld; i += W) {
    const vi q8 = nearest(load(q + i) * inverse);
    const vw bytes = __builtin_convertvector(q8, vw);
    memcpy(out + i, &bytes, W);
    total += (vi)((vu)q8 << 24) >> 24;  // of the byte: a query that is not finite has no integers that could be added
  }
  *sum = 0;
  for (int i = 0; i < W; ++i) *sum += total[i];
  return peak / 127.0f;
}

// Groups of rows as `score_rows` takes them: pieces of 16 bytes in the order in which it meets them, each repeated
// to a whole vector. `q` is [count, ldq] bytes.
inline void put_query(int8_t* out, const int8_t* q, int ldq, int count, int pieces, int chunks, const Layout& layout) {
  for (int row = 0, rows; row < count; row += rows) {
    rows = score_rows_at_once(count - row, layout);
    for (int c = 0; c < chunks; ++c)
      for (int piece = c; piece < pieces; piece += chunks)
        for (int r = 0; r < rows; ++r, out += BYTES) {
          const vb lanes = repeat<16>((const uint8_t*)q + (row + r) * ldq + 16 * piece);
          memcpy(out, &lanes, BYTES);
        }
  }
}

// out[p] = query . nibbles[p] for 4 rows of nibbles; rows of ld bytes, zeros in the query behind dim.
inline i4 dot_nibbles(const uint8_t* nibbles, const int8_t* query, int ld) {
  vi sum[4] = {};
  for (int i = 0; i < ld; i += BYTES)
    for (int p = 0; p < 4; ++p) sum[p] = dot4(sum[p], load_as<vb>(nibbles + p * ld + i), load_as<vb>(query + i));
  const vi four = sums_by_lane(sum);
  i4 out{};
  for (int i = 0; i < LANES; ++i) out += lane(four, i);
  return out;
}

// w8 = round(w / step) for the weights of one row, none above `peak` or below 0; returns the step.
inline float quantize_weights(uint8_t* out, const float* w, int tokens, float peak) {
  const vf inverse = splat(peak > 0 ? UNSIGNED_MAX / peak : 0.0f);
  for (int t = 0; t < tokens; t += W) {
    const vw w8 = __builtin_convertvector(nearest(load(w + t) * inverse), vw);
    memcpy(out + t, &w8, W);
  }
  return peak / UNSIGNED_MAX;
}

}  // namespace tqc
