// Scores, softmax and weighted sum of some tokens for a block of query rows: whole packed pages by int8 or int16
// products, up to four at a time; anything else in float32, up to 32 tokens at a time.
#pragma once
#include "int16.h"

namespace tqc {

extern thread_local Scratch scratch;
extern bool use_int8;  // whether pages are taken by products of integers; tests turn it off

constexpr int SCORES_LD = TILE + PAD;  // no power of two: rows would share a set of the cache

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

  const HeadRows head_k, head_v;
  float *query, *balanced, *rotated, *head_bias, *scores, *keys, *values, *unrotated, *centre, *added;
  float *query_step, *stretch_from, *factor, *sums, *value_scales;
  ScoreRow* score_rows;
  uint8_t *codes, *weights8, *nibbles;
  uint16_t* weights16;
  int8_t *query8, *query_lanes;
  int16_t* query16;
  int32_t* query_sum;
  Layout layout_k, layout_v;
  bool integers = false;

  Tile(const View& k, const View& v, int64_t b, int64_t h, int count)
      : k(k), v(v), b(b), h(h), count(count), ldk(padded(k.store.f->dim)), ldv(padded(v.store.f->dim)),
        head_k(k.store, b, h), head_v(v.store, b, h), layout_k(*k.store.f), layout_v(*v.store.f) {}

  void reserve(Scratch& s) {
    const int widest = std::max(ldk, ldv);
    s.reserve(4 * (size_t(count) * (5 * ldk + 2 * ldv + SCORES_LD + TILE + W + 16) + 32 * (ldk + widest) + 7 * widest + 2 * TILE) +
              count * (3 * ldk + BYTES + 2 * ldk * LANES + 3 * TILE) + (TILE + 2 * PAGE + 4) * widest + 8192);
    query = s.take<float>(count * ldk);
    balanced = s.take<float>(count * ldk);
    rotated = s.take<float>(count * ldk);
    unrotated = s.take<float>(count * ldv);
    head_bias = s.take<float>(count);
    scores = s.take<float>(count * SCORES_LD);
    keys = s.take<float>(ldk * PAGE);
    values = s.take<float>(widest * PAGE);
    centre = s.take<float>(TILE_PAGES * widest);
    added = s.take<float>(TILE);
    codes = s.take<uint8_t>((TILE + PAGE) * widest);
    nibbles = s.take<uint8_t>(4 * query_bytes());
    weights8 = s.take<uint8_t>(count * TILE);
    weights16 = s.take<uint16_t>(count * TILE);
    query8 = s.take<int8_t>(count * query_bytes());
    query16 = s.take<int16_t>(count * ldk);
    query_lanes = s.take<int8_t>(2 * count * ldk * LANES);
    query_sum = s.take<int32_t>(count);
    query_step = s.take<float>(count);
    stretch_from = s.take<float>(count);
    factor = s.take<float>(count);
    sums = s.take<float>(count * W);
    value_scales = s.take<float>(TILE);
    score_rows = s.take<ScoreRow>(count);
  }

  int query_bytes() const { return (ldk + BYTES - 1) / BYTES * BYTES; }

  // Call once `query` is filled; it is multiplied by `scale`.
  void start() {
    const Format &fk = *k.store.f, &fv = *v.store.f;
    memset(sums, 0, sizeof(float) * count * W);
    for (int i = 0; i < count * ldk; i += W) store(query + i, load(query + i) * scale);
    if (k.packed_end() <= k.packed_begin()) return;
    const float* for_pages = fk.centred ? balanced : query;
    if (fk.centred) multiply_rows(balanced, query, count, head_k.balance, ldk);
    rotate_rows(rotated, for_pages, count, fk);
    integers = use_int8 && HAS_INT8 && std::max(fk.bits, fv.bits) <= INT16_BITS;
    if (integers && fk.bits <= INT8_BITS) {
      memset(nibbles, 0, 4 * query_bytes());
      memset(query8, 0, count * query_bytes());
      for (int r = 0; r < count; ++r)
        query_step[r] = quantize_query(query8 + r * query_bytes(), query_sum + r, rotated + r * ldk, ldk);
      put_query(query_lanes, query8, query_bytes(), count, ldk / 16, layout_k.chunks, layout_k);
    } else if (integers) {
      for (int r = 0; r < count; ++r) query_step[r] = quantize_query16(query16 + r * ldk, rotated + r * ldk, ldk);
      put_query(query_lanes, (int8_t*)query16, 2 * ldk, count, ldk / 8, 1, layout_k);
    }
    for (int r = 0; r < count; ++r) {
      score_rows[r] = {};
      const float norm = std::sqrt(dot(for_pages + r * ldk, for_pages + r * ldk, ldk));
      stretch_from[r] = norm < INFINITY ? norm : NAN;
      head_bias[r] = fk.centred ? dot(rotated + r * ldk, head_k.centre, ldk) : 0.0f;
    }
  }

