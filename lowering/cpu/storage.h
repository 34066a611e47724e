// The ops append and read.
#pragma once
#include "encode.h"
#include "parallel.h"

namespace tqc {

extern thread_local Scratch scratch;

struct AppendArgs {
  Store store;
  Dense news;
  int64_t batch, heads, count;
  int64_t start;  // -1 for none
};

inline int64_t packed_tokens(int64_t length, int64_t already, const Format& f) {
  int64_t over = length - f.sink_tokens - f.window;
  int64_t blocks = over > 0 ? (over + f.block_tokens - 1) / f.block_tokens : 0;
  return std::max(already, blocks * f.block_tokens);
}

// Packed tokens that stay when `length` of them are kept; a page that is cut goes back to the ring.
inline int64_t rewind(const AppendArgs& a, int64_t packed, int64_t length) {
  const Store& s = a.store;
  const Format& f = *s.f;
  int64_t kept = std::max<int64_t>(0, length - f.sink_tokens);
  if (kept >= packed) return packed;
  packed = kept / PAGE * PAGE;
  if (kept == packed) return packed;
  int ld = padded(f.dim);
  scratch.reserve(PAGE * ld * 10 + 256);
  float* rows = scratch.take<float>(PAGE * ld);
  float* rotated = scratch.take<float>(PAGE * ld);
  uint8_t* codes = scratch.take<uint8_t>(2 * PAGE * ld);
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t h = 0; h < a.heads; ++h) {
      const HeadRows head(s, b, h);
      decode_page(rows, s.page(b, h, packed / PAGE), head, f, 0, PAGE, codes, rotated);
      for (int t = 0; t < PAGE; ++t) from_float(s.ring(b, h, packed + t), rows + t * ld, f.dim, s.dtype);
    }
  return packed;
}

// What `append` leaves.
inline State state_after(const AppendArgs& a) {
  const Format& f = *a.store.f;
  const State& before = *a.store.state;
  const int64_t length = a.start >= 0 ? a.start : before.length, end = length + a.count;
  int64_t packed = before.packed;
  if (length < before.length) packed = std::min(packed, std::max<int64_t>(0, length - f.sink_tokens) / f.block_tokens * f.block_tokens);
  return {end, packed_tokens(end, packed, f), f.keep == KEEP_ALL ? before.begin : std::max(before.begin, end - f.keep)};
}

