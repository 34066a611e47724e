// The packed format as the kernels see it, and where each stored token lives.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <utility>
#include <vector>

#include "bytes.h"

namespace tqc {

constexpr int PAGE = 32;
constexpr int SCALES_OFFSET = 16;
constexpr int SCALE_NAN = 254, SCALE_ZERO = 255;
constexpr int CENTRE_LIMIT = 7, CENTRE_ZERO = 8;
constexpr int64_t KEEP_ALL = -1;

struct Plane {
  int width, shift, offset;
};

struct Format;

// Pages of one width that each block holds, from byte `offset` on.
struct Tier {
  const Format* f;
  int pages, offset;
};

struct FormatArguments {
  int dim, bits, centred, sink_tokens, window, page_bytes, centre_offset;
  Plane planes[4];
  int plane_count;
  const float *levels, *boundaries, *rotation;  // 2**bits, one less, [dim, dim]
  bool hadamard;                                // whether the rotation is of that kind and dim a power of two
  float score_stretch;  // see `PackedFormat.score_stretch`
  int folded;
  int64_t keep;  // or KEEP_ALL
  int block_tokens, block_bytes, places_offset, score_rows, query_ring;  // see `Format`
};

constexpr int INT8_BITS = 4;  // above, the error of int8 products would show beside that of the codes
// Largest magnitudes in int16 products. 32 bits hold the sums of products: all elements of a level and the query, 128
// tokens of a level and a weight.
constexpr int MAX_HEAD_DIM = 512;
constexpr int LEVEL16_MAX = 4095, WEIGHT16_MAX = 4095;
constexpr int query16_max(int dim) { return dim > 256 ? 1023 : 2047; }
static_assert(int64_t(256) * LEVEL16_MAX * query16_max(256) <= INT32_MAX);
static_assert(int64_t(MAX_HEAD_DIM) * LEVEL16_MAX * query16_max(MAX_HEAD_DIM) <= INT32_MAX);

// All tables are rows of padded(dim), 64-byte aligned; they live as long as the process.
struct Format {
  int dim, bits, centred, sink_tokens, window, page_bytes, centre_offset, plane_count;
  int folded;              // vectors come and go rotated
  int64_t keep;            // how many of the last tokens are held, or KEEP_ALL
  Plane planes[4];
  float levels[256];       // unused entries are 0
  float boundaries[256];   // unused entries are +inf
  float* rotation;         // R, row-major
  float* rotation_t;       // R'
  float* signs;            // of a pure Hadamard rotation, R = hadamard_scale H diag(signs); else null
  float hadamard_scale;
  // Levels as bytes, for at most 4 bits, again and again: signed in units of level8_step, or with LEVEL_BIAS added in
  // units of score_step.
  alignas(64) int8_t levels8[64];
  alignas(64) uint8_t levels8_biased[64];
  float level8_step, score_step;
  // For more bits: levels in units of level16_step, first their low bytes and then their high ones.
  alignas(64) uint8_t levels16[2][256];
  float level16_step;
  float score_stretch;
  // What is packed at once: a page, or a group of tokens whose places in the group lie behind the pages of its tiers.
  int block_tokens, block_bytes, places_offset;
  int score_rows, query_ring;  // of dense, behind all others, and how many of the last queries they hold
  std::vector<Tier> tiers;  // none without groups

  int token_rows() const { return sink_tokens + window; }
  int head_rows() const { return centred ? 2 : 0; }
  int dense_rows() const { return token_rows() + head_rows() + score_rows; }
  // How many slots pages take in turns where older tokens are dropped.
  int64_t slots() const { return std::max<int64_t>(0, (keep - window + 3 * PAGE - 1) / PAGE); }
};

inline float* aligned_copy(const float* from, int rows, int dim, bool transposed) {
  const int ld = padded(dim);
  auto* to = (float*)aligned_alloc(64, size_t(rows) * ld * sizeof(float));
  memset(to, 0, size_t(rows) * ld * sizeof(float));
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < dim; ++c) to[r * ld + c] = transposed ? from[c * dim + r] : from[r * dim + c];
  return to;
}