  // Attend to tokens [t, end), whose values are all packed or all not.
  void run(int64_t t, int64_t end) {
    while (t < end) {
      if (const int pages = whole_pages(t, end)) {
        score_pages(t, pages);
        const uint8_t* page = v.page_of(b, h, t);
        for (int p = 0; p < pages; ++p) page_scales(value_scales + p * PAGE, page + p * v.store.pages_page);
        soften(t, pages * PAGE, page);
        accumulate_pages(page, pages);
        t += pages * PAGE;
        continue;
      }
      const int64_t limit = std::min(end, t + PAGE);
      Run keys_at = k.at(b, h, t, end), values_at = v.at(b, h, t, end);
      const int tokens = int(std::min(extent(k, keys_at, limit), extent(v, values_at, limit)) - t);
      score(keys_at, t, tokens);
      if (values_at.kind == Kind::Packed) {
        float of_page[2 * PAGE] = {};
        page_scales(of_page, values_at.page);
        for (int i = 0; i < PAGE; ++i) value_scales[i] = i < tokens ? of_page[values_at.offset + i] : 0.0f;
      }
      soften(t, tokens, values_at.page);
      accumulate(values_at, t, tokens);
      t += tokens;
    }
  }

  // How many pages of both tensors begin at token t together, for products of integers.
  int whole_pages(int64_t t, int64_t end) const {
    return integers ? int(std::min<int64_t>({k.pages_from(t, end), v.pages_from(t, end), TILE_PAGES})) : 0;
  }

  // Scores of whole pages, as `score` makes them.
  void score_pages(int64_t t, int pages) {
    const Format& f = *k.store.f;
    const int tokens = pages * PAGE;
    float scales[TILE];
    const uint8_t* first_page = k.page_of(b, h, t);
    const int64_t bytes = k.store.pages_page;
    for (int p = 0; p < pages; ++p) page_scales(scales + p * PAGE, first_page + p * bytes);
    const bool words = f.bits > INT8_BITS;
    if (words) centre_words(first_page, pages);
    else centre_bytes(first_page, pages);
    const Planes planes(first_page, bytes, pages, codes, f, layout_k);
    const uint8_t* levels = words ? f.levels16[0] : f.levels8_biased;
    const ScoreArgs args{scores, SCORES_LD, tokens, count, planes, layout_k, levels, query_lanes, score_rows, scales};
    const Prefetch ahead(first_page + pages * bytes, pages * bytes, tokens / W);
    if (words) score_words(args, ahead, f.bits);
    else score_codes(args, ahead);
  }

  // Products p of levels and a query are corrected for the coding error, as `tqc.ops.attend` says: behind |query| they
  // are stretched, to p + stretch (p - |query|).
  void set_lines(ScoreRow& row, Line plain, int r) const {
    const float stretch = k.store.f->score_stretch, slope = 1 + stretch;
    row.plain = plain;
    row.stretched = {plain.slope * slope, plain.intercept * slope - stretch * stretch_from[r]};
  }

  // Fills `score_rows` for int8 products.
  void centre_bytes(const uint8_t* page, int pages) {
    const Format& f = *k.store.f;
    float steps[TILE_PAGES];
    for (int p = 0; p < pages && f.centred; ++p, page += k.store.pages_page) {
      steps[p] = read_float(page + 4);
      unpack_nibbles(nibbles + p * query_bytes(), page + f.centre_offset, f.dim / 2);
    }
    for (int r = 0; r < count; ++r) {
      ScoreRow& row = score_rows[r];
      const float step = query_step[r] * f.score_step;
      set_lines(row, {step, -LEVEL_BIAS * query_sum[r] * step}, r);
      if (!f.centred) continue;
      const i4 at_centre = dot_nibbles(nibbles, query8 + r * query_bytes(), query_bytes()) - CENTRE_ZERO * query_sum[r];
      for (int p = 0; p < pages; ++p) row.constants[p] = float(at_centre[p]) * query_step[r] * steps[p] + head_bias[r];
    }
  }

