#define FUNCTION static inline
#define SHARED threadgroup
#define UNROLL _Pragma("clang loop unroll(full)")
#define simd_barrier() simdgroup_barrier(mem_flags::mem_threadgroup)
#define group_barrier() threadgroup_barrier(mem_flags::mem_threadgroup)
typedef bfloat16_t number;
enum { ROWS = 4, SIMDS = 4, SINKS = 4, WINDOW = 64, K_D = 64, K_J = 2, K_BITS = 3, K_PAGE_BYTES = 848, V_D = 64, V_J = 2, V_BITS = 3, V_PAGE_BYTES = 816 };
FUNCTION int least(int a, int b) { return a < b ? a : b; }
FUNCTION int largest(int a, int b) { return a > b ? a : b; }
FUNCTION float larger(float a, float b) { return a > b ? a : b; }
// exp(x - origin), and 0 where both are -inf.
FUNCTION float weight(float x, float origin) {
  return exp2((x - (origin == -INFINITY ? 0.0f : origin)) * 1.44269504f);
}

FUNCTION void butterfly(threadgroup float* x, int size, int step, int lane) {
  for (int i = lane; i < size / 2; i += 32) {
    const int at = i / step * 2 * step + i % step;
    const float a = x[at];
    const float b = x[at + step];
    x[at] = a + b;
    x[at + step] = a - b;
  }
  simd_barrier();
}

FUNCTION float token_scale(device const uint8_t* page, int token) {
  const int code = page[16 + token];
  const float base = *(device const float*)page;
  return (code == 255 ? 0.0f : code == 254 ? NAN : exp2(float(code) * -0.03125f)) * base;
}

FUNCTION void load_8(device const uint8_t* at, thread uint32_t* words) {
  const uint2 loaded = *(device const uint2*)at;
  words[0] = loaded.x;
  words[1] = loaded.y;
}

// Adds to p[r] the products of the levels of a token with row r of q.
FUNCTION void k_products(device const uint8_t* page, int token, threadgroup const float* q,
                        threadgroup const float* levels, thread float* p) {
  for (int b = 0; b < 8; b += 8) {
    uint32_t plane_1[1][2];
    load_8(page + 592 + token * 8 + b, plane_1[0]);
    uint32_t plane_2[2][2];
    load_8(page + 80 + token * 16 + b, plane_2[0]);
    load_8(page + 88 + token * 16 + b, plane_2[1]);
    UNROLL for (int f = 0; f < 8; f++) {
      UNROLL for (int i = 0; i < 2; i++) {
        const uint32_t codes = ((plane_1[f % 1][i] >> f / 1 * 1) & 0x01010101) << 2 | ((plane_2[f % 2][i] >> f / 2 * 2) & 0x03030303) << 0;
        UNROLL for (int c = 0; c < 4; c++) {
          const float level = levels[codes >> 8 * c & 255];
          UNROLL for (int r = 0; r < ROWS; r++) p[r] += q[r * 64 + f * 8 + b + 4 * i + c] * level;
        }
      }
    }
  }
}

// Element lane + 32 * j of the page's centre, in its unit.
FUNCTION float k_centre(device const uint8_t* page, int j, int lane) {
  return float(page[48 + (lane + 32 * (j % 1))] >> (j / 1) * 4 & 15) - 8.0f;
}
FUNCTION float k_unit(device const uint8_t* page) { return ((device const float*)page)[1]; }

// Code of element lane + 32 * j of a token; behind the last element it is any.
FUNCTION int v_code(device const uint8_t* page, int token, int j, int lane) {
  return (page[48 + token * 16 + (lane % 16)] >> (j * 2 + lane / 16) * 2 & 3) << 0 | (page[560 + token * 8 + (lane % 8)] >> (j * 4 + lane / 8) * 1 & 1) << 2;
}

FUNCTION void k_signs(threadgroup float* x, device const float* table, int lane) {
  for (int e = lane; e < 64; e += 32) x[e] *= table[16 + e];
  simd_barrier();
}

