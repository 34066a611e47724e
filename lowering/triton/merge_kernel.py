"""What joins the shares that `attend_kernel` splits the tokens of a cache into."""

from __future__ import annotations

import triton
import triton.language as tl

from tqc.lowering.triton.tile import LOG2E


@triton.jit
def merge_kernel(
    parts, part_lse, out, lse, q_heads, rows, batch, HEAD_DIM: tl.constexpr, SHARES: tl.constexpr, WIDTH: tl.constexpr
):
    """Join the shares of one query row: parts float32 [SHARES, batch, rows, q_heads, HEAD_DIM], part_lse in log2
    [SHARES, batch, q_heads, rows]; out and lse as in `attend_kernel` with one share. Grid: batch * rows * q_heads."""
    at = tl.program_id(0).to(tl.int64)
    head = at % q_heads
    row = at // q_heads % rows
    b = at // q_heads // rows
    lse_at = (b * q_heads + head) * rows + row
    share = tl.arange(0, WIDTH)
    count = (batch * rows * q_heads).to(tl.int64)
    logs = tl.load(part_lse + share * count + lse_at, mask=share < SHARES, other=float("-inf"))
    d = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    top = tl.max(logs, axis=0)
    weights = tl.exp2(logs - tl.where(top == float("-inf"), 0.0, top))
    address = parts + (share[:, None] * count + at) * HEAD_DIM + d[None, :]
    values = tl.load(address, mask=(share < SHARES)[:, None] & (d < HEAD_DIM)[None, :], other=0)
    total = tl.sum(weights, axis=0)
    result = tl.sum(values * weights[:, None], axis=0) / tl.where(total == 0, 1.0, total)
    tl.store(out + at * HEAD_DIM + d, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)
    tl.store(lse + lse_at, tl.where(total == 0, float("-inf"), (top + tl.log2(total)) / LOG2E))