  // The same for int16 products, which are so exact that the centre's is in float32.
  void centre_words(const uint8_t* page, int pages) {
    const Format& f = *k.store.f;
    for (int r = 0; r < count; ++r) set_lines(score_rows[r], {query_step[r] * f.level16_step, 0}, r);
    for (int p = 0; p < pages && f.centred; ++p, page += k.store.pages_page) {
      page_centre(centre, page, f);
      for (int r = 0; r < count; ++r) score_rows[r].constants[p] = dot(rotated + r * ldk, centre, ldk) + head_bias[r];
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

  // scores [count, 32] before softcap and mask, those of packed tokens corrected for their coding error.
  void score(const Run& run, int64_t at, int tokens) {
    const Format& f = *k.store.f;
    if (run.kind == Kind::Zeros) {
      memset(scores, 0, sizeof(float) * count * SCORES_LD);
    } else if (run.kind == Kind::Rows) {
      gather(values, ldk, k, at, tokens);
      memset(values + tokens * ldk, 0, sizeof(float) * (PAGE - tokens) * ldk);
      if (count <= 8) return gemm_transposed(scores, SCORES_LD, query, values, ldk, count, ldk, tokens);
      transpose_floats(keys, values, ldk, ldk);
      gemm(scores, SCORES_LD, query, ldk, keys, PAGE, count, PAGE, f.dim, false);
    } else {
      float scales[2 * PAGE];
      page_scales(scales, run.page);
      uint8_t* turned = (uint8_t*)values;
      unpack_page(codes, ldk, run.page, f);
      transpose_bytes(turned, codes + run.offset * ldk, ldk, ldk);
      look_up(keys, turned, f.dim * PAGE, f);
      gemm(scores, SCORES_LD, rotated, ldk, keys, PAGE, count, PAGE, f.dim, false);
      if (f.centred) page_centre(centre, run.page, f);
      for (int t = tokens; t < PAGE; ++t) scales[run.offset + t] = 0;
      for (int r = 0; r < count; ++r) {
        vf constant = splat(f.centred ? dot(rotated + r * ldk, centre, ldk) + head_bias[r] : 0.0f);
        set_lines(score_rows[r], {1, 0}, r);
        const Line stretched = score_rows[r].stretched;
        for (int t = 0; t < PAGE; t += W) {
          float* s = scores + r * SCORES_LD + t;
          const vf product = load(s), scale = load(scales + run.offset + t);
          store(s, vmax(product, product * stretched.slope + stretched.intercept) * scale + constant);
        }
      }
    }
  }

  void load_mask(int64_t q_head, int64_t row, int64_t t, int tokens) {
    const char* first = mask->data + b * mask->batch + q_head * mask->head + row * mask->row - k.begin * mask->column;
    for (int i = 0; i < tokens; ++i) {
      const char* p = first + (k.places ? k.position(b, h, t + i) : t + i) * mask->column;
      added[i] = mask->dtype == BOOL ? (*p ? 0.0f : -INFINITY) : scalar_to_float(p, mask->dtype);
    }
  }

  // Scores to weights e**(s - top), running maximum and sum; rescales `out` where the maximum rose. If the values lie in
  // pages, `page` being the first, weights are multiplied by `value_scales`, and what the centres add goes to `out`.
  void soften(int64_t t, int tokens, const uint8_t* page) {
    const Format& f = *v.store.f;
    int64_t loaded = -1;
    const int columns = (tokens + PAGE - 1) / PAGE * PAGE;
    for (int p = 0; page && f.centred && p * PAGE < columns; ++p) {
      page_centre(centre + p * ldv, page + p * v.store.pages_page, f);
      for (float* c = centre + p * ldv; c < centre + (p + 1) * ldv; c += W) store(c, load(c) + load(head_v.centre + (c - centre) % ldv));
    }
    for (int r = 0; r < count; ++r) {
      float* s = scores + r * SCORES_LD;
      const int64_t row = (first + r) / group, q_head = head + (first + r) % group;
      if (mask->data && (loaded != row || mask->head)) {
        load_mask(q_head, row, t, tokens);
        loaded = row;
      }
      const int64_t visible = std::min<int64_t>(tokens, causal_limit + row + 1 - t);
      const vf old = splat(top[r]);
      vf peak = old;
      if (mask->data || softcap != 0 || visible < columns) {
        for (int i = 0; i < columns; i += W) {
          vf x = load(s + i);
          if (softcap != 0) x = vtanh(x / softcap) * softcap;
          if (mask->data) {
            vf m = load(added + i);
            x = mask->dtype == BOOL ? (m < 0.0f ? m : x) : x + m;
          }
          if (visible < i + W)
            for (int lane = 0; lane < W; ++lane)
              if (i + lane >= visible) x[lane] = -INFINITY;
          store(s + i, x);
          peak = vmax(x, peak);
        }
      } else {
        for (int i = 0; i < columns; i += W) peak = vmax(load(s + i), peak);
      }
      if (any(peak > old)) {
        top[r] = hmax(peak);
        rescale(r, old[0] == -INFINITY ? 0.0f : std::exp(old[0] - top[r]));
      }
      const vf base = splat(top[r] == -INFINITY ? 0.0f : top[r]);
      vf total = load(sums + r * W);
      vu heaviest{};  // bits of numbers >= 0 order as they do; those of NaN are the highest
      for (int p = 0; p < columns; p += PAGE) {
        vf weight{};
        for (int i = p; i < p + PAGE; i += W) {
          vf w = vexp(load(s + i) - base);
          weight += w;
          if (page) w *= load(value_scales + i);
          heaviest = (vu)w > heaviest ? (vu)w : heaviest;
          store(s + i, w);
        }
        total += weight;
        if (page && f.centred) add_centre(r, centre + p / PAGE * ldv, hsum(weight));
      }
      store(sums + r * W, total);
      factor[r] = any((vi)(heaviest >= 0x7f800000)) ? NAN : hmax((vf)heaviest);
    }
  }

  void add_centre(int r, const float* from, float weight) {
    float* o = out + r * ldv;
    for (int i = 0; i < ldv; i += W) store(o + i, load(o + i) + load(from + i) * weight);
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
    if (run.kind == Kind::Rows) gather(values, ldv, v, at, tokens);
    else decode_levels(run.page, run.offset, tokens);
    gemm(out, ldv, scores, SCORES_LD, values, ldv, count, ldv, tokens, true);
  }

  void decode_levels(const uint8_t* page, int offset, int tokens) {
    unpack_page(codes, ldv, page, *v.store.f);
    look_up(values, codes + offset * ldv, tokens * ldv, *v.store.f);
  }

  // As `accumulate`, for whole pages.
  void accumulate_pages(const uint8_t* page, int pages) {
    const Format& f = *v.store.f;
    const int64_t bytes = v.store.pages_page;
    bool finite = true;
    for (int r = 0; r < count; ++r) finite &= factor[r] == factor[r];
    if (finite) {
      const int tokens = pages * PAGE;
      const bool words = f.bits > INT8_BITS;
      for (int r = 0; r < count; ++r) {
        const float* w = scores + r * SCORES_LD;
        factor[r] = words ? quantize_weights16(weights16 + r * TILE, w, tokens, factor[r]) * f.level16_step
                          : quantize_weights(weights8 + r * TILE, w, tokens, factor[r]) * f.level8_step;
      }
      const Planes planes(page, bytes, pages, codes, f, layout_v);
      const Prefetch ahead(page + pages * bytes, pages * bytes, tokens / 4 * layout_v.chunks);
      const uint8_t* levels = words ? f.levels16[0] : (const uint8_t*)f.levels8;
      const uint8_t* weights = words ? (const uint8_t*)weights16 : weights8;
      const SumArgs args{out, ldv, tokens, count, planes, layout_v, levels, weights, factor};
      return words ? sum_words(args, ahead, f.bits) : sum_codes(args, ahead);
    }
    for (int p = 0; p < pages; ++p) {
      decode_levels(page + p * bytes, 0, PAGE);
      gemm(out, ldv, scores + p * PAGE, SCORES_LD, values, ldv, count, ldv, PAGE, true);
    }
  }
};

}  // namespace tqc