inline Format* make_format(const FormatArguments& a) {
  auto* f = new Format{a.dim, a.bits, a.centred, a.sink_tokens, a.window, a.page_bytes, a.centre_offset, a.plane_count, a.folded,
                       a.keep};
  const int count = 1 << a.bits;
  std::copy(a.planes, a.planes + a.plane_count, f->planes);
  std::fill(std::begin(f->boundaries), std::end(f->boundaries), INFINITY);
  std::copy(a.levels, a.levels + count, f->levels);
  std::copy(a.boundaries, a.boundaries + count - 1, f->boundaries);
  f->score_stretch = a.score_stretch;
  f->block_tokens = a.block_tokens;
  f->block_bytes = a.block_bytes;
  f->places_offset = a.places_offset;
  f->score_rows = a.score_rows;
  f->query_ring = a.query_ring;
  f->rotation = aligned_copy(a.rotation, a.dim, a.dim, false);
  f->rotation_t = aligned_copy(a.rotation, a.dim, a.dim, true);
  if (a.hadamard) {
    f->signs = aligned_copy(a.rotation, 1, a.dim, false);
    for (int i = 0; i < a.dim; ++i) f->signs[i] = a.rotation[i] < 0 ? -1.0f : 1.0f;
    f->hadamard_scale = std::fabs(a.rotation[0]);
  }
  f->level8_step = f->levels[count - 1] / 127;
  f->score_step = f->levels[count - 1] / (LEVEL_BIAS - 1);
  for (int i = 0; i < 64 && a.bits <= INT8_BITS; ++i) {
    f->levels8[i] = int8_t(std::nearbyint(f->levels[i % count] / f->level8_step));
    f->levels8_biased[i] = uint8_t(std::nearbyint(f->levels[i % count] / f->score_step) + LEVEL_BIAS);
  }
  f->level16_step = f->levels[count - 1] / LEVEL16_MAX;
  for (int i = 0; i < count; ++i) {
    const auto level = uint16_t(int16_t(std::nearbyint(f->levels[i] / f->level16_step)));
    f->levels16[0][i] = uint8_t(level), f->levels16[1][i] = uint8_t(level >> 8);
  }
  return f;
}

// Factor of each scale code; exact powers of two times the first 32.
extern float scale_factors[256];

// Counts of tokens from the first one ever appended: all of them, those packed, and those dropped since.
struct State {
  int64_t length, packed, begin;
};

// The parts of one packed tensor, addressed in bytes.
struct Store {
  const Format* f;
  uint8_t* pages;
  int64_t pages_batch, pages_head, pages_page, page_count;
  char* dense;
  int64_t dense_batch, dense_head, dense_row, dense_rows;
  Dtype dtype;
  State* state;

  int64_t slot(int64_t p) const { return p < page_count ? p : p % page_count; }
  uint8_t* page(int64_t b, int64_t h, int64_t p) const {
    return pages + b * pages_batch + h * pages_head + slot(p) * pages_page;
  }
  char* row(int64_t b, int64_t h, int64_t r) const { return dense + b * dense_batch + h * dense_head + r * dense_row; }
  char* ring(int64_t b, int64_t h, int64_t u) const { return row(b, h, f->sink_tokens + u % f->window); }
  char* centre(int64_t b, int64_t h) const { return row(b, h, f->token_rows()); }
  char* balance(int64_t b, int64_t h) const { return row(b, h, f->token_rows() + 1); }
};

// What pages of a centred format are relative to, zeros and ones in the padding; of other formats, and as long as there
// are no such rows, nothing that may be read.
struct HeadRows {
  alignas(64) float centre[MAX_HEAD_DIM], balance[MAX_HEAD_DIM];

  HeadRows(const Store& s, int64_t b, int64_t h) {
    const Format& f = *s.f;
    if (!f.centred || s.dense_rows < f.token_rows() + f.head_rows()) return;
    to_float(centre, s.centre(b, h), f.dim, s.dtype);
    to_float(balance, s.balance(b, h), f.dim, s.dtype);
    for (int i = f.dim; i < padded(f.dim); ++i) centre[i] = 0, balance[i] = 1;
  }
};

