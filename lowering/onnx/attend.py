"""`attend` and `read` as ONNX functions, in sizes that follow the tokens of the cache."""

from __future__ import annotations

import numpy as np
from onnx import FunctionProto

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.lowering.onnx.builder import Body, Value
from tqc.lowering.onnx.encode import (
    Tables,
    back_in_order,
    decode_levels,
    in_element_order,
    page_centres,
    rotate,
    table_inputs,
    token_scales,
)
from tqc.lowering.onnx.layout import part_names
from tqc.lowering.onnx.places import Places

LOWEST = float(np.finfo(np.float32).min)


def attend_function(
    name: str,
    k_fmt: PackedFormat,
    v_fmt: PackedFormat,
    new: bool,
    mask: str | None,
    sinks: bool,
    scale: float,
    softcap: float,
) -> FunctionProto:
    """`(query, state, [key, value], [mask], [sinks], tables of keys and of values, *key parts, *value parts) -> out`,
    see `tqc.ops.attend`.

    Args:
        new: whether there are new tokens.
        mask: "bool", "float" or None. It has a column for each token that is held and each new one, or more before
            these.
        sinks: whether there is a logit for each query head that joins the softmax.
    """
    body = Body(name)
    query, state = body.input("query"), body.input("state")
    key, value = (body.input(given) if new else None for given in ("key", "value"))
    attn_mask = body.input("attn_mask") if mask else None
    sink_logits = body.input("sinks") if sinks else None
    k_tables, v_tables = table_inputs(body, k_fmt, "key"), table_inputs(body, v_fmt, "value")
    keys = {part: body.input(f"key_{part}") for part in part_names(k_fmt)}
    values = {part: body.input(f"value_{part}") for part in part_names(v_fmt)}
    places = Places(body, state, k_fmt)

    heads = body.size(keys["window"], 1)
    q = body.reshape(body.float(query), 0, heads, -1, k_fmt.head_dim) * scale
    dense_keys = _dense(body, places, keys, key)
    scores = body.concat(
        q @ body.transpose(dense_keys), _packed_scores(body, places, q, keys, k_fmt, k_tables), axis=-1
    )
    if softcap:
        scores = body.op("Tanh", scores / softcap) * softcap
    rows = body.size(query, 2)
    visible = None
    if attn_mask is not None:
        arranged = _arrange(body, places, attn_mask, scores)
        scores = body.reshape(scores, 0, body.size(query, 1), rows, -1)
        if mask == "bool":
            scores = body.where(arranged, scores, body.constant(LOWEST, np.float32))
            visible = body.reduce("Max", body.float(arranged), -1)
        else:
            scores = scores + body.float(arranged)
        if sink_logits is None:
            scores = body.reshape(scores, 0, heads, -1, body.size(scores, 3))
    if sink_logits is not None:
        scores = body.reshape(scores, 0, body.size(query, 1), rows, -1)
        logit = body.reshape(body.float(sink_logits), 1, -1, 1, 1)
        shape = body.concat(body.op("Shape", scores, start=0, end=3), body.ints(1), axis=0)
        scores = body.concat(scores, body.op("Expand", logit, shape), axis=-1)
    weights = body.op("Softmax", scores, axis=-1)
    if sink_logits is not None:
        weights = body.reshape(body.slice(weights, 0, -1, -1), 0, heads, -1, body.size(dense_keys, 2) + places.coded)
    dense_values = _dense(body, places, values, value)
    count = body.size(dense_values, 2)
    out = body.slice(weights, 0, count, -1) @ dense_values
    out = out + _packed_output(
        body, places, body.slice(weights, count, count + places.coded, -1), values, v_fmt, v_tables
    )
    out = body.reshape(out, 0, body.size(query, 1), rows, v_fmt.head_dim)
    if visible is not None:  # a query that may attend to nothing
        out = body.where(visible > 0.0, out, body.constant(0, np.float32))
    return body.function({"output": body.like(out, query)})


