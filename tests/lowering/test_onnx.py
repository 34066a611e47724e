"""Each op of the dialect as an ONNX function, alone: what onnxruntime makes of it is what the reference makes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lowering.onnx_common import LEVELS, OnnxCache, attend_of, read_of, run, tables
from tqc import ops
from tqc.format import PackedFormat
from tqc.lowering.onnx.layout import from_planes, to_planes

DIM = 16
HEADS, GROUP = 2, 2
# Few, because onnxruntime takes a while to load each: all widths, planes one and several, windows, no sinks, folded.
FORMATS = [
    PackedFormat(DIM, 1, True, 4, 32),
    PackedFormat(DIM, 2, True, 0, 64, keep=150),
    PackedFormat(DIM, 3, True, 4, 32, rotation="haar"),
    PackedFormat(DIM, 4, True, 40, 32, keep=70),
    PackedFormat(DIM, 5, True, 4, 32),
    PackedFormat(DIM, 6, True, 4, 32),
    PackedFormat(DIM, 7, True, 4, 32),
    PackedFormat(DIM, 8, True, 4, 32),
]
session = settings(deadline=None, derandomize=True, max_examples=12)


def values_of(fmt: PackedFormat) -> PackedFormat:
    return replace(fmt, centred=False, folded=fmt.bits in (2, 3))


def draw(*shape: int, seed: int) -> torch.Tensor:
    """Tokens with a mean, and channels that differ in size."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(0.2, 4.0, shape[-1]) + 1.0


def assert_same_cache(cache: OnnxCache) -> None:
    """State, codes and scales to the byte; what is a sum of floats to its rounding."""
    fmt, expected = cache.fmt, cache.reference
    assert cache.state.tolist() == expected.state.tolist()
    pages, dense = to_planes(cache.parts, fmt)
    rows = fmt.dense_rows if int(expected.state[1]) else min(fmt.token_rows, expected.dense.shape[2])
    np.testing.assert_allclose(dense[:, :, :rows], expected.dense[:, :, :rows].numpy(), rtol=2e-6, atol=2e-6)
    # A window's spare pages may be others', so only pages that hold tokens are compared.
    first, last = max(0, int(cache.state[2]) - fmt.sink_tokens) // 32, int(cache.state[1]) // 32
    ours, theirs = (
        held[:, :, [page % held.shape[2] for page in range(first, last)]] if last > first else held[:, :, :0]
        for held in (pages, expected.pages.numpy())
    )
    units = [np.ascontiguousarray(held[..., :8]).view(np.float32) for held in (ours, theirs)]
    np.testing.assert_allclose(*units, rtol=2e-4, atol=1e-6 * max(1.0, float(np.abs(units[1]).max(initial=0.0))))
    begin = fmt.planes[0][2]
    assert np.array_equal(ours[..., begin:], theirs[..., begin:]), "planes of the codes"
    assert np.array_equal(ours[..., 16:48], theirs[..., 16:48]), "scale codes"
    if fmt.centred:  # the first page's own centre is what rounding left of zero
        centres = [held[:, :, int(first == 0) :, 48:begin] for held in (ours, theirs)]
        assert np.array_equal(*centres), "centres of the pages"


@session
@given(st.sampled_from(FORMATS), st.lists(st.sampled_from([1, 2, 31, 40, 120, 150]), min_size=1, max_size=4))
def test_extend(fmt: PackedFormat, counts: list[int]) -> None:
    for own in (fmt, values_of(fmt)):
        cache = OnnxCache(own, 2, HEADS)
        for seed, count in enumerate(counts):
            if sum(counts[: seed + 1]) > 300:
                break
            query = draw(2, HEADS * GROUP, count, DIM, seed=seed + 50) if own.centred else None
            cache.extend(draw(2, HEADS, count, DIM, seed=seed), query)
            assert_same_cache(cache)


@session
@given(
    st.sampled_from(FORMATS),
    st.sampled_from([0, 3, 31, 90, 200]),
    st.sampled_from([0, 1, 5]),
    st.sampled_from([None, "bool", "float"]),
    st.booleans(),
    st.sampled_from([0.0, 2.0]),
)
def test_attend(fmt: PackedFormat, stored: int, new: int, mask: str | None, sinks: bool, softcap: float) -> None:
    keys, values = OnnxCache(fmt, 2, HEADS), OnnxCache(values_of(fmt), 2, HEADS)
    if stored:
        keys.extend(draw(2, HEADS, stored, DIM, seed=0), draw(2, HEADS * GROUP, 3, DIM, seed=1))
        values.extend(draw(2, HEADS, stored, DIM, seed=2), None)
    if not stored and not new:
        return
    query = draw(2, HEADS * GROUP, max(1, new), DIM, seed=3)
    key, value = (draw(2, HEADS, new, DIM, seed=seed) if new else None for seed in (4, 5))
    columns = keys.reference.length + new
    seen = torch.rand(2, 1, query.shape[2], columns, generator=torch.Generator().manual_seed(6)) > 0.3
    seen[0, :, 0] = False  # a query that may attend to nothing
    given_mask = seen if mask == "bool" else torch.where(seen, 0.5, -3.0) if mask == "float" else None
    logits = torch.linspace(-1, 1, HEADS * GROUP) if sinks else None
    how = {"scale": 0.3, "softcap": softcap}
    wanted = ops.attend(query, keys.reference, values.reference, key, value, None, given_mask, logits, **how)

    name = f"attend_{fmt.bits}_{bool(new)}_{mask}_{sinks}_{softcap}"
    function = attend_of(name, fmt, values.fmt, bool(new), mask, sinks, 0.3, softcap)
    feeds = {"query": query, "key": key, "value": value, "attn_mask": given_mask, "sinks": logits}
    arrays = {name: tensor.numpy() for name, tensor in feeds.items() if tensor is not None}
    arrays |= {"state": keys.state, **tables("key", fmt), **tables("value", values.fmt)}
    made = run(function, arrays | keys.feeds("key_") | values.feeds("value_"))["output"]
    np.testing.assert_allclose(made, wanted.numpy(), rtol=0, atol=2e-5)


