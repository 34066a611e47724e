"""The generated kernels on arrays of MLX against the reference: on an Apple GPU if there is one, else by the shim."""

from __future__ import annotations

import math
import shutil
import sys
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.lowering.common import (
    EPSILON,
    arguments,
    check_attend,
    compare,
    draw_arguments,
    draw_keep,
    drawn,
    filled,
    make_store,
)
from tqc.format import PackedFormat
from tqc.ops import planes

mx = pytest.importorskip("mlx.core")

from benchmarks import apple  # noqa: E402
from tests.lowering.metal_shim import Shim  # noqa: E402
from tqc.lowering.metal import launch  # noqa: E402

# Keys, values, dtype, kinds of masks, query heads of a head, queries.
CASES = [
    (PackedFormat(128, 4, True), PackedFormat(128, 2, False), torch.float16, ("none",), 4, 1),
    (PackedFormat(64, 3, True), PackedFormat(64, 3, False), torch.float32, ("bool", "wide", "all false"), 2, 3),
    (PackedFormat(80, 1, True, 0, 32), PackedFormat(80, 5, False, 0, 32), torch.float32, ("float",), 1, 1),
    (PackedFormat(96, 5, True, 7, 96), PackedFormat(40, 7, True, 7, 96), torch.float32, ("none",), 3, 1),
    (PackedFormat(256, 6, True), PackedFormat(256, 4, False), torch.bfloat16, ("model dtype",), 1, 2),
    (PackedFormat(72, 7, False, rotation="haar"), PackedFormat(64, 1, False), torch.float32, ("none",), 5, 2),
    (PackedFormat(64, 8, True), PackedFormat(64, 8, False, folded=True), torch.bfloat16, ("none",), 4, 2),
    (PackedFormat(8, 2, True), PackedFormat(16, 6, False, rotation="haar"), torch.float32, ("bool",), 9, 1),
]
NAMES = [f"{k.head_dim}-{k.bits}-{v.bits}" for k, v, *_ in CASES]
shims = cache(Shim)