FUNCTION void k_rotate(threadgroup float* x, device const float* table, int lane) {
  simd_barrier();
  k_signs(x, table, lane);
  butterfly(x, 64, 1, lane);
  butterfly(x, 64, 2, lane);
  butterfly(x, 64, 4, lane);
  butterfly(x, 64, 8, lane);
  butterfly(x, 64, 16, lane);
  butterfly(x, 64, 32, lane);
}

FUNCTION void v_signs(threadgroup float* x, device const float* table, int lane) {
  for (int e = lane; e < 64; e += 32) x[e] *= table[16 + e];
  simd_barrier();
}

FUNCTION void v_unrotate(threadgroup float* x, device const float* table, int lane) {
  simd_barrier();
  butterfly(x, 64, 1, lane);
  butterfly(x, 64, 2, lane);
  butterfly(x, 64, 4, lane);
  butterfly(x, 64, 8, lane);
  butterfly(x, 64, 16, lane);
  butterfly(x, 64, 32, lane);
  v_signs(x, table, lane);
}

// Adds the values of a page, whose tokens have weights[token][row].
FUNCTION void add_page(device const uint8_t* page, threadgroup const float* weights, threadgroup const float* levels,
                       thread float* sums, int lane) {
  for (int t = 0; t < 32; t++) {
    UNROLL for (int j = 0; j < V_J; j++) {
      const float level = levels[v_code(page, t, j, lane)];
      UNROLL for (int r = 0; r < ROWS; r++) sums[r * V_J + j] += weights[t * ROWS + r] * level;
    }
  }
}
// One step of a simdgroup's softmax: scores become weights.
FUNCTION void softmax_step(thread float* scores, thread float* top, thread float* total, thread float* sums) {
  UNROLL for (int r = 0; r < ROWS; r++) {
    const float next = larger(simd_max(scores[r]), top[r]);
    const float before = weight(top[r], next);
    scores[r] = weight(scores[r], next);
    top[r] = next;
    total[r] = total[r] * before + scores[r];
    UNROLL for (int j = 0; j < V_J; j++) sums[r * V_J + j] *= before;
  }
}
FUNCTION void clear(thread float* top, thread float* total, thread float* sums) {
  UNROLL for (int r = 0; r < ROWS; r++) {
    top[r] = -INFINITY;
    total[r] = 0.0f;
    UNROLL for (int j = 0; j < V_J; j++) sums[r * V_J + j] = 0.0f;
  }
}
// Adds what the simdgroups have to all_sums[row][element], all_tops[row] and all_totals[row].
FUNCTION void join(thread const float* top, thread const float* total, thread const float* sums,
                   threadgroup float* all_sums, threadgroup float* all_tops, threadgroup float* all_totals,
                   threadgroup float* tops, threadgroup float* totals, int simd, int lane) {
  UNROLL for (int r = 0; r < ROWS; r++) {
    const float whole = simd_sum(total[r]);
    if (lane == 0) {
      tops[simd * ROWS + r] = top[r];
      totals[simd * ROWS + r] = whole;
    }
  }
  group_barrier();
  for (int s = 0; s < SIMDS; s++) {
    if (s == simd) {
      UNROLL for (int r = 0; r < ROWS; r++) {
        float next = all_tops[r];
        for (int i = 0; i < SIMDS; i++) next = larger(tops[i * ROWS + r], next);
        const float before = s == 0 ? weight(all_tops[r], next) : 1.0f;
        const float factor = weight(top[r], next);
        UNROLL for (int j = 0; j < V_J; j++) {
          const int e = lane + 32 * j;
          if (e < V_D) all_sums[r * V_D + e] = all_sums[r * V_D + e] * before + sums[r * V_J + j] * factor;
        }
      }
    }
    group_barrier();
  }
  const int r = simd * 32 + lane;
  if (r < ROWS) {
    float next = all_tops[r];
    for (int i = 0; i < SIMDS; i++) next = larger(tops[i * ROWS + r], next);
    float whole = all_totals[r] * weight(all_tops[r], next);
    for (int i = 0; i < SIMDS; i++) whole += totals[i * ROWS + r] * weight(tops[i * ROWS + r], next);
    all_tops[r] = next;
    all_totals[r] = whole;
  }
  group_barrier();
}
[[kernel]] void custom_kernel_tqc_attend_d64_k3_v3_r4_bool_whole_bfloat16_t_uint8_t_bfloat16_t_int32_tc_uint8_t_bfloat16_t_int32_tc_int32_tc_bfloat16_t_bfloat16_t_bool_floatc_float_float_floatc_int32_tc_bfloat16_t_float(
  const device bfloat16_t* query [[buffer(0)]],
  const constant int* query_shape [[buffer(1)]],
  const device uint8_t* k_pages [[buffer(2)]],
  const constant int* k_pages_shape [[buffer(3)]],
  const device bfloat16_t* k_dense [[buffer(4)]],
  const constant int* k_dense_shape [[buffer(5)]],
  const constant int32_t* k_state [[buffer(6)]],
  const device uint8_t* v_pages [[buffer(7)]],
  const constant int* v_pages_shape [[buffer(8)]],
  const device bfloat16_t* v_dense [[buffer(9)]],
  const constant int* v_dense_shape [[buffer(10)]],
  const constant int32_t* v_state [[buffer(11)]],
  const constant int32_t* start [[buffer(12)]],
  const device bfloat16_t* key [[buffer(13)]],
  const device bfloat16_t* value [[buffer(14)]],
  const device bool* mask [[buffer(15)]],
  const constant int* mask_shape [[buffer(16)]],
  const constant float* sinks [[buffer(17)]],
  const device float* k_table [[buffer(18)]],
  const device float* v_table [[buffer(19)]],
  const constant float* factors [[buffer(20)]],
  const constant int32_t* options [[buffer(21)]],
  device bfloat16_t* out [[buffer(22)]],
  device float* lse [[buffer(23)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]],
  uint3 threadgroups_per_grid [[threadgroups_per_grid]]) {

  const int lane = thread_index_in_simdgroup;
  const int simd = simdgroup_index_in_threadgroup;
  const int thread_at = simd * 32 + lane;
  const int heads = k_dense_shape[1];
  const int q_heads = query_shape[1];
  const int rows = query_shape[2];
  const int group = q_heads / heads;
  const int batch_at = threadgroup_position_in_grid.y / heads;
  const int head_at = threadgroup_position_in_grid.y;
  const int first_row = threadgroup_position_in_grid.x * ROWS;
  const int share = threadgroup_position_in_grid.z;
  const int shares = threadgroups_per_grid.z;
  const int fresh = options[0];
  const bool causal = options[1] != 0;
  const float scale = factors[0];
  const float softcap = factors[1];

  // Counts of tokens, and columns, which count from the first token that is held.
  const int length = int(k_state[0]);
  const int v_length = int(v_state[0]);
  const int begin = int(k_state[2]);
  const int first = options[2] != 0 ? int(start[0]) : largest(length, v_length);
  const bool agree = least(length, first) == least(v_length, first) && begin == int(v_state[2]);
  const int stored = least(length, first);
  const int coded = least(int(k_state[1]), stored - SINKS);
  const int oldest = largest(begin - SINKS, 0);
  const int end_page = (largest(coded, 0) + 31) / 32;
  const int held_sinks = largest(least(stored, SINKS) - begin, 0);
  const int recent = largest(largest(coded, 0), oldest);
  const int held_recent = largest(stored - SINKS - recent, 0);
  const int first_column = first - begin;

  SHARED float q[ROWS * K_D];
  SHARED float all_sums[ROWS * V_D];
  SHARED float all_tops[ROWS];
  SHARED float all_totals[ROWS];
  SHARED float tops[SIMDS * ROWS];
  SHARED float totals[SIMDS * ROWS];
  SHARED float weights[SIMDS * 32 * ROWS];
  SHARED float k_levels[1 << K_BITS];
  SHARED float v_levels[1 << V_BITS];
  SHARED float bias[ROWS];
  SHARED float norm[ROWS];
  SHARED int place[SIMDS * 32];
  // Of each row: where it is in the query, the last column that it sees; and where its mask begins.
  SHARED int64_t q_at[ROWS];
  SHARED int last_seen[ROWS];
  threadgroup float* own_weights = weights + simd * 32 * ROWS;

  for (int i = thread_at; i < ROWS * V_D; i += SIMDS * 32) all_sums[i] = 0.0f;
  for (int i = thread_at; i < 1 << K_BITS; i += SIMDS * 32) k_levels[i] = k_table[i];
  for (int i = thread_at; i < 1 << V_BITS; i += SIMDS * 32) v_levels[i] = v_table[i];
  SHARED int64_t mask_at[ROWS];
  const int mask_columns = mask_shape[3];
  const int mask_step = mask_columns > 1 ? 1 : 0;
  if (thread_at < ROWS) {
    const int row = least(first_row + thread_at, rows * group - 1);
    const int i = row / group;
    const int q_head = head_at % heads * group + row % group;
    q_at[thread_at] = ((int64_t(batch_at) * q_heads + q_head) * rows + i) * K_D;
    last_seen[thread_at] = causal ? first_column + i + fresh - rows : 0x7fffffff;
    all_tops[thread_at] = -INFINITY;
    all_totals[thread_at] = 0.0f;
    const int mask_batch = mask_shape[0] > 1 ? batch_at : 0;
    const int mask_head = mask_shape[1] > 1 ? q_head : 0;
    const int mask_row = mask_shape[2] > 1 ? i : 0;
    mask_at[thread_at]
        = ((int64_t(mask_batch) * mask_shape[1] + mask_head) * mask_shape[2] + mask_row) * mask_columns;
  }
  group_barrier();

  float top[ROWS];
  float total[ROWS];
  float sums[ROWS * V_J];
  float scores[ROWS];
  device const number* k_rows = k_dense + int64_t(head_at) * k_dense_shape[2] * K_D;
  device const number* v_rows = v_dense + int64_t(head_at) * v_dense_shape[2] * V_D;

  // Packed tokens.
  if (oldest / 32 + share * SIMDS < end_page) {
    clear(top, total, sums);
    for (int r = simd; r < ROWS; r += SIMDS) {
      threadgroup float* row = q + r * K_D;
      float square = 0.0f;
      for (int e = lane; e < K_D; e += 32) {
        float x = float(query[q_at[r] + e]) * scale;
        x *= float(k_rows[(SINKS + WINDOW + 1) * K_D + e]);
        row[e] = x;
        square += x * x;
      }
      square = simd_sum(square);
      if (lane == 0) norm[r] = sqrt(square);
      k_rotate(row, k_table, lane);
      float product = 0.0f;
      for (int e = lane; e < K_D; e += 32) product += row[e] * float(k_rows[(SINKS + WINDOW) * K_D + e]);
      product = simd_sum(product);
      if (lane == 0) bias[r] = product;
    }
    group_barrier();
    for (int page_at = oldest / 32 + share * SIMDS + simd; page_at < end_page; page_at += shares * SIMDS) {
      device const uint8_t* k_page = k_pages
          + (int64_t(head_at) * k_pages_shape[2] + page_at % k_pages_shape[2]) * K_PAGE_BYTES;
      device const uint8_t* v_page = v_pages
          + (int64_t(head_at) * v_pages_shape[2] + page_at % v_pages_shape[2]) * V_PAGE_BYTES;
      const int token = page_at * 32 + lane;
      const bool inside = token < coded && token >= oldest;
      const int column = SINKS + token - begin;
      UNROLL for (int r = 0; r < ROWS; r++) scores[r] = 0.0f;
      k_products(k_page, lane, q, k_levels, scores);
      const float k_scale = token_scale(k_page, lane);
      UNROLL for (int r = 0; r < ROWS; r++) {
        const float stretched = scores[r] + 0.033390834f * (scores[r] - norm[r]);
        scores[r] = (scores[r] < stretched ? stretched : scores[r]) * k_scale + bias[r];
      }
      UNROLL for (int r = 0; r < ROWS; r++) {
        float product = 0.0f;
        UNROLL for (int j = 0; j < K_J; j++) {
          if (lane + 32 * j < K_D) product += q[r * K_D + lane + 32 * j] * k_centre(k_page, j, lane);
        }
        scores[r] += simd_sum(product) * k_unit(k_page);
      }
      UNROLL for (int r = 0; r < ROWS; r++) {
        float score = scores[r];
        if (softcap != 0.0f) score = softcap * tanh(score / softcap);
        if (inside && !mask[mask_at[r] + column * mask_step]) score = -INFINITY;
        if (!inside || column > last_seen[r]) score = -INFINITY;
        scores[r] = score;
      }
      softmax_step(scores, top, total, sums);
      const float v_scale = inside ? token_scale(v_page, lane) : 0.0f;
      UNROLL for (int r = 0; r < ROWS; r++) own_weights[lane * ROWS + r] = scores[r] * v_scale;
      simd_barrier();
      add_page(v_page, own_weights, v_levels, sums, lane);
      simd_barrier();
    }
    join(top, total, sums, all_sums, all_tops, all_totals, tops, totals, simd, lane);
    for (int r = simd; r < ROWS; r += SIMDS) {
      threadgroup float* row = all_sums + r * V_D;
      v_unrotate(row, v_table, lane);
    }
    group_barrier();
  }

  // Tokens that no page holds: sinks, the ring, new ones; and columns that stand for keys and values of zeros.
  const int dense_count = held_sinks + held_recent + fresh;
  const int last_share = shares - 1 - share;
  const int zero_first[2] = {stored - begin, first_column + fresh};
  const int zero_end[2] = {first_column, largest(mask_columns, first_column + fresh)};
  const bool zeros = zero_first[0] < zero_end[0] || zero_first[1] < zero_end[1];
  if (last_share * SIMDS * 32 < dense_count || zeros) {
    clear(top, total, sums);
    for (int i = thread_at; i < ROWS * K_D; i += SIMDS * 32) {
      q[i] = float(query[q_at[i / K_D] + i % K_D]) * scale;
    }
    group_barrier();
    device const number* new_keys = key + int64_t(head_at) * fresh * K_D;
    device const number* new_values = value + int64_t(head_at) * fresh * V_D;
    threadgroup int* own_place = place + simd * 32;
    for (int x = (last_share * SIMDS + simd) * 32; x < dense_count; x += shares * SIMDS * 32) {
      // Rows of `dense`, or below 0 those of new tokens, from the last one on.
      const bool inside = x + lane < dense_count;
      const int i = least(x + lane, dense_count - 1);
      int at = begin + i;
      int column = i;
      if (i >= held_sinks + held_recent) {
        at = i - held_sinks - held_recent - fresh;
        column = first_column + fresh + at;
      } else if (i >= held_sinks) {
        const int u = recent + i - held_sinks;
        at = SINKS + u % WINDOW;
        column = SINKS + u - begin;
      }
      own_place[lane] = at;
      device const number* k_row = at < 0 ? new_keys + int64_t(fresh + at) * K_D : k_rows + at * K_D;
      UNROLL for (int r = 0; r < ROWS; r++) scores[r] = 0.0f;
      for (int e = 0; e < K_D; e += 4) {
        UNROLL for (int c = 0; c < 4; c++) {
          const float x_k = float(k_row[e + c]);
          UNROLL for (int r = 0; r < ROWS; r++) scores[r] += q[r * K_D + e + c] * x_k;
        }
      }
      UNROLL for (int r = 0; r < ROWS; r++) {
        float score = scores[r];
        if (softcap != 0.0f) score = softcap * tanh(score / softcap);
        if (inside && !mask[mask_at[r] + column * mask_step]) score = -INFINITY;
        if (!inside || column > last_seen[r]) score = -INFINITY;
        scores[r] = score;
      }
      softmax_step(scores, top, total, sums);
      UNROLL for (int r = 0; r < ROWS; r++) own_weights[lane * ROWS + r] = scores[r];
      simd_barrier();
      for (int t = 0; t < least(32, dense_count - x); t++) {
        const int at_t = own_place[t];
        device const number* v_row = at_t < 0 ? new_values + int64_t(fresh + at_t) * V_D : v_rows + at_t * V_D;
        UNROLL for (int j = 0; j < V_J; j++) {
          const float x_v = lane + 32 * j < V_D ? float(v_row[lane + 32 * j]) : 0.0f;
          UNROLL for (int r = 0; r < ROWS; r++) sums[r * V_J + j] += own_weights[t * ROWS + r] * x_v;
        }
      }
      simd_barrier();
    }
    for (int part = 0; part < 2; part++) {
      for (int x = zero_first[part] + (share * SIMDS + simd) * 32; x < zero_end[part]; x += shares * SIMDS * 32) {
        const int column = x + lane;
        const bool inside = column < zero_end[part];
        UNROLL for (int r = 0; r < ROWS; r++) {
          float score = 0.0f;
        if (softcap != 0.0f) score = softcap * tanh(score / softcap);
        if (inside && !mask[mask_at[r] + column * mask_step]) score = -INFINITY;
        if (!inside || column > last_seen[r]) score = -INFINITY;
          scores[r] = score;
        }
        softmax_step(scores, top, total, sums);
      }
    }
    join(top, total, sums, all_sums, all_tops, all_totals, tops, totals, simd, lane);
  }

  for (int i = thread_at; i < ROWS * V_D; i += SIMDS * 32) {
    const int r = i / V_D;
    const int row = first_row + r;
    if (row < rows * group) {
      const int q_head = head_at % heads * group + row % group;
      float highest = all_tops[r];
      float whole = all_totals[r];
      float factor = 1.0f;
      if (share == shares - 1) {
        const float sink = float(sinks[q_head]);
        const float next = larger(sink, highest);
        factor = weight(highest, next);
        whole = whole * factor + weight(sink, next);
        highest = next;
      }
      if (!agree) whole = NAN;
      factor *= whole > 0.0f ? 1.0f / whole : whole;
      const int64_t target = (int64_t(share) * (query_shape[0] * rows) + batch_at * rows + row / group) * q_heads;
      out[(target + q_head) * V_D + i % V_D] = number(all_sums[i] * factor);
      if (i % V_D == 0) {
        const int64_t target = (int64_t(share) * query_shape[0] + batch_at) * q_heads + q_head;
        lse[target * rows + row / group] = whole == 0.0f ? -INFINITY : highest + log(whole);
      }
    }
  }

}