@session
@given(st.sampled_from(FORMATS), st.sampled_from([2, 31, 90, 200]))
def test_read(fmt: PackedFormat, stored: int) -> None:
    for own in (fmt, values_of(fmt)):
        cache = OnnxCache(own, 1, HEADS)
        cache.extend(draw(1, HEADS, stored, DIM, seed=0), None)
        function = read_of(f"read_{own.bits}_{own.centred}", own)
        made = run(function, {"state": cache.state, **tables("table", own), **cache.parts})["output"]
        rows = cache.reference.parts
        wanted = ops.planes.held(*rows, cache.reference.length, own)
        np.testing.assert_allclose(made, wanted.numpy(), rtol=0, atol=3e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_every_optimization_level(level: str) -> None:
    cache = OnnxCache(FORMATS[2], 1, HEADS)
    for seed, count in enumerate((50, 1)):
        cache.extend(draw(1, HEADS, count, DIM, seed=seed), draw(1, HEADS, count, DIM, seed=9), level)
        assert_same_cache(cache)


def test_vectors_that_are_not_finite() -> None:
    cache = OnnxCache(FORMATS[2], 1, HEADS)
    new = draw(1, HEADS, 120, DIM, seed=0)
    new[0, 0, 20, 3], new[0, 1, 30, 5], new[0, 1, 40] = float("nan"), float("inf"), 0.0
    cache.extend(new, None)
    assert_same_cache(cache)


def test_extend_refuses_tokens_of_another_size() -> None:
    cache = OnnxCache(FORMATS[0], 1, HEADS)
    with pytest.raises(Exception, match="(?i)dimension|shape|broadcast|size"):
        cache.extend(draw(1, HEADS, 3, DIM * 2, seed=0)[..., : DIM + 8], None)


def test_read_refuses_scales_of_other_pages() -> None:
    cache = OnnxCache(FORMATS[0], 1, HEADS)
    cache.extend(draw(1, HEADS, 120, DIM, seed=0), None)  # three pages
    function = read_of(f"read_{cache.fmt.bits}_{cache.fmt.centred}", cache.fmt)
    feeds = {"state": cache.state, **tables("table", cache.fmt), **cache.parts}
    with pytest.raises(Exception, match="(?i)dimension|shape|broadcast|size"):
        run(function, {**feeds, "scales": cache.parts["scales"][:, :, :2]})


def test_attend_of_a_state_that_is_not_the_caches() -> None:
    """The tokens that a state counts are those that are seen."""
    fmt = FORMATS[0]
    keys, values = OnnxCache(fmt, 1, HEADS), OnnxCache(values_of(fmt), 1, HEADS)
    keys.extend(draw(1, HEADS, 20, DIM, seed=0), None)
    values.extend(draw(1, HEADS, 20, DIM, seed=1), None)
    function = attend_of("attend_alone", fmt, values.fmt, False, None, False, 0.3, 0.0)
    query = draw(1, HEADS, 1, DIM, seed=2).numpy()
    feeds = {"query": query, **tables("key", fmt), **tables("value", values.fmt)}
    feeds |= keys.feeds("key_") | values.feeds("value_")
    whole, half = (run(function, {**feeds, "state": np.array([n, 0, 0])})["output"] for n in (20, 10))
    assert not np.allclose(whole, half)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_layout_keeps_every_byte(fmt: PackedFormat) -> None:
    pages = np.random.default_rng(0).integers(0, 256, (2, 3, 2, fmt.page_bytes), np.uint8)
    pages[..., 8:16] = 0
    parts = from_planes(pages, np.random.default_rng(1).random((2, 3, fmt.dense_rows, DIM), np.float32), fmt, 256)
    again, dense = to_planes(parts, fmt)
    assert np.array_equal(again[:, :, :2, 16:48], pages[..., 16:48])
    for width, _, offset in fmt.planes:
        size = 32 * DIM * width // 8
        assert np.array_equal(again[:, :, :2, offset : offset + size], pages[..., offset : offset + size])
    assert np.array_equal(from_planes(again, dense, fmt, 256)["window"], parts["window"])
