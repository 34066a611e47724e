#include <cstdint>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
struct Shape {
  int data[10];
  __device__ int operator[](int i) const { return data[i]; }
};
#define FUNCTION static __device__ __forceinline__
#define SHARED __shared__
#define UNROLL _Pragma("unroll")
#define simd_barrier() __syncwarp()
#define group_barrier() __syncthreads()
#define thread_index_in_simdgroup (threadIdx.x % 32)
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif
FUNCTION float simd_sum(float x) {
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffff, x, i);
  return x;
}
FUNCTION float simd_max(float x) {
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, i));
  return x;
}
typedef float number;
enum { ROWS = 1, SIMDS = 4, SINKS = 4, WINDOW = 64, K_D = 80, K_J = 3, K_BITS = 8, K_PAGE_BYTES = 2656, V_D = 80, V_J = 3, V_BITS = 8, V_PAGE_BYTES = 2608 };
FUNCTION int least(int a, int b) { return a < b ? a : b; }
FUNCTION int largest(int a, int b) { return a > b ? a : b; }
FUNCTION float larger(float a, float b) { return a > b ? a : b; }
// exp(x - origin), and 0 where both are -inf.
FUNCTION float weight(float x, float origin) {
  return exp2((x - (origin == -INFINITY ? 0.0f : origin)) * 1.44269504f);
}

FUNCTION void butterfly(float* x, int size, int step, int lane) {
  for (int i = lane; i < size / 2; i += 32) {
    const int at = i / step * 2 * step + i % step;
    const float a = x[at];
    const float b = x[at + step];
    x[at] = a + b;
    x[at + step] = a - b;
  }
  simd_barrier();
}

FUNCTION float token_scale(const uint8_t* page, int token) {
  const int code = page[16 + token];
  const float base = *(const float*)page;
  return (code == 255 ? 0.0f : code == 254 ? NAN : exp2(float(code) * -0.03125f)) * base;
}

FUNCTION void load_16(const uint8_t* at, uint32_t* words) {
  const uint4 loaded = *(const uint4*)at;
  words[0] = loaded.x;
  words[1] = loaded.y;
  words[2] = loaded.z;
  words[3] = loaded.w;
}

// Adds to p[r] the products of the levels of a token with row r of q.
FUNCTION void k_products(const uint8_t* page, int token, const float* q,
                        const float* levels, float* p) {
  for (int b = 0; b < 80; b += 16) {
    uint32_t plane_8[1][4];
    load_16(page + 96 + token * 80 + b, plane_8[0]);
    UNROLL for (int f = 0; f < 1; f++) {
      UNROLL for (int i = 0; i < 4; i++) {
        const uint32_t codes = ((plane_8[f % 1][i] >> f / 1 * 8) & 0xffffffff) << 0;
        UNROLL for (int c = 0; c < 4; c++) {
          const float level = levels[codes >> 8 * c & 255];
          UNROLL for (int r = 0; r < ROWS; r++) p[r] += q[r * 80 + f * 80 + b + 4 * i + c] * level;
        }
      }
    }
  }
}

// Element lane + 32 * j of the page's centre, in its unit.
FUNCTION float k_centre(const uint8_t* page, int j, int lane) {
  return float(page[48 + ((lane + 32 * j) % 40)] >> ((lane + 32 * j) / 40) * 4 & 15) - 8.0f;
}
FUNCTION float k_unit(const uint8_t* page) { return ((const float*)page)[1]; }

// Code of element lane + 32 * j of a token; behind the last element it is any.
FUNCTION int v_code(const uint8_t* page, int token, int j, int lane) {
  return (page[48 + token * 80 + ((lane + 32 * j) % 80)] >> ((lane + 32 * j) / 80) * 8 & 255) << 0;
}

FUNCTION void k_mix(float* x, const float* table, int across, int along, int lane) {
  float mixed[3];
  UNROLL for (int j = 0; j < 3; j++) {
    const int e = lane + 32 * j;
    mixed[j] = 0.0f;
    if (e < 80) {
      for (int i = 0; i < 5; i++) mixed[j] += table[592 + e % 5 * across + i * along] * x[e - e % 5 + i];
    }
  }
  simd_barrier();
  UNROLL for (int j = 0; j < 3; j++) {
    if (lane + 32 * j < 80) x[lane + 32 * j] = mixed[j];
  }
  simd_barrier();
}

