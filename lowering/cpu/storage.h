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
  int64_t pages = over > 0 ? (over + PAGE - 1) / PAGE : 0;
  return std::max(already, pages * PAGE);
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
  scratch.reserve(PAGE * ld * 10 + ld * 4 + 256);
  float* rows = scratch.take<float>(PAGE * ld);
  float* rotated = scratch.take<float>(PAGE * ld);
  uint8_t* codes = scratch.take<uint8_t>(2 * PAGE * ld);
  float* centre = scratch.take<float>(ld);
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t h = 0; h < a.heads; ++h) {
      to_float(centre, s.row(b, h, 0), f.dim, s.dtype);
      decode_page(rows, s.page(b, h, packed / PAGE), centre, f, 0, PAGE, codes, rotated);
      for (int t = 0; t < PAGE; ++t) from_float(s.ring(b, h, packed + t), rows + t * ld, f.dim, s.dtype);
    }
  return packed;
}

// How many pages the store must have for this append to fit.
inline int64_t pages_needed(const AppendArgs& a) {
  int64_t length = a.start >= 0 ? a.start : a.store.state[0];
  int64_t packed = a.store.state[1];
  if (length < a.store.state[0])
    packed = std::min(packed, std::max<int64_t>(0, length - a.store.f->sink_tokens) / PAGE * PAGE);
  return packed_tokens(length + a.count, packed, *a.store.f) / PAGE;
}

inline void append(const AppendArgs& a) {
  const Store& s = a.store;
  const Format& f = *s.f;
  const int element = dtype_bytes(s.dtype);
  const size_t row_bytes = size_t(f.dim) * element;
  int64_t length = s.state[0], packed = s.state[1], gap = 0;
  if (a.start >= 0 && a.start < length) {
    packed = rewind(a, packed, a.start);
    length = a.start;
  } else if (a.start > length) {
    gap = a.start - length;
  }
  const int64_t end = length + gap + a.count, packed_after = packed_tokens(end, packed, f);
  const int64_t taken = std::max<int64_t>(0, std::min(f.sink_tokens - length, gap + a.count));
  const int64_t first = length + taken - f.sink_tokens;  // packed index of the first new token behind the sinks
  auto put = [&](char* to, int64_t b, int64_t h, int64_t t) {  // t: position of a new token
    if (t < length + gap) memset(to, 0, row_bytes);
    else memcpy(to, a.news.at(b, h, t - length - gap), row_bytes);
  };
  for (int64_t t = length; t < length + taken; ++t)
    for (int64_t b = 0; b < a.batch; ++b)
      for (int64_t h = 0; h < a.heads; ++h) put(s.row(b, h, 1 + t), b, h, t);

  if (packed_after > packed) {
    const int ld = padded(f.dim);
    const int64_t stores = a.batch * a.heads;
    auto gather = [&](float* x, int64_t b, int64_t h, int64_t u) {
      for (int t = 0; t < PAGE; ++t, ++u, x += ld) {
        int64_t position = u + f.sink_tokens;
        for (int i = f.dim; i < ld; ++i) x[i] = 0;
        if (u < first) to_float(x, s.ring(b, h, u), f.dim, s.dtype);
        else if (position < length + gap) memset(x, 0, ld * sizeof(float));
        else to_float(x, a.news.at(b, h, position - length - gap), f.dim, s.dtype);
      }
    };
    auto encode_run = [&](int64_t b, int64_t h, int64_t from, int64_t to, bool centre_first) {
      scratch.reserve((2 * PAGE + 1) * ld * sizeof(float) + 256);
      float* x = scratch.take<float>(PAGE * ld);
      float* r = scratch.take<float>(PAGE * ld);
      float* centre = scratch.take<float>(ld);
      if (centre_first) {
        for (int i = 0; i < ld; ++i) centre[i] = 0;
        if (f.centred) {
          gather(x, b, h, 0);
          head_centre(centre, x, r, s.dtype, f);
        }
        from_float(s.row(b, h, 0), centre, f.dim, s.dtype);
      }
      for (int i = 0; i < ld; ++i) centre[i] = 0;
      to_float(centre, s.row(b, h, 0), f.dim, s.dtype);
      for (int64_t u = from; u < to; u += PAGE) {
        gather(x, b, h, u);
        encode_page(s.page(b, h, u / PAGE), x, r, centre, f);
      }
    };
    const int threads = available_threads();
    int64_t from = packed;
    if (packed == 0) {  // the first page sets the head's centre, which the others need
      parallel(stores, stores > 1 ? threads : 1, [&](int64_t i) { encode_run(i / a.heads, i % a.heads, 0, PAGE, true); });
      from = PAGE;
    }
    constexpr int64_t RUN = 8 * PAGE;
    const int64_t runs = (packed_after - from + RUN - 1) / RUN;
    if (runs > 0)
      parallel(stores * runs, threads, [&](int64_t i) {
        int64_t store_index = i / runs, u = from + i % runs * RUN;
        encode_run(store_index / a.heads, store_index % a.heads, u, std::min(u + RUN, packed_after), false);
      });
  }

  const int64_t kept = std::max(first, packed_after);
  for (int64_t b = 0; b < a.batch; ++b)
    for (int64_t h = 0; h < a.heads; ++h)
      for (int64_t u = kept; u < end - f.sink_tokens; ++u) put(s.ring(b, h, u), b, h, u + f.sink_tokens);
  s.state[0] = end;
  s.state[1] = packed_after;
}

// out [batch, heads, length, dim], contiguous, in the store's dtype; rotated in folded formats.
inline void read(const Store& s, char* out, int64_t batch, int64_t heads, int64_t length) {
  const Format& f = *s.f;
  const size_t row_bytes = size_t(f.dim) * dtype_bytes(s.dtype);
  const int ld = padded(f.dim);
  const int64_t stored = std::min(s.state[0], length);
  View view{s, Dense{}, stored, s.state[1], length, 0};
  constexpr int64_t RUN = 512;
  const int64_t runs = (length + RUN - 1) / RUN;
  const int threads = batch * heads * length * f.dim < 32768 ? 1 : available_threads();
  parallel(batch * heads * runs, threads, [&](int64_t task) {
    int64_t b = task / runs / heads, h = task / runs % heads, t = task % runs * RUN;
    int64_t limit = std::min(t + RUN, length);
    char* row = out + ((b * heads + h) * length + t) * row_bytes;
    scratch.reserve(PAGE * ld * 10 + ld * 4 + 256);
    float* rows = scratch.take<float>(PAGE * ld);
    float* rotated = scratch.take<float>(PAGE * ld);
    uint8_t* codes = scratch.take<uint8_t>(2 * PAGE * ld);
    float* centre = scratch.take<float>(ld);
    for (int i = 0; i < ld; ++i) centre[i] = 0;
    to_float(centre, s.row(b, h, 0), f.dim, s.dtype);
    while (t < limit) {
      Run run = view.at(b, h, t, limit);
      int64_t count = run.end - t;
      if (run.kind == Kind::Packed) decode_page(rows, run.page, centre, f, run.offset, int(count), codes, rotated);
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
