"""Attention over pages, dense rows and new tokens: what a threadgroup does, and what joins shares.

A threadgroup takes ROWS query rows of one key/value head (rows of all its query heads, so that a page is decoded once
for the group) and one share of the tokens, dealt out to its simdgroups page by page. For products with keys a lane is a
token and needs nothing of the others; for the sum of values it is every 32nd element. Each simdgroup has a softmax of
its own; `join` adds them up, once in the rotated basis, and once behind the dense tokens, which no page holds.
"""

from __future__ import annotations

from functools import cache
from string import Template

from tqc.format import PackedFormat
from tqc.lowering.metal import format_functions as of
from tqc.lowering.metal.language import Kernel
from tqc.lowering.metal.softmax_source import ATTEND_FUNCTIONS

SIMDGROUPS = 4
# Numbers of the sum of values that a lane holds.
_MOST_HELD = 32
MOST_ROWS = 8

_BODY = Template("""
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
$mask_steps  if (thread_at < ROWS) {
    const int row = least(first_row + thread_at, rows * group - 1);
    const int i = row / group;
    const int q_head = head_at % heads * group + row % group;
    q_at[thread_at] = ((int64_t(batch_at) * q_heads + q_head) * rows + i) * K_D;
    last_seen[thread_at] = causal ? first_column + i + fresh - rows : 0x7fffffff;
    all_tops[thread_at] = -INFINITY;
    all_totals[thread_at] = 0.0f;
$mask_row  }
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
$balance        row[e] = x;
        square += x * x;
      }
      square = simd_sum(square);
      if (lane == 0) norm[r] = sqrt(square);
$rotate      float product = 0.0f;
$bias      product = simd_sum(product);
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
        const float stretched = scores[r] + ${STRETCH}f * (scores[r] - norm[r]);
        scores[r] = (scores[r] < stretched ? stretched : scores[r]) * k_scale + bias[r];
      }
$k_centre      UNROLL for (int r = 0; r < ROWS; r++) {
        float score = scores[r];
$finish        scores[r] = score;
      }
      softmax_step(scores, top, total, sums);
      const float v_scale = inside ? token_scale(v_page, lane) : 0.0f;
      UNROLL for (int r = 0; r < ROWS; r++) own_weights[lane * ROWS + r] = scores[r] * v_scale;
      simd_barrier();
      add_page(v_page, own_weights, v_levels, sums, lane);
      simd_barrier();
$v_centre    }
    join(top, total, sums, all_sums, all_tops, all_totals, tops, totals, simd, lane);
    for (int r = simd; r < ROWS; r += SIMDS) {
      threadgroup float* row = all_sums + r * V_D;
$v_head_centre$unrotate$v_balance    }
    group_barrier();
  }

  // Tokens that no page holds: sinks, the ring, new ones; and columns that stand for keys and values of zeros.
  const int dense_count = held_sinks + held_recent + fresh;
  const int last_share = shares - 1 - share;
  const int zero_first[2] = {stored - begin, first_column + fresh};
  const int zero_end[2] = {first_column, largest($columns, first_column + fresh)};
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
$finish        scores[r] = score;
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
$finish          scores[r] = score;
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
      out[(target + q_head) * V_D + i % V_D] = $result(all_sums[i] * factor);
      if (i % V_D == 0) {
        const int64_t target = (int64_t(share) * query_shape[0] + batch_at) * q_heads + q_head;
        lse[target * rows + row / group] = whole == 0.0f ? -INFINITY : highest + log(whole);
      }
    }
  }
""")