// ----
#define FUNCTION static inline
#define SHARED threadgroup
#define UNROLL _Pragma("clang loop unroll(full)")
#define simd_barrier() simdgroup_barrier(mem_flags::mem_threadgroup)
#define group_barrier() threadgroup_barrier(mem_flags::mem_threadgroup)
typedef bfloat16_t number;
enum { D = 64, J = 2, SIMDS = 8, TOKENS = 4, LEVELS = 8, BOUNDARIES = 8, PAGE_BYTES = 848, CENTRE = 48, PLANES = 80, TRIED = 5 };
FUNCTION int least(int a, int b) { return a < b ? a : b; }
FUNCTION int largest(int a, int b) { return a > b ? a : b; }
FUNCTION float larger(float a, float b) { return a > b ? a : b; }
// exp(x - origin), and 0 where both are -inf.
FUNCTION float weight(float x, float origin) {
  return exp2((x - (origin == -INFINITY ? 0.0f : origin)) * 1.44269504f);
}

FUNCTION void butterfly(threadgroup float* x, int size, int step, int lane) {
  for (int i = lane; i < size / 2; i += 32) {
    const int at = i / step * 2 * step + i % step;
    const float a = x[at];
    const float b = x[at + step];
    x[at] = a + b;
    x[at + step] = a - b;
  }
  simd_barrier();
}