@pytest.fixture(params=["shim", pytest.param("device", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the kernels run."""
    if (request.param == "device") != launch.available():
        pytest.skip("needs a Metal or CUDA device of MLX" if request.param == "device" else "there is a device")
    if request.param == "shim":
        if sys.platform != "linux" or not shutil.which("g++"):
            pytest.skip("the shim needs g++ on Linux")
        monkeypatch.setattr(launch, "compiled", shims)
    return request.param


def to_mlx(x):
    if not isinstance(x, torch.Tensor):
        return x
    if x.dtype == torch.bfloat16:
        return mx.array(x.contiguous().view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(x.contiguous().numpy())


def to_torch(x):
    if x.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(x.view(mx.uint16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(x))


def attend(*args):
    out, lse = launch.attend(*map(to_mlx, args))
    return to_torch(out.transpose(0, 2, 1, 3)).transpose(1, 2), to_torch(lse)


def appended(store, new, fmt, sizes):
    """`store` with `new` behind it, in calls of so many tokens each, again and again."""
    pages, dense = to_mlx(store[0]), to_mlx(store[1])
    state, at, i = tuple(store[2].tolist()), 0, 0
    while at < new.shape[2]:
        part = new[:, :, at : at + sizes[i % len(sizes)]]
        pages, dense, state = launch.append(pages, dense, state, to_mlx(part), str(fmt))
        at, i = at + part.shape[2], i + 1
    return [to_torch(pages), to_torch(dense), torch.tensor(state)]


def check_store(actual, expected, fmt, dtype):
    """What two caches hold is the same: bit for bit what is not coded; scales to 1e-4; codes but for one token in a
    hundred, to which two scales fit alike, or of which a coordinate lies on the boundary of two codes. The first page's
    own mean is what the head's centre leaves of it, rounding noise, so it counts by what it decodes to."""
    assert torch.equal(actual[2], expected[2])
    length, packed, begin = expected[2].tolist()
    ring = [fmt.sink_tokens + u % fmt.residual_window for u in range(packed, length - fmt.sink_tokens)]
    live = [*range(min(length, fmt.sink_tokens)), *ring]
    torch.testing.assert_close(actual[1][:, :, live], expected[1][:, :, live], rtol=0, atol=0, equal_nan=True)
    if packed:
        compare(fmt.head(actual[1]), fmt.head(expected[1]), dtype)
    first = max(begin - fmt.sink_tokens, 0) // 32
    slots = [page % actual[0].shape[2] for page in range(max(first, int(fmt.centred)), packed // 32)]
    pages = [store[0][:, :, slots] for store in (actual, expected)]
    assert not slots or (pages[0][..., 16:] == pages[1][..., 16:]).float().mean() >= 0.99
    headers = [part[..., :8].contiguous().view(torch.float32) for part in pages]
    torch.testing.assert_close(*headers, rtol=1e-4, atol=1e-30)
    decoded = [planes.read(*store, length - begin, str(fmt)).float() for store in (actual, expected)]
    good = decoded[1].isfinite()
    assert torch.equal(good, decoded[0].isfinite())
    largest = decoded[1][good].abs().max() if good.any() else 1.0
    near = (decoded[0] - decoded[1]).nan_to_num(0.0).abs() <= EPSILON[dtype] * max(1.0, largest)
    assert near.all(-1).float().mean() >= 0.99


@pytest.mark.parametrize("at", range(len(CASES)), ids=NAMES)
@settings(drawn, max_examples=6)
@given(data=st.data())
def test_attend(device, at, data):
    check_drawn_attend(data, CASES[at], split=at % 2 == 0)


def check_drawn_attend(data, case, split):
    """`attend` of a case, everything else drawn; `split`: shares of 4 pages, else one."""
    k_fmt, v_fmt, dtype, masks, group, rows = case
    length = data.draw(st.sampled_from([0, 3, 100, 101, 165, 300, 411]) | st.integers(1, 420))
    keep = draw_keep(data, length, k_fmt.sink_tokens) if length else None
    k_fmt, v_fmt = (with_keep(fmt, keep) for fmt in (k_fmt, v_fmt))
    batch, heads = data.draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    sizes = dict(batch=batch, heads=heads, group=group, dtypes=(dtype,), masks=masks)
    drawn_arguments = draw_arguments(data, k_fmt, v_fmt, length, rows, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "PAGES_A_SIMDGROUP", 1 if split else 100)
        check_attend(attend, drawn_arguments)


def with_keep(fmt, keep):
    parts = str(fmt).split(":")
    folded = parts[8:]
    return PackedFormat.parse(":".join([*parts[:8], *([] if keep is None else [f"keep{keep}"]), *folded]))


@pytest.mark.extended
@settings(drawn, max_examples=150)
@given(data=st.data())
def test_attend_of_any_format(device, data):
    head_dim = st.sampled_from([64, 80, 96, 128, 256]) | st.integers(1, 40).map(lambda n: 8 * n)
    sinks, window = data.draw(st.integers(0, 40)), 32 * data.draw(st.integers(1, 4))
    formats = [
        PackedFormat(
            data.draw(head_dim),
            data.draw(st.integers(1, 8)),
            data.draw(st.booleans()),
            sinks,
            window,
            data.draw(st.sampled_from(["hadamard", "haar"])),
            folded=data.draw(st.booleans()) if side == "v" else False,
        )
        for side in "kv"
    ]
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    masks = data.draw(st.sampled_from([("none",), ("bool", "wide", "all false"), ("float", "model dtype")]))
    case = (*formats, dtype, masks, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4)))
    check_drawn_attend(data, case, data.draw(st.booleans()))


def test_large_scores(device):
    """Scores that deviate by more than ten nats, where corrections for coding errors decide; negative factors."""
    k_fmt, v_fmt = CASES[1][:2]
    for scale in (0.3, -0.3):
        shown = torch.ones(1, 1, 1, 302, dtype=torch.bool)
        sizes = dict(heads=2, group=2, rows=2, dtype=torch.float32, scale=scale, attn_mask=shown)
        given = arguments(k_fmt, v_fmt, 300, **sizes)
        given["query"] = 5 * given["query"]
        check_attend(attend, given)


def test_caches_as_short_as_their_tokens(device):
    """Nothing is packed yet, so there are no pages and no more rows than tokens; then there is no token at all."""
    k_fmt, v_fmt, dtype, _, group, rows = CASES[0]
    for length in (40, 0):
        given = arguments(k_fmt, v_fmt, length, group=group, rows=rows, dtype=dtype)
        for side in "kv":
            given[f"{side}_pages"] = given[f"{side}_pages"][:, :, :0]
            given[f"{side}_dense"] = given[f"{side}_dense"][:, :, :length]
        check_attend(attend, given)


def test_window(device):
    """As a mask that shows each query so many columns back, of stored and of new tokens."""
    k_fmt, v_fmt, dtype, _, group, rows = CASES[1]
    for window in (2, 50, 290):
        own = 300 + torch.arange(rows)[:, None]
        mask = torch.arange(300 + rows) > own - window
        given = arguments(k_fmt, v_fmt, 300, group=group, rows=rows, dtype=dtype)
        expected, expected_lse = planes.attend(**{**given, "attn_mask": mask})
        out, lse = launch.attend(*map(to_mlx, given.values()), window=window)
        compare(to_torch(out), expected, dtype)
        compare(to_torch(lse), expected_lse, dtype)


def test_each_sequence_with_its_own_state_and_padding(device):
    """A batch of sequences is what each of them is alone, without its padding."""
    k_fmt, v_fmt, dtype, _, group, _ = CASES[1]
    lengths, padded, rows = (300, 0, 120), (0, 3, 1), 4
    alone, batch = [], {}
    for length in lengths:
        alone.append(arguments(k_fmt, v_fmt, length, group=group, rows=rows, dtype=dtype))
    pages = max(given["k_pages"].shape[2] for given in alone)
    for name in ("query", "k_dense", "v_dense", "key", "value"):
        batch[name] = torch.cat([given[name] for given in alone])
    for name in ("k_pages", "v_pages"):
        more = [pages - given[name].shape[2] for given in alone]
        parts = [torch.nn.functional.pad(given[name], (0, 0, 0, n)) for given, n in zip(alone, more, strict=True)]
        batch[name] = torch.cat(parts)
    for name in ("k_state", "v_state"):
        batch[name] = torch.stack([torch.nn.functional.pad(given[name], (0, 2), value=-1) for given in alone])
    joined = {name: to_mlx(x) for name, x in {**alone[0], **batch}.items()}
    out, lse = launch.attend(**joined, padding=mx.array(padded))
    for i, (own, skip) in enumerate(zip(alone, padded, strict=True)):
        own |= {name: own[name][:, :, skip:] for name in ("query", "key", "value")}
        expected, expected_lse = planes.attend(**own)
        compare(to_torch(out)[i : i + 1, :, skip:], expected, dtype)
        compare(to_torch(lse)[i : i + 1, :, skip:], expected_lse, dtype)


def test_keys_and_values_that_differ_give_nans(device):
    k_fmt, v_fmt, dtype, _, group, rows = CASES[0]
    given = arguments(k_fmt, v_fmt, 200, group=group, rows=rows, dtype=dtype)
    given["v_state"] = given["v_state"] + torch.tensor([1, 0, 0])
    out, lse = attend(*given.values())
    assert out.isnan().all() and lse.isnan().all()


# Keys of each width; values that are plain, centred, folded.
STORED = [(k, dtype) for k, _, dtype, *_ in CASES] + [(CASES[at][1], CASES[at][2]) for at in (0, 3, 6)]


@pytest.mark.parametrize("fmt, dtype", STORED, ids=[f"{fmt.head_dim}-{fmt.bits}" for fmt, _ in STORED])
@settings(drawn, max_examples=3)
@given(
    sizes=st.lists(st.integers(1, 130), min_size=1, max_size=4),
    count=st.integers(60, 400),
    keep=st.sampled_from([None, None, 45, 150]),
    special=st.sampled_from(["none", "zeros", "not finite", "large"]),
)
@example(sizes=[1, 50, 2], count=220, keep=None, special="not finite")
def test_append_and_read(device, fmt, dtype, sizes, count, keep, special):
    """Also with tokens that are zeros, that hold NaNs, or whose squares overflow."""
    fmt = with_keep(fmt, keep)
    generator = torch.Generator().manual_seed(count)
    new = torch.randn(1, 2, count, fmt.head_dim, generator=generator) + 1
    if special == "zeros":
        new[:, :, ::5] = 0.0
    elif special == "not finite":
        new[:, 0, 50, 3], new[:, 1, 45:50, 1] = math.inf, math.nan
    elif special == "large":
        new[:, :, 40:60] *= 1e4 if dtype == torch.float16 else 1e25
    # A sliding window's pages may be read while later tokens come, 32 at a time.
    sizes = sizes if keep is None else [min(size, 32) for size in sizes]
    store = make_store(1, 2, count, fmt, dtype)
    actual = appended(store, new.to(dtype), fmt, sizes)
    for part in new.to(dtype).split(32, dim=2):
        planes.append(*store, part, None, str(fmt))
    check_store(actual, store, fmt, dtype)
    length = int(store[2][0] - store[2][2])
    tile = launch.read(*map(to_mlx, store), 5, length, str(fmt))
    compare(to_torch(tile), planes.read(*store, length + 5, str(fmt))[:, :, 5:], dtype)


def test_faults_are_named(device):
    k_fmt, v_fmt, dtype, _, group, rows = CASES[0]
    given = {name: to_mlx(x) for name, x in arguments(k_fmt, v_fmt, 40, group=group, rows=rows, dtype=dtype).items()}
    with pytest.raises(ValueError, match="only value"):
        launch.attend(**{**given, "key": None})
    with pytest.raises(TypeError, match="query must be of the stored tokens' dtype"):
        launch.attend(**{**given, "query": given["query"].astype(mx.float32)})
    other = PackedFormat(128, 2, False, sink_tokens=5)
    with pytest.raises(ValueError, match="one sink_tokens"):
        launch.attend(**{**given, "v_spec": str(other)})
    with pytest.raises(ValueError, match="whole pages of 32, got 31"):
        launch.pack(mx.zeros((1, 1, 31, 128)), None, str(v_fmt))
    store = filled(1, 1, 60, v_fmt, dtype, capacity=32)
    with pytest.raises(ValueError, match="200 tokens need 68 rows of dense and 5 pages"):
        launch.append(
            to_mlx(store[0]), to_mlx(store[1]), (60, 0, 0), mx.zeros((1, 1, 140, 128), mx.float16), str(v_fmt)
        )


def test_benchmark_measures(device, monkeypatch):
    """benchmarks/apple.py, with one call of each kind."""
    for name, value in {"HEADS": 1, "REPEATS": 1, "CALLS": 1, "WIDTHS": ((4, 2),)}.items():
        monkeypatch.setattr(apple, name, value)
    rows = apple.measured((165,))
    kinds = ["dense", "mlx-lm kv_bits=4", "tqc K4/V2", "encode a page", "read a page"]
    assert [row["what"] for row in rows] == kinds and all(row["us"] > 0 for row in rows)


def test_benchmark_needs_a_device(monkeypatch):
    if launch.available():
        pytest.skip("there is a device")
    monkeypatch.setattr(sys, "argv", ["apple.py", "here"])
    with pytest.raises(SystemExit, match="^benchmarks/apple.py needs a device of MLX.*there is none$"):
        apple.main()