inline void append(const AppendArgs& a) {
  const Store& s = a.store;
  const Format& f = *s.f;
  const int element = dtype_bytes(s.dtype);
  const size_t row_bytes = size_t(f.dim) * element;
  const State after = state_after(a);
  int64_t length = s.state->length, packed = s.state->packed, gap = 0;
  if (a.start >= 0 && a.start < length) {
    packed = rewind(a, packed, a.start);
    length = a.start;
  } else if (a.start > length) {
    gap = a.start - length;
  }
  const int64_t taken = std::max<int64_t>(0, std::min(f.sink_tokens - length, gap + a.count));
  const int64_t first = length + taken - f.sink_tokens;  // packed index of the first new token behind the sinks
  auto put = [&](char* to, int64_t b, int64_t h, int64_t t) {  // t: position of a new token
    if (t < length + gap) memset(to, 0, row_bytes);
    else memcpy(to, a.news.at(b, h, t - length - gap), row_bytes);
  };
  for (int64_t t = length; t < length + taken; ++t)
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t h = 0; h < a.heads; ++h) put(s.row(b, h, t), b, h, t);

  if (after.packed > packed) {
    const int ld = padded(f.dim);
    const int64_t stores = a.batch * a.heads;
    auto gather = [&](float* x, int64_t b, int64_t h, int64_t u, const HeadRows& head) {
      for (int t = 0; t < PAGE; ++t, ++u) {
        float* row = x + t * ld;
        int64_t position = u + f.sink_tokens;
        for (int i = f.dim; i < ld; ++i) row[i] = 0;
        if (u < first) to_float(row, s.ring(b, h, u), f.dim, s.dtype);
        else if (position < length + gap) memset(row, 0, ld * sizeof(float));
        else to_float(row, a.news.at(b, h, position - length - gap), f.dim, s.dtype);
      }
      if (f.centred) divide_rows(x, PAGE, head.balance, ld);
    };
    const int threads = available_threads();
    if (packed == 0 && f.centred)  // the first page sets the head's centre, even if it is dropped at once
      parallel(stores, stores > 1 ? threads : 1, [&](int64_t i) {
        const int64_t b = i / a.heads, h = i % a.heads;
        HeadRows head(s, b, h);
        scratch.reserve(2 * PAGE * ld * sizeof(float) + 256);
        float* x = scratch.take<float>(PAGE * ld);
        float* r = scratch.take<float>(PAGE * ld);
        gather(x, b, h, 0, head);
        head_centre(head.centre, x, r, s.dtype, f);
        from_float(s.centre(b, h), head.centre, f.dim, s.dtype);
      });
    // A page that holds no token from `begin` on has no slot.
    const int64_t from = std::max(packed, (after.begin - f.sink_tokens) / PAGE * PAGE);
    constexpr int64_t RUN = 8 * PAGE;
    const int64_t runs = std::max<int64_t>(0, after.packed - from + RUN - 1) / RUN;
    parallel(stores * runs, threads, [&](int64_t i) {
      const int64_t b = i / runs / a.heads, h = i / runs % a.heads, begin = from + i % runs * RUN;
      const HeadRows head(s, b, h);
      scratch.reserve(2 * PAGE * ld * sizeof(float) + 256);
      float* x = scratch.take<float>(PAGE * ld);
      float* r = scratch.take<float>(PAGE * ld);
      for (int64_t u = begin; u < std::min(begin + RUN, after.packed); u += PAGE) {
        gather(x, b, h, u, head);
        encode_page(s.page(b, h, u / PAGE), x, r, head.centre, f);
      }
    });
  }

  const int64_t kept = std::max(first, after.packed);
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t h = 0; h < a.heads; ++h)
      for (int64_t u = kept; u < after.length - f.sink_tokens; ++u) put(s.ring(b, h, u), b, h, u + f.sink_tokens);
  *s.state = after;
}

// `length` tokens from the first that is held on: out [batch, heads, length, dim], contiguous, in the store's dtype;
// rotated in folded formats.
inline void read(const Store& s, char* out, int64_t batch, int64_t heads, int64_t length) {
  const Format& f = *s.f;
  const size_t row_bytes = size_t(f.dim) * dtype_bytes(s.dtype);
  const int ld = padded(f.dim);
  const int64_t begin = s.state->begin, end = begin + length;
  const View view{s, Dense{}, begin, std::min(s.state->length, end), s.state->packed, end, 0};
  constexpr int64_t RUN = 512;
  const int64_t runs = (length + RUN - 1) / RUN;
  const int threads = batch * heads * length * f.dim < 32768 ? 1 : available_threads();
  parallel(batch * heads * runs, threads, [&](int64_t task) {
    int64_t b = task / runs / heads, h = task / runs % heads, first = task % runs * RUN;
    int64_t t = begin + first, limit = std::min(t + RUN, end);
    char* row = out + ((b * heads + h) * length + first) * row_bytes;
    scratch.reserve(PAGE * ld * 10 + 256);
    float* rows = scratch.take<float>(PAGE * ld);
    float* rotated = scratch.take<float>(PAGE * ld);
    uint8_t* codes = scratch.take<uint8_t>(2 * PAGE * ld);
    const HeadRows head(s, b, h);
    while (t < limit) {
      Run run = view.at(b, h, t, limit);
      int64_t count = run.end - t;
      if (run.kind == Kind::Packed) decode_page(rows, run.page, head, f, run.offset, int(count), codes, rotated);
      for (int64_t i = 0; i < count; ++i, row += row_bytes) {
        if (run.kind == Kind::Packed) from_float(row, rows + i * ld, f.dim, s.dtype);
        else if (run.kind == Kind::Rows) memcpy(row, run.rows + i * run.stride, row_bytes);
        else memset(row, 0, row_bytes);
      }
      t = run.end;
    }
  });
}

}  // namespace tqc
