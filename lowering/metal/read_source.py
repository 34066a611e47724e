"""Reading stored tokens back: a simdgroup takes one token at a time."""

from __future__ import annotations

from functools import cache
from string import Template

from tqc.format import PackedFormat
from tqc.lowering.metal import format_functions as of
from tqc.lowering.metal.language import Kernel

TOKENS = 32

_BODY = Template("""
  const int lane = thread_index_in_simdgroup;
  const int simd = simdgroup_index_in_threadgroup;
  const int head_at = threadgroup_position_in_grid.y;
  const int count = span[1];
  const int stored = int(state[0]);
  const int begin = int(state[2]);
  const int coded = least(int(state[1]), stored - SINKS);
  SHARED float work[SIMDS * D];
  threadgroup float* x = work + simd * D;
  device const number* rows = dense + int64_t(head_at) * dense_shape[2] * D;
  for (int k = simd; k < TOKENS; k += SIMDS) {
    const int row = int(threadgroup_position_in_grid.x) * TOKENS + k;
    const int token = begin + span[0] + row;
    const int u = token - SINKS;
    if (row < count) {
      device number* target = out + (int64_t(head_at) * count + row) * D;
      if (token >= stored) {
        for (int e = lane; e < D; e += 32) target[e] = number(0.0f);
      } else {
        if (u >= 0 && u < coded) {
          const int page_at = u / 32 % pages_shape[2];
          device const uint8_t* page = pages + (int64_t(head_at) * pages_shape[2] + page_at) * PAGE_BYTES;
          const float scale = token_scale(page, u % 32);
          for (int j = 0; j < J; j++) {
            const int e = lane + 32 * j;
            if (e < D) {
              float y = table[rows_code(page, u % 32, j, lane)] * scale;
$centre              x[e] = y;
            }
          }
$unrotate          for (int e = lane; e < D; e += 32) {
            float y = x[e];
$balance            x[e] = float(number(y));
          }
        } else {
          const int at = u < 0 ? token : SINKS + u % WINDOW;
          for (int e = lane; e < D; e += 32) x[e] = float(rows[at * D + e]);
        }
$unfold        simd_barrier();
        for (int e = lane; e < D; e += 32) target[e] = number(x[e]);
        simd_barrier();
      }
    }
  }
""")

_CENTRE = """\
              y += rows_centre(page, j, lane) * rows_unit(page) + float(rows[(SINKS + WINDOW) * D + e]);
"""
_BALANCE = "            y *= float(rows[(SINKS + WINDOW + 1) * D + e]);\n"


@cache
def read_kernel(fmt: PackedFormat, dtype: str) -> Kernel:
    """Tokens span[0] to span[0] + span[1] of those held, [batch, heads, span[1], head_dim]; zeros behind the last one;
    see `tqc.ops.planes.read`. Grid, in threadgroups: (parts of 32 tokens, batch * heads). `span`: int32 [2]."""
    rotated = "rows_unrotate(x, table, lane);\n"
    body = _BODY.substitute(
        centre=_CENTRE if fmt.centred else "",
        balance=_BALANCE if fmt.centred else "",
        unrotate="" if fmt.folded else f"          {rotated}",
        unfold=f"        {rotated}" if fmt.folded else "",
    )
    parts = [of.BUTTERFLY, of.TOKEN_SCALE, of.codes("rows", fmt), of.page_centre("rows", fmt)]
    parts.append(of.rotation("rows", fmt, back=True))
    simdgroups = 8 if fmt.head_dim <= 512 else 4
    constants = {
        **{"D": fmt.head_dim, "J": -(-fmt.head_dim // 32), "SIMDS": simdgroups, "TOKENS": TOKENS},
        **{"SINKS": fmt.sink_tokens, "WINDOW": fmt.residual_window, "PAGE_BYTES": fmt.page_bytes},
    }
    kind = f"{'centred' if fmt.centred else 'plain'}{'_folded' if fmt.folded else ''}"
    return Kernel(
        name=f"tqc_read_d{fmt.head_dim}_b{fmt.bits}_{kind}",
        inputs=("pages", "dense", "state", "table", "span"),
        outputs=("out",),
        dtype=dtype,
        constants=tuple(constants.items()),
        functions="".join(parts),
        body=body,
        simdgroups=simdgroups,
    )
