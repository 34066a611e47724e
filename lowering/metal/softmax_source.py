"""The softmax of a simdgroup, what adds up those of a threadgroup, and the kernel that joins shares."""

from __future__ import annotations

from functools import cache

from tqc.lowering.metal.language import Kernel

ATTEND_FUNCTIONS = """
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
"""

_MERGE = """
  const int lane = thread_index_in_simdgroup;
  const int at = threadgroup_position_in_grid.x;
  const int rows = parts_shape[2];
  const int shares = parts_shape[0];
  const int q_heads = parts_shape[3];
  const int q_head = at % q_heads;
  const int row = at / q_heads % rows;
  const int count = parts_shape[1] * rows * q_heads;
  const int lse_at = (at / q_heads / rows * q_heads + q_head) * rows + row;
  float top = -INFINITY;
  for (int s = 0; s < shares; s++) top = larger(logs[int64_t(s) * count + lse_at], top);
  float total = 0.0f;
  for (int s = 0; s < shares; s++) total += weight(logs[int64_t(s) * count + lse_at], top);
  for (int e = lane; e < D; e += 32) {
    float sum = 0.0f;
    for (int s = 0; s < shares; s++) {
      sum += parts[(int64_t(s) * count + at) * D + e] * weight(logs[int64_t(s) * count + lse_at], top);
    }
    out[int64_t(at) * D + e] = number(total > 0.0f ? sum / total : sum * total);
  }
  if (lane == 0) lse[lse_at] = total == 0.0f ? -INFINITY : top + log(total);
"""


@cache
def merge_kernel(head_dim: int, dtype: str) -> Kernel:
    """What joins shares: parts [shares, batch, rows, query_heads, head_dim] and logs [shares, batch, query_heads, rows]
    become what `attend_kernel` gives without `split`. Grid: a threadgroup for each query row."""
    return Kernel(
        name=f"tqc_merge_d{head_dim}",
        inputs=("parts", "logs"),
        outputs=("out", "lse"),
        dtype=dtype,
        constants=(("D", head_dim),),
        functions="",
        body=_MERGE,
        simdgroups=1,
    )
