// The op attend: one task per (batch, key/value head, block of query rows, split of the packed tokens).
//
// With q' = R_k (balance_k q), packed token t of page p scores s_t (q' . level_t) + q' . (centre_head + centre_p), and
// adds w_t s_t level_t + w_t (centre_head + centre_p) to an output in V's rotated basis, which is rotated back and
// multiplied by balance_v once per task.
// Dense tokens join the same online softmax in the model's basis. Values of a folded format, and so the output, are
// in the rotated basis throughout.
#pragma once
#include <numeric>

#include "parallel.h"
#include "tile.h"

namespace tqc {

constexpr int64_t DENSE_COST = 4;  // time of a dense token, in packed ones

struct AttendArgs {
  View k, v;
  Dense query, out;
  float* lse;  // [batch, query heads, rows] or null
  int64_t batch, heads, group, rows;
  int64_t begin, end;  // tokens of the first column and behind the last
  Mask mask;
  const float* sinks;  // [query heads] or null
  float scale, softcap;
  bool causal;
};

// Unnormalized output of some rows over some tokens: sum of e**(s - top) v, and of e**(s - top).
struct Partial {
  float *out, *top, *sum;
  int ld;
};

inline void write_rows(const AttendArgs& a, const Partial& p, int64_t b, int64_t h, int64_t first, int64_t count) {
  const int dim = a.v.store.f->dim;
  for (int64_t r = 0; r < count; ++r) {
    int64_t head = h * a.group + (first + r) % a.group, row = (first + r) / a.group;
    float top = p.top[r], sum = p.sum[r], factor = 1;
    if (a.sinks) {
      float joined = std::max(top, a.sinks[head]), base = joined == -INFINITY ? 0 : joined;
      factor = std::exp(top - base);
      sum = sum * factor + std::exp(a.sinks[head] - base);
      top = joined;
    }
    float* out = p.out + r * p.ld;
    float scale = sum == 0 ? 0 : factor / sum;
    for (int i = 0; i < p.ld; i += W) store(out + i, load(out + i) * scale);
    from_float(a.out.at(b, head, row), out, dim, a.out.dtype);
    if (a.lse) a.lse[(b * a.heads * a.group + head) * a.rows + row] = sum == 0 ? -INFINITY : top + std::log(sum);
  }
}

// Adds partial `p` to `into`, `count` rows.
inline void merge(Partial& into, const Partial& p, int64_t count) {
  for (int64_t r = 0; r < count; ++r) {
    float top = std::max(into.top[r], p.top[r]), base = top == -INFINITY ? 0 : top;
    float left = std::exp(into.top[r] - base), right = std::exp(p.top[r] - base);
    into.top[r] = top;
    into.sum[r] = into.sum[r] * left + p.sum[r] * right;
    float *x = into.out + r * into.ld, *y = p.out + r * p.ld;
    for (int i = 0; i < p.ld; i += W) store(x + i, load(x + i) * left + load(y + i) * right);
  }
}

// What of a cache lies in pages of one width each: all its packed tokens or, with groups, those in one page of each block.
struct Part {
  View k, v;
};

// Attends to tokens [from, to) of a part's pages, and to what is dense where `dense_too`.
inline void attend_task(const AttendArgs& a, const Part& part, Partial& p, int64_t b, int64_t h, int64_t first,
                        int64_t count, int64_t from, int64_t to, bool dense_too) {
  const Format &fk = *part.k.store.f, &fv = *part.v.store.f;
  Tile tile(part.k, part.v, b, h, int(count));
  tile.reserve(scratch);
  tile.out = p.out;
  tile.top = p.top;
  tile.sum = p.sum;
  tile.scale = a.scale;
  tile.softcap = a.softcap;
  tile.mask = &a.mask;
  tile.head = h * a.group;
  tile.group = int(a.group);
  tile.first = first;
  // Tokens in groups all come before the new ones.
  tile.causal_limit = a.causal && !part.k.places ? a.k.length + a.k.fresh - a.rows : INT64_MAX / 2;
  for (int64_t r = 0; r < count; ++r) {
    float* q = tile.query + r * padded(fk.dim);
    for (int i = fk.dim; i < padded(fk.dim); ++i) q[i] = 0;
    to_float(q, a.query.at(b, tile.head + (first + r) % a.group, (first + r) / a.group), fk.dim, a.query.dtype);
    p.top[r] = -INFINITY;
  }
  memset(p.out, 0, sizeof(float) * count * p.ld);
  tile.start();
  // No row of this block sees a column from here on.
  const int64_t limit = part.k.places ? to : std::min(a.end, tile.causal_limit + (first + count - 1) / a.group + 1);
  to = std::min(to, limit);
  if (from < to) {
    tile.run(from, to);
    if (!fv.folded || fv.centred) {
      unrotate_rows(tile.unrotated, p.out, int(count), fv, tile.head_v.balance);
      memcpy(p.out, tile.unrotated, sizeof(float) * count * p.ld);
    }
  }
  if (dense_too) {
    tile.run(a.begin, std::min(part.v.packed_begin(), limit));
    tile.run(part.v.packed_end(), limit);
  }
  tile.finish();
}

// One page of each block of a view, page `page` of a tier, as if it were all that is packed.
inline View of_tier(const View& whole, const Tier& tier, int page, int place) {
  const int64_t blocks = (whole.packed_end() - whole.packed_begin()) / whole.store.f->block_tokens;
  const int64_t end = whole.store.f->sink_tokens + blocks * PAGE;
  View part{whole.store, Dense{}, 0, end, blocks * PAGE, end, 0};
  part.places = part.store.pages + whole.store.f->places_offset + place;
  part.group = whole.store.f->block_tokens;
  part.store.pages += tier.offset + page * tier.f->page_bytes;
  part.store.f = tier.f;
  return part;
}

constexpr int MOST_PARTS = 8;  // pages of a block; one more for what is dense

inline void attend(const AttendArgs& a) {
  const Format &fk = *a.k.store.f, &fv = *a.v.store.f;
  const int ld = padded(fv.dim);
  const int64_t all_rows = a.group * a.rows;
  const int64_t block = all_rows <= 64 ? all_rows : 64;
  const int64_t blocks = (all_rows + block - 1) / block;
  const int64_t groups = a.batch * a.heads * blocks;

  Part parts[MOST_PARTS + 1];
  int count = 0;
  if (a.k.packed_end() > a.k.packed_begin())
    for (size_t tier = 0; tier < fk.tiers.size(); ++tier)
      for (int page = 0; page < fk.tiers[tier].pages; ++page, ++count)
        parts[count] = {of_tier(a.k, fk.tiers[tier], page, count * PAGE), of_tier(a.v, fv.tiers[tier], page, count * PAGE)};
  const bool apart = count;  // what is dense is a part of its own
  if (!apart) count = 1;
  parts[apart ? count : 0] = {a.k, a.v};
  const View& packed = parts[0].v;
  const int64_t begin = packed.packed_begin(), end = packed.packed_end();
  const int64_t first_page = begin - (begin - fv.sink_tokens) % PAGE;
  const int64_t pages = (end - first_page + PAGE - 1) / PAGE;
  const int64_t dense_tokens = a.end - a.begin - (a.v.packed_end() - a.v.packed_begin());
  const double products = double(groups) * block * (count * pages * PAGE + dense_tokens) * (fk.dim + fv.dim);
  const int threads = products < 5e5 ? 1 : available_threads();

  // Splits that give all threads as much to do, and more of them, which a thread that falls behind leaves to others,
  // where each has 32 pages or more: the query is rotated for each anew. The last takes the dense tokens too and so many
  // pages less.
  const int64_t dense_pages = DENSE_COST * dense_tokens / PAGE, work = count * pages + (apart ? 0 : dense_pages);
  const int64_t even = threads / std::gcd(groups, int64_t(threads)), many = (4 * threads + groups - 1) / groups;
  int64_t each = std::max(std::min(even, work / 8), std::min(many, work / 32));
  each = threads == 1 || pages == 0 ? 1 : std::max<int64_t>(1, std::min((each + count - 1) / count, pages));
  const int64_t per_split = (work / count + each - 1) / each, splits = count * each + apart;

  const size_t partial_floats = size_t(block) * (ld + 32);
  static thread_local Scratch shared;
  shared.reserve(groups * splits * (partial_floats * sizeof(float) + 256) + groups * 64 + 4096);
  float* partials = shared.take<float>(groups * splits * partial_floats);
  auto* arrived = shared.take<std::atomic<int>>(groups * 16);
  for (int64_t i = 0; i < groups; ++i) arrived[i * 16].store(0, std::memory_order_relaxed);
  auto partial = [&](int64_t group, int64_t split) {
    float* p = partials + (group * splits + split) * partial_floats;
    return Partial{p, p + block * ld, p + block * (ld + 16), ld};
  };

  parallel(groups * splits, threads, [&](int64_t task) {
    const int64_t group = task / splits, split = task % splits;
    // Later query rows see more tokens under a causal mask: hand those out first.
    const int64_t index = blocks - 1 - group % blocks, b = group / blocks / a.heads, h = group / blocks % a.heads;
    const int64_t first = index * block, rows = std::min(block, all_rows - first);
    const bool last = split == splits - 1;
    Partial p = partial(group, split);
    int64_t from = first_page + split % each * per_split * PAGE, to = std::min(end, from + per_split * PAGE);
    if (apart && last) from = to = 0;
    attend_task(a, parts[split / each], p, b, h, first, rows, std::max(begin, from), to, last);
    if (splits > 1) {
      if (arrived[group * 16].fetch_add(1, std::memory_order_acq_rel) != splits - 1) return;
      p = partial(group, 0);
      for (int64_t other = 1; other < splits; ++other) merge(p, partial(group, other), rows);
    }
    write_rows(a, p, b, h, first, rows);
  });
}

}  // namespace tqc
