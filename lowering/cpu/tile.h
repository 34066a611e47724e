// Scores, softmax and weighted sum of up to 32 tokens for a block of query rows, in float32.
#pragma once
#include "int8.h"

namespace tqc {

extern thread_local Scratch scratch;
extern bool use_int8;  // tests turn it off

// Broadcast to [batch, query heads, rows, columns] by byte strides, 0 where an axis is of size 1.
struct Mask {
  const char* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;
  Dtype dtype = F32;
};

struct Tile {
  const View &k, &v;
  const int64_t b, h;
  const int count, ldk, ldv;
  float *out, *top, *sum;  // see Partial
  float scale, softcap;
  const Mask* mask;
  int64_t head, first, causal_limit;
  int group;

  float *query, *rotated, *head_bias, *bias, *scores, *keys, *values, *unrotated, *centre_k, *centre_v, *centre, *added;
  uint8_t *codes, *weights8;
  int8_t* query8;
  int32_t *scores8, *bias_sum;
  float *query_step, *factor, *sums, *variance;
  ScorePage score_page = nullptr;
  SumPage sum_page = nullptr;

  Tile(const View& k, const View& v, int64_t b, int64_t h, int count)
      : k(k), v(v), b(b), h(h), count(count), ldk(padded(k.store.f->dim)), ldv(padded(v.store.f->dim)) {}

  void reserve(Scratch& s) {
    const int widest = std::max(ldk, ldv);
    s.reserve(4 * (size_t(count) * (3 * ldk + ldv + 2 * PAGE + 8 + W + 16) + 64 * widest + 32 * ldk + 3 * widest + 128) + 64 * widest + 4096);
    query = s.take<float>(count * ldk);
    rotated = s.take<float>(count * ldk);
    unrotated = s.take<float>(count * ldv);
    head_bias = s.take<float>(count);
    bias = s.take<float>(count);
    scores = s.take<float>(count * PAGE);
    keys = s.take<float>(ldk * PAGE);
    values = s.take<float>(widest * PAGE);
    centre_k = s.take<float>(ldk);
    centre_v = s.take<float>(ldv);
    centre = s.take<float>(widest);
    added = s.take<float>(PAGE);
    codes = s.take<uint8_t>(2 * PAGE * widest);
    weights8 = s.take<uint8_t>(count * PAGE);
    query8 = s.take<int8_t>(count * ldk);
    scores8 = s.take<int32_t>(count * PAGE);
    bias_sum = s.take<int32_t>(count);
    query_step = s.take<float>(count);
    factor = s.take<float>(count);
    sums = s.take<float>(count * W);
    variance = s.take<float>(count);
  }

  // Call once `query` is filled.
  void start() {
    const Format &fk = *k.store.f, &fv = *v.store.f;
    for (int i = fk.dim; i < ldk; ++i) centre_k[i] = 0;
    for (int i = fv.dim; i < ldv; ++i) centre_v[i] = 0;
    to_float(centre_k, k.store.row(b, h, 0), fk.dim, k.store.dtype);
    to_float(centre_v, v.store.row(b, h, 0), fv.dim, v.store.dtype);
    memset(sums, 0, sizeof(float) * count * W);
    if (k.packed_end() <= k.packed_begin()) return;
    rotate_rows(rotated, query, count, fk, false);
    if (use_int8) {
      score_page = score_page_of(fk);
      sum_page = sum_page_of(fv);
    }
    for (int r = 0; r < count && score_page; ++r)
      query_step[r] = quantize_query(query8 + r * ldk, rotated + r * ldk, ldk, bias_sum + r) * fk.level8_step;
    for (int r = 0; r < count; ++r)
      variance[r] = 0.5f * fk.score_variance * scale * dot(query + r * ldk, query + r * ldk, ldk);
    for (int r = 0; r < count; ++r) head_bias[r] = fk.centred ? dot(rotated + r * ldk, centre_k, ldk) : 0.0f;
  }

