"""Pieces of attention on one tile: products, rotations, scores, the running softmax.

Scores are kept in units of log2 once they are final. `m`, `total` and `acc` are the running maximum, sum of weights and
weighted sum of values of each query row, all float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tqc.lowering.triton.decode import INTERPRET, column_element
from tqc.lowering.triton.placement import head_balance

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b):
    """a @ b in float32, from operands of one dtype; float32 operands lose nothing that matters (3 TF32 products)."""
    if INTERPRET:  # its product of bfloat16 numbers is wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        return tl.dot(a, b)


@triton.jit
def dot_by_parts(a, b, PARTS: tl.constexpr):
    """`dot`, the inner dimension being spread over warps: each then holds a part alone of either operand."""
    if PARTS == 1:
        return dot(a, b)
    else:
        INNER: tl.constexpr = a.shape[1] // PARTS
        a_parts = a.reshape(a.shape[0], PARTS, INNER).permute(1, 0, 2)
        return tl.sum(dot(a_parts, b.reshape(PARTS, INNER, b.shape[1])), axis=0)


@triton.jit
def opaque(x):
    """`x`, float16, itself. A product takes its operands in an order that suits how they were computed; where that
    costs more than it saves, this hides it (as an effect, which the search for it stops at)."""
    if INTERPRET:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float16, is_pure=False, pack=2)


@triton.jit
def normalized(x, EXACT: tl.constexpr):
    """`x` [n, rows] over the largest magnitude of each row, as float16, and that magnitude; untouched with EXACT."""
    if EXACT:
        return x, tl.full((x.shape[1],), 1.0, tl.float32)
    else:
        peak = tl.max(tl.abs(x), axis=0)
        return (x / tl.where(peak > 0, peak, 1.0)[None, :]).to(tl.float16), peak


@triton.jit
def _query_part(address, valid, dense, element, fmt: tl.constexpr):
    """Elements [n] of queries, balanced, float32 [n, rows]; arguments as of `rotated`."""
    mask = valid[None, :] & (element < fmt.head_dim)[:, None]
    part = tl.load(address[None, :] + element[:, None], mask=mask, other=0).to(tl.float32)
    if fmt.centred:
        part *= head_balance(dense, element, fmt)[:, None]
    return part


@triton.jit
def rotated(address, valid, rotation, dense, fmt: tl.constexpr, EXACT: tl.constexpr):
    """R q for rows of queries, in the column order of a tile; for centred formats q is times the head's balance.

    Args:
        address: pointers to the first element of each row, [rows].
        valid: which rows there are.
        rotation: pointer to sqrt(head_dim) R, [head_dim, head_dim], in float16 (float32 with EXACT).
        dense: as `head_balance` takes it.

    Returns:
        R q / factor [columns, rows] in the dtype of `rotation`, factor [rows], and |q|**2 [rows].
    """
    CHUNK: tl.constexpr = 32
    COLUMNS: tl.constexpr = fmt.columns
    element, exists = column_element(fmt)
    peak = tl.zeros((address.shape[0],), tl.float32)
    if EXACT:
        peak += 1.0
    else:
        for start in range(0, fmt.head_dim, CHUNK):
            part = _query_part(address, valid, dense, start + tl.arange(0, CHUNK), fmt)
            peak = tl.maximum(peak, tl.max(tl.abs(part), axis=0))
        peak = tl.where(peak > 0, peak, 1.0)
    product = tl.zeros((COLUMNS, address.shape[0]), tl.float32)
    energy = tl.zeros((address.shape[0],), tl.float32)
    for start in range(0, fmt.head_dim, CHUNK):
        d = start + tl.arange(0, CHUNK)
        inside = d < fmt.head_dim
        part = _query_part(address, valid, dense, d, fmt)
        energy += tl.sum(part * part, axis=0)
        matrix = tl.load(
            rotation + element[:, None] * fmt.head_dim + d[None, :], mask=exists[:, None] & inside[None, :], other=0
        )
        product += dot(matrix, (part / peak[None, :]).to(matrix.dtype))
    result, factor = normalized(product, EXACT)
    return result, factor * peak * (fmt.head_dim**-0.5), energy


@triton.jit
def _halved(x):
    """The upper and the lower half of the rows of `x`."""
    return tl.split(x.reshape(2, x.shape[0] // 2, x.shape[1]).permute(1, 2, 0))


@triton.jit
def _rotated_back(x, first: tl.constexpr, rotation, fmt: tl.constexpr, WIDTH: tl.constexpr):
    """R' x without the factor of `rotation`, x being columns `first` and on, by pieces that registers hold."""
    COLUMNS: tl.constexpr = x.shape[0]
    if COLUMNS * WIDTH > 8192:
        upper, lower = _halved(x)
        result = _rotated_back(upper, first, rotation, fmt, WIDTH)
        return result + _rotated_back(lower, first + COLUMNS // 2, rotation, fmt, WIDTH)
    else:
        STRIDE: tl.constexpr = 4 * fmt.row_words
        column = first + tl.arange(0, COLUMNS)
        d = tl.arange(0, WIDTH)
        element = column // STRIDE * fmt.row_bytes + column % STRIDE
        exists = column % STRIDE < fmt.row_bytes
        matrix = tl.load(
            rotation + element[:, None] * fmt.head_dim + d[None, :],
            mask=exists[:, None] & (d < fmt.head_dim)[None, :],
            other=0,
        )
        return dot(matrix.T, x)


@triton.jit
def unrotated(acc, rotation, fmt: tl.constexpr, WIDTH: tl.constexpr, EXACT: tl.constexpr):
    """R' y for rows y in the column order of a tile, [columns, rows]: float32 [WIDTH, rows] in the natural order."""
    x, factor = normalized(acc, EXACT)
    return _rotated_back(x, 0, rotation, fmt, WIDTH) * (factor * (fmt.head_dim**-0.5))[None, :]


@triton.jit
def capped(scores, softcap: tl.constexpr):
    """softcap * tanh(scores / softcap), scores in units of log2; `scores` where `softcap` is 0."""
    if softcap != 0.0:
        scores = (softcap * LOG2E) * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 / softcap))))
    return scores


