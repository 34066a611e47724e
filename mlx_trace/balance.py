"""The balance of keys in ops of MLX: the same as `tqc.format.balance`, which says why."""

from __future__ import annotations

import math

import mlx.core as mx

from tqc.format.balance import (
    LARGEST,
    LEAST_OF_KEYS,
    LEAST_OF_QUERIES,
    MOST_SCORES,
    SAMPLED_KEYS,
    SAMPLED_QUERIES,
    STANDARD_ERRORS,
    TINY,
)


def balance(keys: mx.array, query: mx.array) -> mx.array:
    """Balance of the channels of each head, [batch, heads, head_dim] in keys' dtype.

    Args:
        keys: [batch, heads, n, head_dim], the tokens that are packed first.
        query: [batch, query_heads, rows, head_dim], queries of the same call.
    """
    heads = keys.shape[1]
    k, key_good, key_peak = _usable(_spread(keys, SAMPLED_KEYS))
    most = MOST_SCORES // max(1, query.shape[0] * query.shape[1] * k.shape[2])
    spread = _spread(query, min(SAMPLED_QUERIES, max(1, most)))
    q, query_good, query_peak = _usable(mx.unflatten(spread, 1, (heads, -1)).flatten(2, 3))
    k = (k - k.sum(2, keepdims=True) / mx.maximum(key_good.sum(2, keepdims=True), 1.0)) * key_good
    factor = keys.shape[-1] ** -0.5 * query_peak * key_peak
    key_row = key_good.swapaxes(-1, -2)
    scores = mx.where(key_row > 0, (q @ k.swapaxes(-1, -2)) * mx.minimum(factor, 1e30), -1e35)
    weights = mx.softmax(scores, axis=-1)
    pairs = query_good * key_row
    mass = _share(weights * (1 - weights) * pairs) + _share(pairs)
    key_square, key_variance = _moments(k, mass.sum(2), LEAST_OF_KEYS)
    query_square, query_variance = _moments(q, mass.sum(3), LEAST_OF_QUERIES)
    log_s = mx.log(key_square / query_square) / 4
    log_s = log_s - _median(log_s)
    error = STANDARD_ERRORS * mx.sqrt(key_variance + query_variance) / 4
    return mx.exp(mx.sign(log_s) * mx.clip(mx.abs(log_s) - error, 0.0, math.log(LARGEST))).astype(keys.dtype)


def _spread(x: mx.array, count: int) -> mx.array:
    return x[:, :, :: max(1, x.shape[2] // count)]


def _share(x: mx.array) -> mx.array:
    return x / mx.maximum(x.sum((2, 3), keepdims=True), TINY)


def _usable(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Rows over the largest number of their head, zeros where ignored; 1.0 for those that are not; that number."""
    x = x.astype(mx.float32)
    good = mx.isfinite(x).all(-1, keepdims=True) & (x != 0).any(-1, keepdims=True)
    x = mx.where(good, x, 0.0)
    peak = mx.maximum(mx.abs(x).max((2, 3), keepdims=True), mx.finfo(mx.float32).smallest_normal)
    return x / peak, good.astype(mx.float32), peak


def _median(x: mx.array) -> mx.array:
    """The lower median of the last axis, as torch's."""
    return mx.sort(x, axis=-1)[..., (x.shape[-1] - 1) // 2 :][..., :1]


def _moments(x: mx.array, mass: mx.array, least: float) -> tuple[mx.array, mx.array]:
    square = (mx.expand_dims(mass, -1) * mx.square(x)).sum(2)
    middle = _median(square)
    known = middle > TINY
    square = mx.where(known, mx.maximum(square, least * middle), 1.0)
    rows = mx.square(mass.sum(-1, keepdims=True)) / mx.maximum(mx.square(mass).sum(-1, keepdims=True), TINY)
    return square, mx.where(known, _trigamma(mx.maximum(rows, 1e-6) / 2), mx.inf)


def _trigamma(x: mx.array) -> mx.array:
    """By recurrence up to where its asymptotic series is exact to float32."""
    made = mx.zeros_like(x)
    for _ in range(6):
        made = made + 1 / mx.square(x)
        x = x + 1
    inverse = 1 / x
    square = mx.square(inverse)
    series = inverse * (1 + square * (1 / 6 - square * (1 / 30 - square / 42)))
    return made + series + square / 2