  // Attend to tokens [t, end), whose values are all packed or all not.
  void run(int64_t t, int64_t end) {
    while (t < end) {
      const int64_t limit = std::min(end, t + PAGE);
      Run keys_at = k.at(b, h, t, end), values_at = v.at(b, h, t, end);
      const int tokens = int(std::min(extent(k, keys_at, limit), extent(v, values_at, limit)) - t);
      score(keys_at, t, tokens);
      soften(t, tokens);
      accumulate(values_at, t, tokens);
      t += tokens;
    }
  }

  // Where the tokens that one tile can take end: dense rows need not lie together.
  int64_t extent(const View& view, Run run, int64_t limit) const {
    const Kind kind = run.kind;
    while (kind == Kind::Rows && run.end < limit) {
      Run next = view.at(b, h, run.end, limit);
      if (next.kind != kind) break;
      run = next;
    }
    return std::min(run.end, limit);
  }

  // Dense tokens [t, t + tokens) as floats, out [tokens, ld].
  void gather(float* to, int ld, const View& view, int64_t t, int tokens) const {
    const int dim = view.store.f->dim;
    for (int64_t end = t + tokens; t < end;) {
      const Run run = view.at(b, h, t, end);
      for (const char* row = run.rows; t < run.end; ++t, row += run.stride, to += ld) {
        for (int i = dim; i < ld; ++i) to[i] = 0;
        to_float(to, row, dim, run.dtype);
      }
    }
  }

  // scores [count, 32] before scale, softcap and mask. Packed tokens' are corrected for their coding error: half the
  // variance of the score is added, which is D s_t^2 |scale q|^2.
  void score(const Run& run, int64_t at, int tokens) {
    const Format& f = *k.store.f;
    if (run.kind == Kind::Zeros) {
      memset(scores, 0, sizeof(float) * count * PAGE);
    } else if (run.kind == Kind::Rows) {
      gather(values, ldk, k, at, tokens);
      memset(values + tokens * ldk, 0, sizeof(float) * (PAGE - tokens) * ldk);
      if (count <= 8) return gemm_transposed(scores, query, values, ldk, count, ldk, tokens);
      transpose_floats(keys, values, ldk, ldk);
      gemm(scores, PAGE, query, ldk, keys, PAGE, count, PAGE, f.dim, false);
    } else {
      float scales[2 * PAGE];
      page_scales(scales, run.page);
      const bool int8 = score_page && tokens == PAGE;
      if (!int8 || !scores_from_planes(f)) unpack_page(codes, ldk, run.page, f);
      if (int8) {
        score_page(scores8, run.page, codes, query8, count, ldk, f);
      } else {
        uint8_t* turned = (uint8_t*)values;
        transpose_bytes(turned, codes + run.offset * ldk, ldk, ldk);
        look_up(keys, turned, f.dim * PAGE, f);
        gemm(scores, PAGE, rotated, ldk, keys, PAGE, count, PAGE, f.dim, false);
      }
      if (f.centred) page_centre(centre, run.page, f);
      for (int t = tokens; t < PAGE; ++t) scales[run.offset + t] = 0;
      for (int r = 0; r < count; ++r) {
        vf constant = splat(f.centred ? dot(rotated + r * ldk, centre, ldk) + head_bias[r] : 0.0f);
        for (int t = 0; t < PAGE; t += W) {
          float* s = scores + r * PAGE + t;
          vf product = load(s);
          if (int8)
            product = __builtin_convertvector(load_as<vi>(scores8 + r * PAGE + t) - bias_sum[r], vf) * query_step[r];
          const vf token = load(scales + run.offset + t);
          store(s, (product + token * variance[r]) * token + constant);
        }
      }
    }
  }

  // Whether a row's 32 columns need `added` or a cut; fills it.
  void load_mask(int64_t q_head, int64_t row, int64_t t, int tokens) {
    const char* p = mask->data + b * mask->batch + q_head * mask->head + row * mask->row + t * mask->column;
    for (int i = 0; i < tokens; ++i, p += mask->column)
      added[i] = mask->dtype == BOOL ? (*p ? 0.0f : -INFINITY) : scalar_to_float(p, mask->dtype);
  }

