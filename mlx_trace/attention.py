"""Attention to a packed cache with the semantics of `tqc.ops.attend`: by a kernel (`kernels.py`), or in ops of MLX.

Pages are never turned into dense tokens: the query is rotated, scores are products with levels, and what comes of the
values is rotated back. A long cache is read tile by tile, so that a call needs memory for one tile at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.mlx_trace import kernels
from tqc.mlx_trace.codec import decode_pages, levels_of, page_centres, rotate, token_scales, unrotate
from tqc.mlx_trace.packed import Packed
from tqc.mlx_trace.table import dense_attention

# About so many numbers of scores, or of levels, are in memory at once.
TILE_ELEMENTS = 1 << 22
# What stands for minus infinity in scores, so that a row which sees nothing of a tile stays finite.
LOWEST = -1e30


def attend(
    query: mx.array,
    keys: Packed,
    values: Packed,
    key: mx.array,
    value: mx.array,
    sinks: mx.array | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int | None = None,
) -> mx.array:
    """Causal attention to the stored tokens and the new ones behind them.

    Args:
        query: [batch, query_heads, n, head_dim].
        key, value: the new tokens, [batch, heads, n, head_dim].
        sinks: [query_heads], a logit that takes weight and gives no value.
        window: how many tokens back a query sees, its own one counted; None for all.

    Returns:
        [batch, query_heads, n, head_dim of the values] in the query's dtype.
    """
    heads, step = key.shape[1], keys.step
    if not step.begun and not step.padded:
        return _among_new(query, key, value, sinks, scale, softcap, window)
    if kernels.attends(query, heads):
        return kernels.attend(query, keys, values, key, value, sinks, scale, softcap, window)
    own = step.own(query.shape[2])
    fresh = mx.where(own >= step.numbers[:, :1], own, -1)  # padding in front has no position
    grouped = mx.unflatten(query.astype(mx.float32) * scale, 1, (heads, -1))  # [batch, heads, repeats, n, head_dim]

    def shown(position: mx.array) -> mx.array:
        """Which positions each query sees: [sequences, 1, 1, n, positions]."""
        held, row = position[:, None, None, None], own[:, None, None, :, None]
        seen = (held >= 0) & (held <= row)
        return seen if window is None else seen & (held > row - window)

    merged: Any = None
    parts = (_dense_part(grouped, keys, values, key, value, fresh), *_page_parts(grouped, keys, values))
    for scores, position, weigh in parts:
        if softcap:
            scores = softcap * mx.tanh(scores / softcap)
        scores = mx.where(shown(position), scores, LOWEST)
        largest = scores.max(-1, keepdims=True)
        weights = mx.exp(scores - largest)
        merged = _merge(merged, (largest, weights.sum(-1, keepdims=True), weigh(weights)))
    largest, total, out = merged
    if sinks is not None:
        sink = sinks.astype(mx.float32).reshape(1, heads, -1, 1, 1)
        largest, total, out = _merge(merged, (sink, mx.ones_like(sink), mx.zeros_like(out)))
    return (out / total).flatten(1, 2).astype(query.dtype)


def _merge(a: Any, b: Any) -> Any:
    """Two parts of a softmax as one: largest score, sum of weights, weighed values."""
    if a is None:
        return b
    largest = mx.maximum(a[0], b[0])
    left, right = mx.exp(a[0] - largest), mx.exp(b[0] - largest)
    return largest, a[1] * left + b[1] * right, a[2] * left + b[2] * right


def _among_new(query, key, value, sinks, scale, softcap, window):
    """Attention where nothing is stored: MLX's own."""
    count = query.shape[2]
    mask: Any = None
    if softcap or (window is not None and window < count):
        row = mx.arange(count)
        mask = row <= row[:, None]
        mask = mask if window is None else mask & (row > row[:, None] - window)
    return dense_attention(query, key, value, mask, sinks, scale, softcap, is_causal=mask is None)


def _dense_part(
    grouped: mx.array, keys: Packed, values: Packed, key: mx.array, value: mx.array, fresh: mx.array
) -> Any:
    """Sinks, the recent window and the new tokens."""
    rows = keys.fmt.token_rows
    k = mx.concatenate([keys.dense[:, :, :rows], key], axis=2).astype(mx.float32)
    v = mx.concatenate([values.dense[:, :, :rows], value], axis=2).astype(mx.float32)
    position = mx.concatenate([keys.step.position[:, :rows], fresh], axis=1)
    v = mx.where((position >= 0)[:, None, :, None], v, 0.0)  # whatever lies in a row without a token
    return _product(grouped, k.swapaxes(-1, -2)), position, lambda weights: _product(weights, v)


def _product(a: mx.array, b: mx.array) -> mx.array:
    """[batch, heads, repeats, n, x] with [batch, heads, x, y]."""
    return mx.unflatten(a.flatten(2, 3) @ b, 2, a.shape[2:4])


def _page_parts(grouped: mx.array, keys: Packed, values: Packed) -> Iterator[Any]:
    """The packed tokens, tile by tile."""
    batch, heads, repeats, count, head_dim = grouped.shape
    rotated = _rotated(grouped, keys)
    size = batch * heads * max(repeats * count, head_dim) * PAGE_TOKENS
    tile = max(1, TILE_ELEMENTS // size)
    start = keys.fmt.token_rows
    for page in range(0, keys.num_pages, tile):
        k, v = (cache.pages[:, :, page : page + tile] for cache in (keys, values))
        stop = start + k.shape[2] * PAGE_TOKENS
        position = keys.step.position[:, start:stop]
        scores = _scores(rotated, k, keys)
        yield scores, position, lambda weights, v=v, held=position >= 0: _weighed(weights, v, held, values)
        start = stop


def _rotated(grouped: mx.array, keys: Packed) -> mx.array:
    """The query in the basis of the codes."""
    if keys.fmt.centred:
        grouped = grouped * mx.expand_dims(keys.head[:, :, 1:], 2).astype(mx.float32)
    return rotate(grouped, keys.fmt)


def _scores(rotated: mx.array, pages: mx.array, keys: Packed) -> mx.array:
    """Scores of packed tokens, corrected for their coding error (see `tqc.ops.planes.correction`)."""
    fmt = keys.fmt
    product = _product(rotated, levels_of(pages, fmt).flatten(2, 3).swapaxes(-1, -2))
    norm = mx.sqrt(mx.square(rotated).sum(-1, keepdims=True))
    product = mx.maximum(product, product + fmt.score_stretch * (product - norm))
    scores = product * token_scales(pages, fmt).flatten(2)[:, :, None, None]
    if fmt.centred:
        of_page = _product(rotated, page_centres(pages, fmt).swapaxes(-1, -2))
        of_head = (rotated * mx.expand_dims(keys.head[:, :, :1], 2).astype(mx.float32)).sum(-1, keepdims=True)
        scores = scores + mx.repeat(of_page + of_head, PAGE_TOKENS, axis=-1)
    return scores


def _weighed(weights: mx.array, pages: mx.array, held: mx.array, values: Packed) -> mx.array:
    fmt: PackedFormat = values.fmt
    y = mx.where(held[:, None, :, None], decode_pages(pages, values.head, fmt), 0.0)
    made = unrotate(_product(weights, y), fmt)
    return made * mx.expand_dims(values.head[:, :, 1:], 2).astype(mx.float32) if fmt.centred else made