_FINISH = """\
        if (softcap != 0.0f) score = softcap * tanh(score / softcap);
{mask}        if (!inside || column > last_seen[r]) score = -INFINITY;
"""
_MASKS = {
    "none": "",
    "bool": "        if (inside && !mask[mask_at[r] + column * mask_step]) score = -INFINITY;\n",
    "added": "        if (inside) score += float(mask[mask_at[r] + column * mask_step]);\n",
}
_MASK_STEPS = """\
  SHARED int64_t mask_at[ROWS];
  const int mask_columns = mask_shape[3];
  const int mask_step = mask_columns > 1 ? 1 : 0;
"""
_MASK_ROW = """\
    const int mask_batch = mask_shape[0] > 1 ? batch_at : 0;
    const int mask_head = mask_shape[1] > 1 ? q_head : 0;
    const int mask_row = mask_shape[2] > 1 ? i : 0;
    mask_at[thread_at]
        = ((int64_t(mask_batch) * mask_shape[1] + mask_head) * mask_shape[2] + mask_row) * mask_columns;
"""
_K_CENTRED = {
    "balance": "        x *= float(k_rows[(SINKS + WINDOW + 1) * K_D + e]);\n",
    "bias": """\
      for (int e = lane; e < K_D; e += 32) product += row[e] * float(k_rows[(SINKS + WINDOW) * K_D + e]);
""",
    "k_centre": """\
      UNROLL for (int r = 0; r < ROWS; r++) {
        float product = 0.0f;
        UNROLL for (int j = 0; j < K_J; j++) {
          if (lane + 32 * j < K_D) product += q[r * K_D + lane + 32 * j] * k_centre(k_page, j, lane);
        }
        scores[r] += simd_sum(product) * k_unit(k_page);
      }
""",
}
_V_CENTRED = {
    "v_centre": """\
      UNROLL for (int r = 0; r < ROWS; r++) {
        const float part = simd_sum(scores[r]) * v_unit(v_page);
        UNROLL for (int j = 0; j < V_J; j++) sums[r * V_J + j] += part * v_centre(v_page, j, lane);
      }
""",
    "v_head_centre": """\
      for (int e = lane; e < V_D; e += 32) row[e] += all_totals[r] * float(v_rows[(SINKS + WINDOW) * V_D + e]);
""",
    "v_balance": """\
      for (int e = lane; e < V_D; e += 32) row[e] *= float(v_rows[(SINKS + WINDOW + 1) * V_D + e]);
""",
}


def rows_at_once(wanted: int, head_dim: int) -> int:
    """How many of `wanted` query rows one threadgroup takes: a power of two, such that registers hold its sums and
    threadgroup memory its vectors, of the longer of keys and values."""
    most = max(1, min(MOST_ROWS, _MOST_HELD // -(-head_dim // 32)))
    return min(most, 1 << max(0, wanted - 1).bit_length())


@cache
def attend_kernel(k: PackedFormat, v: PackedFormat, dtype: str, rows: int, mask: str, split: bool) -> Kernel:
    """Attention of one share of the tokens; see `tqc.ops.planes.attend`.

    Args:
        rows: how many query rows a threadgroup takes, of `rows_at_once`.
        mask: "none", "bool" or "added".
        split: whether there are several shares: then `out` is float32 and has them as its first axis, as has `lse`.

    Grid, in threadgroups: (blocks of rows, batch * heads, shares). `options`, int32 [3]: how many new tokens there are,
    whether causal, whether `start` counts. `factors`, float32 [2]: scale, softcap.
    """
    parts = dict.fromkeys(("balance", "bias", "k_centre", "v_centre", "v_head_centre", "v_balance"), "")
    parts |= {**(_K_CENTRED if k.centred else {}), **(_V_CENTRED if v.centred else {})}
    parts["rotate"] = "" if k.folded else "      k_rotate(row, k_table, lane);\n"
    parts["unrotate"] = "" if v.folded else "      v_unrotate(row, v_table, lane);\n"
    masked = mask != "none"
    parts |= {"mask_steps": _MASK_STEPS if masked else "", "mask_row": _MASK_ROW if masked else ""}
    parts |= {"columns": "mask_columns" if masked else "0", "finish": _FINISH.format(mask=_MASKS[mask])}
    functions = [
        *(of.BUTTERFLY, of.TOKEN_SCALE, of.products("k", k), of.page_centre("k", k)),
        *(of.codes("v", v), of.page_centre("v", v)),
        *(() if k.folded else (of.rotation("k", k),)),
        *(() if v.folded else (of.rotation("v", v, back=True),)),
    ]
    inputs = (
        *("query", "k_pages", "k_dense", "k_state", "v_pages", "v_dense", "v_state", "start", "key", "value"),
        *(("mask",) if masked else ()),
        *("sinks", "k_table", "v_table", "factors", "options"),
    )
    return Kernel(
        name=f"tqc_attend_d{k.head_dim}_k{k.bits}_v{v.bits}_r{rows}_{mask}_{'share' if split else 'whole'}",
        inputs=inputs,
        outputs=("out", "lse"),
        dtype=dtype,
        constants=(
            *(("ROWS", rows), ("SIMDS", SIMDGROUPS), ("SINKS", k.sink_tokens), ("WINDOW", k.residual_window)),
            *(("K_D", k.head_dim), ("K_J", -(-k.head_dim // 32)), ("K_BITS", k.bits), ("K_PAGE_BYTES", k.page_bytes)),
            *(("V_D", v.head_dim), ("V_J", -(-v.head_dim // 32)), ("V_BITS", v.bits), ("V_PAGE_BYTES", v.page_bytes)),
        ),
        functions="".join(functions) + ATTEND_FUNCTIONS,
        body=_BODY.substitute(parts, STRETCH=f"{k.score_stretch:.8g}", result="float" if split else "number"),
        simdgroups=SIMDGROUPS,
    )