  // Scores to weights e**(s - top), running maximum and sum; rescales `out` where the maximum rose.
  void soften(int64_t t, int tokens) {
    int64_t loaded = -1;
    for (int r = 0; r < count; ++r) {
      float* s = scores + r * PAGE;
      const int64_t row = (first + r) / group, q_head = head + (first + r) % group;
      if (mask->data && (loaded != row || mask->head)) {
        load_mask(q_head, row, t, tokens);
        loaded = row;
      }
      int64_t visible = std::min<int64_t>(tokens, causal_limit + row + 1 - t);
      const vf old = splat(top[r]);
      vf peak = old;
      vi rose{};
      for (int i = 0; i < PAGE; i += W) {
        vf x = load(s + i) * scale;
        if (softcap != 0) x = vtanh(x / softcap) * softcap;
        if (mask->data) {
          vf m = load(added + i);
          x = mask->dtype == BOOL ? (m < 0.0f ? m : x) : x + m;
        }
        if (visible < i + W)
          for (int lane = 0; lane < W; ++lane)
            if (i + lane >= visible) x[lane] = -INFINITY;
        store(s + i, x);
        rose |= x > old;
        peak = vmax(x, peak);
      }
      if (any(rose)) {
        top[r] = hmax(peak);
        rescale(r, old[0] == -INFINITY ? 0.0f : std::exp(old[0] - top[r]));
      }
      const vf base = splat(top[r] == -INFINITY ? 0.0f : top[r]);
      vf total = load(sums + r * W);
      for (int i = 0; i < PAGE; i += W) {
        vf p = vexp(load(s + i) - base);
        store(s + i, p);
        total += p;
      }
      store(sums + r * W, total);
    }
  }

  void rescale(int r, float by) {
    store(sums + r * W, load(sums + r * W) * by);
    float* o = out + r * ldv;
    for (int i = 0; i < ldv; i += W) store(o + i, load(o + i) * by);
  }

  void finish() {
    for (int r = 0; r < count; ++r) sum[r] = hsum(load(sums + r * W));
  }

  // out += weights . values
  void accumulate(const Run& run, int64_t at, int tokens) {
    const Format& f = *v.store.f;
    if (run.kind == Kind::Zeros) return;
    if (run.kind == Kind::Rows) {
      gather(values, ldv, v, at, tokens);
      gemm(out, ldv, scores, PAGE, values, ldv, count, ldv, tokens, true);
      return;
    }
    float scales[2 * PAGE];
    page_scales(scales, run.page);
    for (int t = tokens; t < PAGE; ++t) scales[run.offset + t] = 0;
    if (f.centred) {
      page_centre(centre, run.page, f);
      for (int i = 0; i < ldv; i += W) store(centre + i, load(centre + i) + load(centre_v + i));
    }
    for (int r = 0; r < count; ++r) {
      vf total{};
      for (int t = 0; t < PAGE; t += W) {
        float* s = scores + r * PAGE + t;
        vf weight = load(s);
        total += weight;
        store(s, weight * load(scales + run.offset + t));
      }
      if (!f.centred) continue;
      vf weight = splat(hsum(total));
      float* o = out + r * ldv;
      for (int i = 0; i < ldv; i += W) store(o + i, load(o + i) + weight * load(centre + i));
    }
    bool int8 = sum_page && tokens == PAGE;
    for (int r = 0; r < count && int8; ++r) {
      factor[r] = quantize_weights(weights8 + r * PAGE, scores + r * PAGE) * f.level8_step;
      int8 = factor[r] == factor[r];
    }
    if (!int8 || !sums_from_planes(f)) unpack_page(codes, ldv, run.page, f);
    if (int8) return sum_page(out, ldv, run.page, codes, weights8, factor, count, f);
    look_up(values, codes + run.offset * ldv, tokens * ldv, f);
    gemm(out, ldv, scores, PAGE, values, ldv, count, ldv, tokens, true);
  }
};

}  // namespace tqc