FUNCTION void k_signs(float* x, const float* table, int lane) {
  for (int e = lane; e < 80; e += 32) x[e] *= table[512 + e];
  simd_barrier();
}

FUNCTION void k_rotate(float* x, const float* table, int lane) {
  simd_barrier();
  k_signs(x, table, lane);
  k_mix(x, table, 5, 1, lane);
  butterfly(x, 80, 5, lane);
  butterfly(x, 80, 10, lane);
  butterfly(x, 80, 20, lane);
  butterfly(x, 80, 40, lane);
}

FUNCTION void v_mix(float* x, const float* table, int across, int along, int lane) {
  float mixed[3];
  UNROLL for (int j = 0; j < 3; j++) {
    const int e = lane + 32 * j;
    mixed[j] = 0.0f;
    if (e < 80) {
      for (int i = 0; i < 5; i++) mixed[j] += table[592 + e % 5 * across + i * along] * x[e - e % 5 + i];
    }
  }
  simd_barrier();
  UNROLL for (int j = 0; j < 3; j++) {
    if (lane + 32 * j < 80) x[lane + 32 * j] = mixed[j];
  }
  simd_barrier();
}

FUNCTION void v_signs(float* x, const float* table, int lane) {
  for (int e = lane; e < 80; e += 32) x[e] *= table[512 + e];
  simd_barrier();
}

FUNCTION void v_unrotate(float* x, const float* table, int lane) {
  simd_barrier();
  butterfly(x, 80, 5, lane);
  butterfly(x, 80, 10, lane);
  butterfly(x, 80, 20, lane);
  butterfly(x, 80, 40, lane);
  v_mix(x, table, 1, 5, lane);
  v_signs(x, table, lane);
}