@triton.jit
def visible(scores, column, inside, sight, CAUSAL: tl.constexpr):
    """Scores with the mask's added, -inf where a row does not see a column.

    Args:
        scores: in units of log2, [n, rows].
        column: of each score, int64 [n]; inside: whether any row sees it, [n].
        sight: (which rows there are [rows], pointers to each row's first column of the mask (uint8 for a bool one)
            [rows] or None, the mask's stride along columns, column of the first new token, last new token that each
            row sees if CAUSAL [rows]).
    """
    row_valid, mask, step, first, last = sight
    valid = inside[:, None]
    if CAUSAL:
        valid = valid & ((column - first).to(tl.int32)[:, None] <= last[None, :])
    if mask is not None:
        loaded = tl.load(mask[None, :] + column[:, None] * step, mask=row_valid[None, :] & valid, other=0)
        if loaded.dtype == tl.uint8:
            valid = valid & (loaded != 0)
        else:
            scores += loaded.to(tl.float32) * LOG2E
    return tl.where(valid, scores, float("-inf"))


@triton.jit
def softmax_step(scores, m):
    """Weights of a tile, the factor of what was summed before, and the new maximum."""
    top = tl.maximum(m, tl.max(scores, axis=0))
    origin = tl.where(top == float("-inf"), 0.0, top)
    return tl.exp2(scores - origin[None, :]), tl.exp2(m - origin), top


@triton.jit
def softmax_add(scores, m, total, acc):
    """Weights of a tile, and `m`, `total` and `acc` with it, the last without its values yet."""
    weights, before, m = softmax_step(scores, m)
    return weights, m, total * before + tl.sum(weights, axis=0), acc * before[None, :]