FUNCTION void rows_signs(threadgroup float* x, device const float* table, int lane) {
  for (int e = lane; e < 64; e += 32) x[e] *= table[16 + e];
  simd_barrier();
}

FUNCTION void rows_rotate(threadgroup float* x, device const float* table, int lane) {
  simd_barrier();
  rows_signs(x, table, lane);
  butterfly(x, 64, 1, lane);
  butterfly(x, 64, 2, lane);
  butterfly(x, 64, 4, lane);
  butterfly(x, 64, 8, lane);
  butterfly(x, 64, 16, lane);
  butterfly(x, 64, 32, lane);
}

// Largest magnitude that `number` holds.
FUNCTION float clamped(float x) { return x > 3.3895313892515355e38f ? 3.3895313892515355e38f : x < -3.3895313892515355e38f ? -3.3895313892515355e38f : x; }
FUNCTION int scale_code(float scale, float base) {
  const float ratio = base > 0.0f ? scale / base : 0.0f;
  const float code = rint(-32.0f * log2(ratio));
  return ratio > 0.0f ? int(code < 0.0f ? 0.0f : code > 253.0f ? 253.0f : code) : 255;
}
// How many boundaries lie below x.
FUNCTION int nearest_code(float x, threadgroup const float* boundaries) {
  int code = 0;
  UNROLL for (int step = LEVELS / 2; step > 0; step /= 2) code += boundaries[code + step - 1] < x ? step : 0;
  return code;
}
[[kernel]] void custom_kernel_tqc_encode_d64_b3_centred_bfloat16_t_bfloat16_t_float_uint8_t(
  const device bfloat16_t* tokens [[buffer(0)]],
  const constant int* tokens_shape [[buffer(1)]],
  const device bfloat16_t* head [[buffer(2)]],
  const device float* table [[buffer(3)]],
  device uint8_t* pages [[buffer(4)]],
  uint simdgroup_index_in_threadgroup [[simdgroup_index_in_threadgroup]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]]) {

  const int lane = thread_index_in_simdgroup;
  const int simd = simdgroup_index_in_threadgroup;
  const int head_at = threadgroup_position_in_grid.y;
  const int page_at = threadgroup_position_in_grid.x;
  SHARED float work[SIMDS * D];
  SHARED float counts[SIMDS];
  threadgroup float* own_work = work + simd * D;
  float y[TOKENS * J];
  float good[TOKENS];

  SHARED uint8_t codes[SIMDS * D];
  SHARED float tops[SIMDS];
  SHARED float levels[LEVELS];
  SHARED float boundaries[LEVELS];
  threadgroup uint8_t* own_codes = codes + simd * D;
  device uint8_t* page = pages + (int64_t(head_at) * (tokens_shape[2] / 32) + page_at) * PAGE_BYTES;
  for (int i = simd * 32 + lane; i < LEVELS; i += SIMDS * 32) {
    levels[i] = table[i];
    boundaries[i] = table[BOUNDARIES + i];
  }

  UNROLL for (int k = 0; k < TOKENS; k++) {
    const int64_t at = (int64_t(head_at) * tokens_shape[2] + page_at * 32 + simd * TOKENS + k) * D;
    for (int e = lane; e < D; e += 32) own_work[e] = float(tokens[at + e]) / float(head[(int64_t(head_at) * 2 + 1) * D + e]);
    rows_rotate(own_work, table, lane);
    simd_barrier();
    float bad = 0.0f;
    UNROLL for (int j = 0; j < J; j++) {
      const int e = lane + 32 * j;
      y[k * J + j] = e < D ? own_work[e] - float(head[int64_t(head_at) * 2 * D + e]) : 0.0f;
      if (!isfinite(y[k * J + j])) bad = 1.0f;
    }
    good[k] = 1.0f - simd_max(bad);
    simd_barrier();
  }
  group_barrier();

  float count = 0.0f;
  UNROLL for (int k = 0; k < TOKENS; k++) count += good[k];
  if (lane == 0) counts[simd] = count;
  group_barrier();
  count = 0.0f;
  for (int s = 0; s < SIMDS; s++) count += counts[s];
  count = larger(count, 1.0f);
  for (int e = lane; e < D; e += 32) own_work[e] = 0.0f;
  UNROLL for (int k = 0; k < TOKENS; k++) {
    UNROLL for (int j = 0; j < J; j++) {
      if (lane + 32 * j < D && good[k] > 0.0f) own_work[lane + 32 * j] += y[k * J + j] / count;
    }
  }
  group_barrier();
  float mean[J];
  UNROLL for (int j = 0; j < J; j++) {
    mean[j] = 0.0f;
    for (int s = 0; s < SIMDS; s++) mean[j] += lane + 32 * j < D ? work[s * D + lane + 32 * j] : 0.0f;
  }

  float step = 0.0f;
  UNROLL for (int j = 0; j < J; j++) step = larger(fabs(mean[j]), step);
  step = simd_max(step) / 7.0f;
  UNROLL for (int j = 0; j < J; j++) {
    const float ratio = rint(mean[j] / step);
    const float code = isfinite(ratio) ? ratio : 0.0f;
    UNROLL for (int k = 0; k < TOKENS; k++) y[k * J + j] -= code * step;
    if (lane + 32 * j < D) own_codes[lane + 32 * j] = uint8_t(int(code) + 8);
  }
  simd_barrier();
  if (simd == 0) {
    for (int i = lane; i < PLANES - CENTRE; i += 32) {
      page[CENTRE + i] = i < D / 2 ? own_codes[i] | own_codes[i + D / 2] << 4 : 0;
    }
  }
  simd_barrier();

  float peak[TOKENS];
  float scale[TOKENS];
  float base = 0.0f;
  UNROLL for (int k = 0; k < TOKENS; k++) {
    float most = 0.0f;
    UNROLL for (int j = 0; j < J; j++) {
      if (good[k] == 0.0f || lane + 32 * j >= D) y[k * J + j] = 0.0f;
      most = larger(fabs(y[k * J + j]), most);
    }
    // |y| by way of its largest coordinate, so that squares neither overflow nor vanish.
    peak[k] = simd_max(most);
    float square = 0.0f;
    UNROLL for (int j = 0; j < J; j++) {
      const float unit = y[k * J + j] / larger(peak[k], 1.17549435e-38f);
      square += unit * unit;
    }
    scale[k] = peak[k] * sqrt(simd_sum(square) / float(D));
    base = larger(scale[k], base);
  }
  if (lane == 0) tops[simd] = base;
  group_barrier();
  for (int s = 0; s < SIMDS; s++) base = larger(tops[s], base);
  group_barrier();
  float largest_scale = 0.0f;
  UNROLL for (int k = 0; k < TOKENS; k++) {
    const int rounded = scale_code(scale[k], base);
    const float middle = rounded == 255 ? 0.0f : exp2(float(rounded) * -0.03125f) * base;
    float best = 0.0f;
    float chosen = 0.0f;
    float factor = 0.0f;
    for (int i = 0; i < TRIED; i++) {
      const float steps = i == 0 ? 0.0f : (i % 2 == 0 ? 4.0f : -4.0f) * float((i + 1) / 2);
      const float divisor = larger(middle * exp2(steps / 32.0f), 1.17549435e-38f);
      float product = 0.0f;
      float square = 0.0f;
      UNROLL for (int j = 0; j < J; j++) {
        if (lane + 32 * j < D) {
          const float level = levels[nearest_code(y[k * J + j] / divisor, boundaries)];
          product += y[k * J + j] / larger(peak[k], 1.17549435e-38f) * level;
          square += level * level;
        }
      }
      product = simd_sum(product);
      square = simd_sum(square);
      // The squared error that the scale of least squares leaves is |y|^2 - fit.
      const float fit = product * product / square;
      if (i == 0 || fit > best) {
        best = fit;
        chosen = divisor;
        factor = product / square;
      }
    }
    scale[k] = larger(peak[k] * factor, 0.0f);
    largest_scale = larger(scale[k], largest_scale);
    UNROLL for (int j = 0; j < J; j++) {
      if (lane + 32 * j < D) own_codes[lane + 32 * j] = uint8_t(nearest_code(y[k * J + j] / chosen, boundaries));
    }
    simd_barrier();
    const int token = simd * TOKENS + k;
    for (int i = lane; i < 16; i += 32) {
      int packed = 0;
      UNROLL for (int f = 0; f < 4; f++) packed |= (own_codes[f * 16 + i] >> 0 & 3) << f * 2;
      page[80 + token * 16 + i] = uint8_t(packed);
    }
    for (int i = lane; i < 8; i += 32) {
      int packed = 0;
      UNROLL for (int f = 0; f < 8; f++) packed |= (own_codes[f * 8 + i] >> 2 & 1) << f * 1;
      page[592 + token * 8 + i] = uint8_t(packed);
    }
    simd_barrier();
  }
  if (lane == 0) tops[simd] = largest_scale;
  group_barrier();
  base = 0.0f;
  for (int s = 0; s < SIMDS; s++) base = larger(tops[s], base);
  UNROLL for (int k = 0; k < TOKENS; k++) {
    if (lane == 0) page[16 + simd * TOKENS + k] = uint8_t(good[k] > 0.0f ? scale_code(scale[k], base) : 254);
  }
  if (simd == 0 && lane < 4) ((device float*)page)[lane] = lane == 0 ? base : lane == 1 ? step : 0.0f;

}