// Adds the values of a page, whose tokens have weights[token][row].
FUNCTION void add_page(const uint8_t* page, const float* weights, const float* levels,
                       float* sums, int lane) {
  for (int t = 0; t < 32; t++) {
    UNROLL for (int j = 0; j < V_J; j++) {
      const float level = levels[v_code(page, t, j, lane)];
      UNROLL for (int r = 0; r < ROWS; r++) sums[r * V_J + j] += weights[t * ROWS + r] * level;
    }
  }
}
// One step of a simdgroup's softmax: scores become weights.
FUNCTION void softmax_step(float* scores, float* top, float* total, float* sums) {
  UNROLL for (int r = 0; r < ROWS; r++) {
    const float next = larger(simd_max(scores[r]), top[r]);
    const float before = weight(top[r], next);
    scores[r] = weight(scores[r], next);
    top[r] = next;
    total[r] = total[r] * before + scores[r];
    UNROLL for (int j = 0; j < V_J; j++) sums[r * V_J + j] *= before;
  }
}
FUNCTION void clear(float* top, float* total, float* sums) {
  UNROLL for (int r = 0; r < ROWS; r++) {
    top[r] = -INFINITY;
    total[r] = 0.0f;
    UNROLL for (int j = 0; j < V_J; j++) sums[r * V_J + j] = 0.0f;
  }
}
// Adds what the simdgroups have to all_sums[row][element], all_tops[row] and all_totals[row].
FUNCTION void join(const float* top, const float* total, const float* sums,
                   float* all_sums, float* all_tops, float* all_totals,
                   float* tops, float* totals, int simd, int lane) {
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

namespace mlx::core::cu {
__global__ void tqc_attend_d80_k8_v8_r1_added_whole(
    const float* query, const __grid_constant__ Shape query_shape, const uint8_t* k_pages, const __grid_constant__ Shape k_pages_shape, const float* k_dense, const __grid_constant__ Shape k_dense_shape, const int32_t* k_state, const uint8_t* v_pages, const __grid_constant__ Shape v_pages_shape, const float* v_dense, const __grid_constant__ Shape v_dense_shape, const int32_t* v_state, const int32_t* start, const float* key, const float* value, const bool* mask, const __grid_constant__ Shape mask_shape, const float* sinks, const float* k_table, const float* v_table, const float* factors, const int32_t* options, float* out, float* lse) {

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
  float* own_weights = weights + simd * 32 * ROWS;

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
  const number* k_rows = k_dense + int64_t(head_at) * k_dense_shape[2] * K_D;
  const number* v_rows = v_dense + int64_t(head_at) * v_dense_shape[2] * V_D;

  // Packed tokens.
  if (oldest / 32 + share * SIMDS < end_page) {
    clear(top, total, sums);
    for (int r = simd; r < ROWS; r += SIMDS) {
      float* row = q + r * K_D;
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
      const uint8_t* k_page = k_pages
          + (int64_t(head_at) * k_pages_shape[2] + page_at % k_pages_shape[2]) * K_PAGE_BYTES;
      const uint8_t* v_page = v_pages
          + (int64_t(head_at) * v_pages_shape[2] + page_at % v_pages_shape[2]) * V_PAGE_BYTES;
      const int token = page_at * 32 + lane;
      const bool inside = token < coded && token >= oldest;
      const int column = SINKS + token - begin;
      UNROLL for (int r = 0; r < ROWS; r++) scores[r] = 0.0f;
      k_products(k_page, lane, q, k_levels, scores);
      const float k_scale = token_scale(k_page, lane);
      UNROLL for (int r = 0; r < ROWS; r++) {
        const float stretched = scores[r] + 3.9684191e-05f * (scores[r] - norm[r]);
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
        if (inside) score += float(mask[mask_at[r] + column * mask_step]);
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
      float* row = all_sums + r * V_D;
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
    const number* new_keys = key + int64_t(head_at) * fresh * K_D;
    const number* new_values = value + int64_t(head_at) * fresh * V_D;
    int* own_place = place + simd * 32;
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
      const number* k_row = at < 0 ? new_keys + int64_t(fresh + at) * K_D : k_rows + at * K_D;
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
        if (inside) score += float(mask[mask_at[r] + column * mask_step]);
        if (!inside || column > last_seen[r]) score = -INFINITY;
        scores[r] = score;
      }
      softmax_step(scores, top, total, sums);
      UNROLL for (int r = 0; r < ROWS; r++) own_weights[lane * ROWS + r] = scores[r];
      simd_barrier();
      for (int t = 0; t < least(32, dense_count - x); t++) {
        const int at_t = own_place[t];
        const number* v_row = at_t < 0 ? new_values + int64_t(fresh + at_t) * V_D : v_rows + at_t * V_D;
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
        if (inside) score += float(mask[mask_at[r] + column * mask_step]);
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
}

// ----
#include <cstdint>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
struct Shape {
  int data[10];
  __device__ int operator[](int i) const { return data[i]; }
};
#define FUNCTION static __device__ __forceinline__
#define SHARED __shared__
#define UNROLL _Pragma("unroll")
#define simd_barrier() __syncwarp()
#define group_barrier() __syncthreads()
#define thread_index_in_simdgroup (threadIdx.x % 32)
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif
FUNCTION float simd_sum(float x) {
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffff, x, i);
  return x;
}
FUNCTION float simd_max(float x) {
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, i));
  return x;
}
typedef float number;
enum { D = 80, J = 3, SIMDS = 8, TOKENS = 32, SINKS = 4, WINDOW = 64, PAGE_BYTES = 2656 };
FUNCTION int least(int a, int b) { return a < b ? a : b; }
FUNCTION int largest(int a, int b) { return a > b ? a : b; }
FUNCTION float larger(float a, float b) { return a > b ? a : b; }
// exp(x - origin), and 0 where both are -inf.
FUNCTION float weight(float x, float origin) {
  return exp2((x - (origin == -INFINITY ? 0.0f : origin)) * 1.44269504f);
}

FUNCTION void butterfly(float* x, int size, int step, int lane) {
  for (int i = lane; i < size / 2; i += 32) {
    const int at = i / step * 2 * step + i % step;
    const float a = x[at];
    const float b = x[at + step];
    x[at] = a + b;
    x[at + step] = a - b;
  }
  simd_barrier();
}

FUNCTION float token_scale(const uint8_t* page, int token) {
  const int code = page[16 + token];
  const float base = *(const float*)page;
  return (code == 255 ? 0.0f : code == 254 ? NAN : exp2(float(code) * -0.03125f)) * base;
}

// Code of element lane + 32 * j of a token; behind the last element it is any.
FUNCTION int rows_code(const uint8_t* page, int token, int j, int lane) {
  return (page[96 + token * 80 + ((lane + 32 * j) % 80)] >> ((lane + 32 * j) / 80) * 8 & 255) << 0;
}

// Element lane + 32 * j of the page's centre, in its unit.
FUNCTION float rows_centre(const uint8_t* page, int j, int lane) {
  return float(page[48 + ((lane + 32 * j) % 40)] >> ((lane + 32 * j) / 40) * 4 & 15) - 8.0f;
}
FUNCTION float rows_unit(const uint8_t* page) { return ((const float*)page)[1]; }

FUNCTION void rows_mix(float* x, const float* table, int across, int along, int lane) {
  float mixed[3];
  UNROLL for (int j = 0; j < 3; j++) {
    const int e = lane + 32 * j;
    mixed[j] = 0.0f;
    if (e < 80) {
      for (int i = 0; i < 5; i++) mixed[j] += table[592 + e % 5 * across + i * along] * x[e - e % 5 + i];
    }
  }
  simd_barrier();
  UNROLL for (int j = 0; j < 3; j++) {
    if (lane + 32 * j < 80) x[lane + 32 * j] = mixed[j];
  }
  simd_barrier();
}

FUNCTION void rows_signs(float* x, const float* table, int lane) {
  for (int e = lane; e < 80; e += 32) x[e] *= table[512 + e];
  simd_barrier();
}

FUNCTION void rows_unrotate(float* x, const float* table, int lane) {
  simd_barrier();
  butterfly(x, 80, 5, lane);
  butterfly(x, 80, 10, lane);
  butterfly(x, 80, 20, lane);
  butterfly(x, 80, 40, lane);
  rows_mix(x, table, 1, 5, lane);
  rows_signs(x, table, lane);
}

namespace mlx::core::cu {
__global__ void tqc_read_d80_b8_centred(
    const uint8_t* pages, const __grid_constant__ Shape pages_shape, const float* dense, const __grid_constant__ Shape dense_shape, const int32_t* state, const float* table, const int32_t* span, float* out) {

  const int lane = thread_index_in_simdgroup;
  const int simd = simdgroup_index_in_threadgroup;
  const int head_at = threadgroup_position_in_grid.y;
  const int count = span[1];
  const int stored = int(state[0]);
  const int begin = int(state[2]);
  const int coded = least(int(state[1]), stored - SINKS);
  SHARED float work[SIMDS * D];
  float* x = work + simd * D;
  const number* rows = dense + int64_t(head_at) * dense_shape[2] * D;
  for (int k = simd; k < TOKENS; k += SIMDS) {
    const int row = int(threadgroup_position_in_grid.x) * TOKENS + k;
    const int token = begin + span[0] + row;
    const int u = token - SINKS;
    if (row < count) {
      number* target = out + (int64_t(head_at) * count + row) * D;
      if (token >= stored) {
        for (int e = lane; e < D; e += 32) target[e] = number(0.0f);
      } else {
        if (u >= 0 && u < coded) {
          const int page_at = u / 32 % pages_shape[2];
          const uint8_t* page = pages + (int64_t(head_at) * pages_shape[2] + page_at) * PAGE_BYTES;
          const float scale = token_scale(page, u % 32);
          for (int j = 0; j < J; j++) {
            const int e = lane + 32 * j;
            if (e < D) {
              float y = table[rows_code(page, u % 32, j, lane)] * scale;
              y += rows_centre(page, j, lane) * rows_unit(page) + float(rows[(SINKS + WINDOW) * D + e]);
              x[e] = y;
            }
          }
          rows_unrotate(x, table, lane);
          for (int e = lane; e < D; e += 32) {
            float y = x[e];
            y *= float(rows[(SINKS + WINDOW + 1) * D + e]);
            x[e] = float(number(y));
          }
        } else {
          const int at = u < 0 ? token : SINKS + u % WINDOW;
          for (int e = lane; e < D; e += 32) x[e] = float(rows[at * D + e]);
        }
        simd_barrier();
        for (int e = lane; e < D; e += 32) target[e] = number(x[e]);
        simd_barrier();
      }
    }
  }

}
}
