"""The balance of keys in ONNX, as `tqc.format.balance` computes it."""

from __future__ import annotations

import math

import numpy as np

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
from tqc.lowering.onnx.builder import Body, Value
from tqc.lowering.onnx.encode import TINY as SMALLEST


def balance(body: Body, keys: Value, query: Value, heads: Value, d: int) -> Value:
    """As `tqc.format.balance.balance`.

    Args:
        keys: [batch, heads, n, d].
        query: [batch, query_heads, rows, d].
        heads: how many there are of `keys`.

    Returns:
        float32 [batch, heads, 1, d], rounded to keys' dtype.
    """
    one = body.ints(1)
    k, key_good, key_peak = _usable(body, _spread(body, keys, body.ints(SAMPLED_KEYS)))
    rows = body.size(query, 0)
    pairs = body.op("Mul", body.op("Mul", rows, body.size(query, 1)), body.size(k, 2))
    most = body.op("Div", body.ints(MOST_SCORES), body.max(one, pairs))
    sampled = _spread(body, query, body.min(body.ints(SAMPLED_QUERIES), body.max(one, most)))
    q, query_good, query_peak = _usable(body, body.reshape(sampled, 0, heads, -1, d))
    k = (k - body.reduce("Sum", k, 2) / body.max(body.reduce("Sum", key_good, 2), 1.0)) * key_good
    factor = body.min(query_peak * d**-0.5 * key_peak, 1e30)
    key_row = body.transpose(key_good)
    scores = body.where(key_row > 0.0, (q @ body.transpose(k)) * factor, body.constant(-1e35, np.float32))
    weights = body.op("Softmax", scores, axis=-1)
    both = query_good * key_row
    mass = _share(body, weights * (1.0 - weights) * both) + _share(body, both)
    key_square, key_variance = _moments(body, k, body.reduce("Sum", mass, 2, keep=False), LEAST_OF_KEYS, d)
    query_square, query_variance = _moments(body, q, body.reduce("Sum", mass, 3, keep=False), LEAST_OF_QUERIES, d)
    log_s = body.op("Log", key_square / query_square) / 4.0
    log_s = log_s - _median(body, log_s, d)
    error = body.op("Sqrt", key_variance + query_variance) * STANDARD_ERRORS / 4.0
    size = body.op("Clip", body.op("Abs", log_s) - error, 0.0, math.log(LARGEST))
    made = body.op("Exp", body.op("Sign", log_s) * size)
    return body.float(body.like(body.op("Unsqueeze", made, body.ints(2)), keys))


def _spread(body: Body, x: Value, count: Value) -> Value:
    step = body.max(body.ints(1), body.op("Div", body.size(x, 2), count))
    return body.slice(x, 0, body.size(x, 2), 2, step)


def _share(body: Body, x: Value) -> Value:
    return x / body.max(body.reduce("Sum", x, 2, 3), TINY)


def _usable(body: Body, x: Value) -> tuple[Value, Value, Value]:
    """Float32 rows over the largest number of their head, zeros where ignored; 1 for the others; that number."""
    x = body.float(x)
    finite = body.op("Not", body.op("IsNaN", x * 0.0))
    good = body.reduce("Min", body.float(finite), -1)
    x = body.where(good > 0.0, x, body.constant(0, np.float32))
    size = body.op("Abs", x)
    good = good * body.float(body.reduce("Max", size, -1) > 0.0)
    peak = body.max(body.reduce("Max", size, 2, 3), SMALLEST)
    return x / peak, good, peak


def _moments(body: Body, x: Value, mass: Value, least: float, d: int) -> tuple[Value, Value]:
    square = body.reduce("Sum", body.op("Unsqueeze", mass, body.ints(-1)) * (x * x), 2, keep=False)
    middle = _median(body, square, d)
    known = middle > TINY
    square = body.where(known, body.max(square, middle * least), body.constant(1, np.float32))
    total = body.reduce("Sum", mass, -1)
    rows = total * total / body.max(body.reduce("Sum", mass * mass, -1), TINY)
    return square, _trigamma(body, body.where(known, rows, body.constant(0, np.float32)) / 2.0)


def _median(body: Body, x: Value, d: int) -> Value:
    """The lower median over the last axis, kept."""
    smallest, _ = body.op("TopK", x, body.ints((d + 1) // 2), outputs=2, axis=-1, largest=0)
    return body.slice(smallest, -1, np.iinfo(np.int64).max, -1)


def _trigamma(body: Body, x: Value) -> Value:
    """For x >= 0, by its recurrence up from x and the series at x + 6; infinite at 0."""
    total = None
    for step in range(6):
        y = x + float(step)
        term = body.op("Div", 1.0, y * y)
        total = term if total is None else total + term
    assert total is not None
    y = x + 6.0
    inverse = body.op("Div", 1.0, y * y)
    series = body.op("Sub", 1 / 6, inverse * body.op("Sub", 1 / 30, inverse * (1 / 42)))
    return total + (body.op("Div", 1.0, y * 2.0) + 1.0 + inverse * series) / y
