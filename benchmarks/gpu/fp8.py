"""The baseline with 8 bits an element: decode attention over a dense FP8 (e4m3) cache, as serving engines do it.

Split KV with a log-sum-exp merge, one program per key/value head with its query heads as rows of the matrix product,
one scale for all keys and one for all values. `configurations` are tried by the benchmark and the fastest one counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# (tokens in a tile, num_warps, num_stages, programs per multiprocessor)
configurations = tuple(
    (tile, warps, stages, programs)
    for tile, warps, stages in ((64, 4, 2), (64, 4, 3), (128, 4, 2), (128, 4, 3), (128, 8, 3))
    for programs in (2, 4)
)


def quantize(x: Tensor) -> tuple[Tensor, float]:
    """`x` in float8_e4m3fn and the scale that it was divided by."""
    scale = x.abs().max().item() / torch.finfo(torch.float8_e4m3fn).max
    return (x / scale).to(torch.float8_e4m3fn), scale


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k_scale: float,
    v_scale: float,
    scale: float,
    configuration: tuple[int, int, int, int] = (128, 4, 3, 2),
    multiprocessors: int = 132,
) -> Tensor:
    """Attention of one query a sequence, [batch, query_heads, 1, d], to FP8 keys and values [batch, heads, n, d]."""
    batch, query_heads, _, dim = query.shape
    heads, length = keys.shape[1:3]
    tile, warps, stages, programs = configuration
    group = query_heads // heads
    tiles = triton.cdiv(length, tile)
    wanted = max(1, programs * multiprocessors // (batch * heads))
    tiles_each = triton.cdiv(tiles, min(tiles, wanted))
    splits = triton.cdiv(tiles, tiles_each)
    partial = query.new_empty(batch * heads, splits, group, dim, dtype=torch.float32)
    lse = query.new_empty(batch * heads, splits, group, dtype=torch.float32)
    out = torch.empty_like(query)
    _split[(batch * heads, splits)](
        query, keys, values, partial, lse, k_scale * scale * 1.4426950408889634, v_scale, length, splits,
        tiles_each, group, max(16, triton.next_power_of_2(group)), dim, triton.next_power_of_2(dim), tile,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _merge[(batch * heads * group,)](
        partial, lse, out, splits, group, triton.next_power_of_2(splits), dim, triton.next_power_of_2(dim)
    )
    return out


@triton.jit
def _split(
    query,
    keys,
    values,
    partial,
    lse,
    k_scale,
    v_scale,
    length,
    splits,
    tiles_each,
    group: tl.constexpr,
    ROWS: tl.constexpr,
    dim: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row, column = tl.arange(0, ROWS), tl.arange(0, D)
    inside = (row < group)[:, None] & (column < dim)[None, :]
    q = tl.load(query + (head * group + row[:, None]) * dim + column[None, :], mask=inside, other=0.0)
    best = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, D], tl.float32)
    for tile in range(split * tiles_each, tl.minimum((split + 1) * tiles_each, tl.cdiv(length, TILE))):
        token = tile * TILE + tl.arange(0, TILE)
        at = head * length * dim + token[:, None] * dim + column[None, :]
        stored = (token < length)[:, None] & (column < dim)[None, :]
        k = tl.load(keys + at, mask=stored, other=0.0).to(q.dtype)
        scores = tl.dot(q, k.T) * k_scale
        scores = tl.where((token < length)[None, :], scores, -1e30)
        top = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp2(scores - top[:, None])
        fade = tl.exp2(best - top)
        total = total * fade + tl.sum(weights, axis=1)
        v = tl.load(values + at, mask=stored, other=0.0).to(q.dtype)
        out = tl.dot(weights.to(q.dtype), v, out * fade[:, None])
        best = top
    at = (head * splits + split) * group + row
    tl.store(partial + at[:, None] * dim + column[None, :], out * v_scale / total[:, None], mask=inside)
    tl.store(lse + at, best + tl.log2(total), mask=row < group)


@triton.jit
def _merge(partial, lse, out, splits, group: tl.constexpr, SPLITS: tl.constexpr, dim: tl.constexpr, D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column, split = tl.arange(0, D), tl.arange(0, SPLITS)
    at = (row // group * splits + split) * group + row % group
    logs = tl.load(lse + at, mask=split < splits, other=-1e30)
    weights = tl.exp2(logs - tl.max(logs, axis=0))
    inside = (split < splits)[:, None] & (column < dim)[None, :]
    parts = tl.load(partial + at[:, None] * dim + column[None, :], mask=inside, other=0.0)
    result = tl.sum(parts * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out + row * dim + column, result.to(out.dtype.element_ty), mask=column < dim)