// A strided dense tensor [batch, heads, rows, dim], last dim contiguous.
struct Dense {
  char* data;
  int64_t batch, head, row;
  Dtype dtype;
  char* at(int64_t b, int64_t h, int64_t r) const { return data + b * batch + h * head + r * row; }
};

enum class Kind { Packed, Rows, Zeros };

// Tokens [t, end) that lie together: in one page from token `offset` on, or in rows `stride` bytes apart.
struct Run {
  Kind kind;
  int64_t end;
  const uint8_t* page;
  int offset;
  const char* rows;
  int64_t stride;
  Dtype dtype;
};

// What attention and read see of one stored tensor followed by new tokens: tokens [begin, length) are stored (or a
// gap of zeros from `stored` on), then `fresh` new tokens, then zeros.
struct View {
  Store store;
  Dense news;
  int64_t begin, stored, packed, length, fresh;
  // Of one page of each block: where the places of its tokens are in the first block of the first head.
  const uint8_t* places = nullptr;
  int group = 0;  // tokens of a block

  // Where the token that the pages hold as `t` stands.
  int64_t position(int64_t b, int64_t h, int64_t t) const {
    const int64_t u = t - store.f->sink_tokens, block = u / PAGE;
    return store.f->sink_tokens + block * group +
           places[b * store.pages_batch + h * store.pages_head + block * store.pages_page + u % PAGE];
  }

  // Of the tokens that are read from pages; the first of them may lie inside of its page.
  int64_t packed_begin() const { return std::max<int64_t>(store.f->sink_tokens, begin); }
  int64_t packed_end() const { return std::max(packed_begin(), std::min<int64_t>(store.f->sink_tokens + packed, stored)); }
  const uint8_t* page_of(int64_t b, int64_t h, int64_t t) const { return store.page(b, h, (t - store.f->sink_tokens) / PAGE); }

  // How many whole pages before token `end` begin at token t and lie one behind the other.
  int64_t pages_from(int64_t t, int64_t end) const {
    const int64_t u = t - store.f->sink_tokens, tokens = std::min(packed_end(), end) - t;
    if (t < packed_begin() || u % PAGE || tokens < PAGE) return 0;
    return std::min(tokens / PAGE, store.page_count - store.slot(u / PAGE));
  }

  Run at(int64_t b, int64_t h, int64_t t, int64_t limit) const {
    const Format& f = *store.f;
    if (t < stored) {
      if (t < f.sink_tokens) return rows(std::min<int64_t>(f.sink_tokens, stored), limit, store.row(b, h, t), store.dense_row, store.dtype);
      int64_t u = t - f.sink_tokens;
      if (u < packed) {
        int64_t end = std::min<int64_t>({(u / PAGE + 1) * PAGE + f.sink_tokens, stored, limit});
        return {Kind::Packed, end, page_of(b, h, t), int(u % PAGE), nullptr, 0, F32};
      }
      return rows(std::min<int64_t>(t + f.window - u % f.window, stored), limit, store.ring(b, h, u), store.dense_row, store.dtype);
    }
    if (t >= length && t < length + fresh)
      return rows(length + fresh, limit, news.at(b, h, t - length), news.row, news.dtype);
    return {Kind::Zeros, t < length ? std::min(length, limit) : limit, nullptr, 0, nullptr, 0, F32};
  }

 private:
  static Run rows(int64_t end, int64_t limit, const char* p, int64_t stride, Dtype dtype) {
    return {Kind::Rows, std::min(end, limit), nullptr, 0, p, stride, dtype};
  }
};

// Grows on demand, never shrinks; one per thread.
struct Scratch {
  char* data = nullptr;
  size_t size = 0, used = 0;
  ~Scratch() { free(data); }
  void reserve(size_t bytes) {
    used = 0;
    if (bytes <= size) return;
    free(data);
    size = (bytes + 4095) / 4096 * 4096;
    data = (char*)aligned_alloc(64, size);
  }
  template <class T>
  T* take(size_t count) {
    T* p = (T*)(data + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

}  // namespace tqc