def read_function(name: str, fmt: PackedFormat) -> FunctionProto:
    """`(state, tables, *parts) -> tokens`, see `tqc.ops.read`; in the basis in which they came."""
    body = Body(name)
    state, tables = body.input("state"), table_inputs(body, fmt, "table")
    parts = {part: body.input(part) for part in part_names(fmt)}
    places = Places(body, state, fmt)
    pages = _pages(places, parts)
    levels = back_in_order(body, decode_levels(body, pages, fmt, tables), fmt)
    y = body.reshape(levels, 0, 0, -1, PAGE_TOKENS, fmt.head_dim)
    y = y * body.op("Unsqueeze", token_scales(body, pages, tables), body.ints(-1))
    if fmt.centred:
        centre = page_centres(body, pages) + body.float(body.slice(parts["head"], 0, 1, 2))
        y = y + body.op("Unsqueeze", centre, body.ints(3))
    y = body.reshape(y, 0, 0, -1, fmt.head_dim)
    x = y if fmt.folded else y @ tables.rotation
    if fmt.centred:
        x = x * body.float(body.slice(parts["head"], 1, 2, 2))
    old, recent = places.dense_rows(parts["sinks"], parts["window"])
    return body.function({"output": body.concat(old, body.like(places.held(x, 2), old), recent, axis=2)})


def _pages(places: Places, parts: dict[str, Value]) -> dict[str, Value]:
    """The pages in use of each paged tensor."""
    return {part: places.pages(value) for part, value in parts.items() if part not in ("sinks", "window", "head")}


def _dense(body: Body, places: Places, parts: dict[str, Value], new: Value | None) -> Value:
    """The tokens that are not packed, float32, in order: sinks, recent ones, new ones."""
    rows = [*places.dense_rows(parts["sinks"], parts["window"]), *([] if new is None else [new])]
    return body.float(body.concat(*rows, axis=2))


def _packed_scores(
    body: Body, places: Places, q: Value, parts: dict[str, Value], fmt: PackedFormat, tables: Tables
) -> Value:
    """Scores of the packed tokens, corrected (`tqc.ops.planes.correction`): [batch, heads, rows, tokens]."""
    pages = _pages(places, parts)
    if fmt.centred:
        q = q * body.float(body.slice(parts["head"], 1, 2, 2))
    norm = body.op("Sqrt", body.reduce("Sum", q * q, -1))
    q = q if fmt.folded else rotate(body, q, tables)
    p = in_element_order(body, q, fmt) @ body.transpose(decode_levels(body, pages, fmt, tables))
    p = p + body.op("Relu", p - norm) * fmt.score_stretch
    scale = body.reshape(token_scales(body, pages, tables), 0, 0, 1, -1)
    scores = p * scale
    if fmt.centred:
        centre = page_centres(body, pages) + body.float(body.slice(parts["head"], 0, 1, 2))
        shift = body.op("Unsqueeze", q @ body.transpose(centre), body.ints(-1))
        rows = body.size(q, 2)
        scores = body.reshape(scores, 0, 0, rows, -1, PAGE_TOKENS) + shift
        scores = body.reshape(scores, 0, 0, rows, body.size(scale, 3))
    return places.held(scores, 3)


def _packed_output(
    body: Body, places: Places, weights: Value, parts: dict[str, Value], fmt: PackedFormat, tables: Tables
) -> Value:
    """The sum of packed values with `weights` [batch, heads, rows, tokens]."""
    pages = _pages(places, parts)
    scale = places.held(body.reshape(token_scales(body, pages, tables), 0, 0, 1, -1), 3)
    levels = places.held(decode_levels(body, pages, fmt, tables), 2)
    y = back_in_order(body, (weights * scale) @ levels, fmt)
    return y if fmt.folded else y @ tables.rotation


def _arrange(body: Body, places: Places, mask: Value, scores: Value) -> Value:
    """The mask's columns in the order of `scores`: those of packed tokens come last."""
    columns = body.size(scores, 3)
    start = body.size(mask, 3) - columns
    behind = start + places.sinks
    packed = behind + places.coded
    parts = (body.slice(mask, *ends, 3) for ends in ((start, behind), (packed, start + columns), (behind, packed)))
    return body.concat(*parts, axis=3)
