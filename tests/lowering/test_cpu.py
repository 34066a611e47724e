"""The CPU provider against the reference, at every level this machine runs."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lowering.common import (
    DTYPES,
    EPSILON,
    arguments,
    check_attend,
    check_bytes,
    check_large_scores,
    compare,
    draw_arguments,
    draw_keep,
    drawn,
    filled,
    make_store,
)
from tqc.format import PackedFormat
from tqc.format.quantizer import unfold
from tqc.lowering.cpu import PROVIDER, kernels, supports
from tqc.ops import planes as ops

formats = st.builds(
    PackedFormat,
    head_dim=st.sampled_from([8, 64, 72, 80, 96, 112, 128, 256, 512]),
    bits=st.integers(1, 8),
    centred=st.booleans(),
    sink_tokens=st.sampled_from([0, 3, 4]),
    residual_window=st.sampled_from([32, 64]),
    rotation=st.sampled_from(["hadamard", "hadamard", "haar"]),
    seed=st.integers(0, 1),
    folded=st.booleans(),
)

if reason := PROVIDER.unavailable():
    pytest.skip(f"the CPU provider does not run here: {reason}", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("few_threads")


@given(data=st.data())
@settings(drawn, max_examples=12)
def test_append_stores_what_the_reference_stores(provider, data):
    fmt = replace(data.draw(formats), keep=data.draw(st.sampled_from([None, None, 1, 40, 97, 150])))
    dtype = data.draw(st.sampled_from(DTYPES))
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    ours, theirs = make_store(batch, heads, 1200, fmt, dtype), make_store(batch, heads, 1200, fmt, dtype)
    for _ in range(data.draw(st.integers(1, 4))):
        count = data.draw(st.sampled_from([0, 1, 1, 5, 31, 64, 130]))
        new = torch.randn(batch, heads, count, fmt.head_dim, generator=generator) * 3 + 1
        if count and data.draw(st.booleans()):
            new[:, :, data.draw(st.integers(0, count - 1))] = data.draw(st.sampled_from([0.0, math.nan, math.inf, 1e4]))
        new = new.to(dtype)
        if data.draw(st.booleans()):
            new = new.transpose(1, 2).contiguous().transpose(1, 2)
        length, _, begin = theirs[2].tolist()
        start = data.draw(st.sampled_from([None, length, max(begin, length - 40), max(begin, length // 2), length + 7]))
        start = None if start is None else torch.tensor([start, 123])
        ops.append(*theirs, new, start, str(fmt))
        provider.append(*ours, new, start, str(fmt))
        assert torch.equal(ours[2], theirs[2])
    compare(ours[1], theirs[1], dtype)
    length = int(ours[2][0] - ours[2][2])
    # What is read must agree; a code may differ where a value lies on a boundary between two levels.
    a, b = ops.read(*ours, length, str(fmt)).float(), ops.read(*theirs, length, str(fmt)).float()
    assert torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    # What a flip of a page's centre moves, the codes make up for.
    assert (a - b).norm() <= 2 * EPSILON[dtype] * max(b.norm().item(), 1.0) + 0.05 * fmt.head_dim**-0.5 * b.norm()
    pages = min(int(ours[2][1]) // 32, ours[0].shape[2])
    if dtype is torch.float32 and pages:
        first_code = fmt.planes[0][2]
        same = ours[0][:, :, :pages, first_code:] == theirs[0][:, :, :pages, first_code:]
        assert same.float().mean() >= 0.998


@pytest.mark.parametrize("bits", range(1, 9))
def test_pages_are_the_references_bytes(provider, bits):
    check_bytes(provider.append, bits, 2, 4, 1100)


@given(data=st.data())
@settings(drawn, max_examples=12)
def test_read(provider, data):
    fmt = data.draw(formats)
    dtype = data.draw(st.sampled_from(DTYPES))
    length = data.draw(st.sampled_from([0, 2, 50, 200, 700]))
    fmt = replace(fmt, keep=draw_keep(data, length, fmt.sink_tokens))
    store = filled(2, 2, length, fmt, dtype)
    wanted = max(0, length - fmt.first_held(length) + data.draw(st.sampled_from([-90, -1, 0, 10])))
    actual = provider.read(*store, wanted, str(fmt))
    assert actual.dtype == dtype and actual.is_contiguous()
    compare(actual, ops.read(*store, wanted, str(fmt)), dtype)


@given(data=st.data())
@settings(drawn, max_examples=20)
def test_attend(provider, data):
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    group = data.draw(st.sampled_from([1, 2, 5]))
    length = data.draw(st.sampled_from([0, 3, 40, 100, 300, 900]))
    rows = data.draw(st.sampled_from([1, 1, 1, 2, 7, 40, 130]))
    k_fmt, v_fmt = data.draw(formats), data.draw(formats)
    keep = draw_keep(data, length, v_fmt.sink_tokens)
    k_fmt, v_fmt = replace(k_fmt, keep=keep), replace(v_fmt, keep=keep)
    given = draw_arguments(data, k_fmt, v_fmt, length, rows, batch=batch, heads=heads, group=group)
    check_attend(provider.attend, given)


def attend_to(provider, query, k, v, k_fmt, v_fmt, mask=None):
    how = (None, None, mask, None, None, k_fmt.head_dim**-0.5, 0.0, False, str(k_fmt), str(v_fmt))
    return provider.attend(query, *k, *v, *how)


@given(data=st.data())
@settings(drawn, max_examples=8)
def test_a_window_is_the_end_of_a_cache_that_drops_nothing(provider, data):
    """Its pages go round several times. By products of integers, too, which take runs of pages."""
    fmt, keep = data.draw(formats), data.draw(st.integers(1, 200))
    generator = torch.Generator().manual_seed(keep)
    whole_fmt, fmt = fmt, replace(fmt, keep=keep)
    whole, window = (make_store(1, 2, 1400, f, torch.float32) for f in (whole_fmt, fmt))
    length, sizes = 0, data.draw(st.lists(st.sampled_from([9, 32, 33, 100, 300]), min_size=1, max_size=3))
    while length < 1000:
        for size in sizes:
            new = torch.randn(1, 2, size, fmt.head_dim, generator=generator)
            for store, spec in ((whole, str(whole_fmt)), (window, str(fmt))):
                provider.append(*store, new, None, spec)
            length += size
    begin = length - keep
    assert window[2].tolist() == [*whole[2][:2].tolist(), begin]
    stored = provider.read(*whole, length, str(whole_fmt))[:, :, begin:]
    assert torch.equal(provider.read(*window, keep, str(fmt)), stored)
    query = torch.randn(1, 6, 3, fmt.head_dim, generator=generator)
    mask = torch.randn(3, length, generator=generator)
    outside = torch.arange(length) < begin
    for integers, error in ((False, 1e-5), (True, 0.03)):
        kernels.loaded().use_int8(integers)
        actual, lse = attend_to(provider, query, window, window, fmt, fmt, mask[:, begin:])
        masked = mask.masked_fill(outside, -math.inf)
        expected, expected_lse = attend_to(provider, query, whole, whole, whole_fmt, whole_fmt, masked)
        assert (actual - expected).norm() <= error * expected.norm()
        torch.testing.assert_close(lse, expected_lse, atol=error, rtol=0)
    kernels.loaded().use_int8(False)


@given(data=st.data())
@settings(drawn, max_examples=8)
def test_balance_divides_what_is_coded_and_multiplies_the_query(provider, data):
    fmt = replace(data.draw(formats), centred=True)
    ours, plain = (make_store(2, 2, 400, fmt, torch.float32) for _ in range(2))
    balance = fmt.head(ours[1])[:, :, 1:].clone()
    fmt.head(plain[1])[:, :, 1:] = 1
    tokens = torch.randn(2, 2, 400, fmt.head_dim, generator=torch.Generator().manual_seed(0))
    provider.append(*ours, tokens, None, str(fmt))
    provider.append(*plain, tokens / balance, None, str(fmt))
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(fmt.head(ours[1])[:, :, 0], fmt.head(plain[1])[:, :, 0])
    read = kernels.loaded().read  # folded values as they are stored
    stored, scaled = read(*ours, 400, str(fmt)), read(*plain, 400, str(fmt)) * balance
    packed = (torch.arange(400) >= fmt.sink_tokens) & (torch.arange(400) < fmt.sink_tokens + int(ours[2][1]))
    assert torch.equal(stored[:, :, packed], scaled[:, :, packed])
    assert torch.equal(stored[:, :, ~packed], tokens[:, :, ~packed])
    query = torch.randn(2, 2, 3, fmt.head_dim)
    for integers, error in ((False, 1e-5), (True, 0.01)):
        kernels.loaded().use_int8(integers)
        out, lse = attend_to(provider, query, ours, ours, fmt, fmt, packed)
        other, other_lse = attend_to(provider, query * balance, plain, plain, fmt, fmt, packed)
        assert (out - other * balance).norm() <= error * out.norm()
        torch.testing.assert_close(lse, other_lse, atol=error * query.norm(dim=-1).max().item(), rtol=0)
    kernels.loaded().use_int8(False)


@given(data=st.data())
@settings(drawn, max_examples=8)
def test_dense_has_few_rows_until_something_is_packed(provider, data):
    fmt, dtype = data.draw(formats), data.draw(st.sampled_from(DTYPES))
    fmt = replace(fmt, keep=data.draw(st.sampled_from([None, 1, 50])))
    rows = data.draw(st.sampled_from([2, fmt.sink_tokens + 1, 31, fmt.token_rows - 1, fmt.token_rows]))
    before = data.draw(st.integers(0, rows))
    full = make_store(2, 2, 300, fmt, dtype)
    few = [full[0][:, :, :0], full[1][:, :, :rows].clone(), full[2].clone()]
    tokens = torch.randn(2, 2, 300, fmt.head_dim).to(dtype)

    def append(store, from_, to):
        provider.append(*store, tokens[:, :, from_:to], None, str(fmt))

    for store in (few, full):
        append(store, 0, before)
        append(store, before, rows)
    missing = "pages are full: there are 0" if rows == fmt.dense_rows else f"dense is too small: it has {rows} rows"
    with pytest.raises(ValueError, match=f"{missing}, {rows + 1} tokens take"):
        append(few, rows, rows + 1)
    assert torch.equal(few[2], full[2])
    count = rows - fmt.first_held(rows)
    results = [
        (provider.read(*store, count, str(fmt)), *attend_to(provider, tokens[:, :, :3], store, store, fmt, fmt))
        for store in (few, full)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.testing.assert_close(results[0][0], unfold(tokens[:, :, rows - count : rows], fmt))
    few[0] = full[0].clone()
    few[1] = torch.cat([few[1], full[1][:, :, rows:]], dim=2)
    for store in (few, full):
        append(store, rows, 300)
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(few, full, strict=True))


@pytest.mark.parametrize("bits", [1, 2, 3, 6])
def test_large_scores(provider, bits):
    check_large_scores(provider.attend, bits)


@pytest.mark.parametrize("threads", [1, 2])
def test_splits_and_threads(provider, threads):
    """A long history is split over tasks whatever the number of threads, which is torch's."""
    given = arguments(PackedFormat(64, 4, True), PackedFormat(64, 2, False), 5000, group=4, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_attend(provider.attend, given)
        fmt = PackedFormat(64, 4, True)
        store = make_store(2, 3, 1500, fmt, torch.float32)
        new = torch.randn(2, 3, 1500, 64)
        provider.append(*store, new, None, str(fmt))
        stored = provider.read(*store, 1500, str(fmt))
    finally:
        torch.set_num_threads(before)
    assert (stored - new).square().mean() < 0.03


@pytest.mark.parametrize("what", ["key", "value", "query", "new key"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_vector_that_is_not_finite_spoils_its_head_alone(provider, what, bad):
    k_fmt, v_fmt = PackedFormat(64, 3, True), PackedFormat(64, 3, False)
    given = arguments(k_fmt, v_fmt, 400, heads=2, group=4, dtype=torch.float32)
    tokens = torch.randn(1, 2, 400, 64)
    tokens[0, 1, 77, 5] = bad
    if what in ("key", "value"):
        side, fmt = ("k", k_fmt) if what == "key" else ("v", v_fmt)
        store = make_store(1, 2, 400, fmt, torch.float32)
        provider.append(*store, tokens, None, str(fmt))
        given |= zip((f"{side}_{part}" for part in ("pages", "dense", "state")), store, strict=True)
    elif what == "query":
        given["query"][0, 4, 0, 0] = bad
    else:
        given["key"][0, 1, 0, 0] = bad
    for int8 in (False, True):
        kernels.loaded().use_int8(int8)
        actual, _ = provider.attend(*given.values())
        expected, _ = ops.attend(**given)
        assert torch.equal(actual.isfinite().all(-1), expected.isfinite().all(-1))
        compare(actual[:, :4], expected[:, :4], torch.bfloat16)


def test_arguments_that_do_not_fit_are_refused(provider):
    fmt = PackedFormat(64, 3, True)
    store = make_store(1, 2, 0, fmt, torch.float32)
    with pytest.raises(ValueError, match="pages are full"):
        provider.append(*store, torch.zeros(1, 2, 200, 64), None, str(fmt))
    with pytest.raises(ValueError, match="does not fit"):
        provider.append(*store, torch.zeros(1, 3, 1, 64), None, str(fmt))
    with pytest.raises(TypeError, match="dtype"):
        provider.append(*store, torch.zeros(1, 2, 1, 64).half(), None, str(fmt))
    with pytest.raises(ValueError, match="spec"):
        provider.append(*store, torch.zeros(1, 2, 1, 64), None, str(PackedFormat(128, 3, True)))
    with pytest.raises(ValueError, match="malformed|version"):
        provider.read(*store, 1, "nonsense")
    with pytest.raises(ValueError, match=r"state must be int64 \[3\]"):
        provider.read(*store[:2], torch.zeros(2, dtype=torch.int64), 1, str(fmt))
    assert store[2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("integers", [False, True])
def test_what_a_dropped_token_holds_spoils_nothing(provider, integers):
    fmt = PackedFormat(64, 3, True, keep=150)
    store, tokens = make_store(1, 1, 0, fmt, torch.float32), torch.randn(1, 1, 300, 64)
    tokens[:, :, 130:150] = math.nan  # pages begin at 132 and 164
    provider.append(*store, tokens, None, str(fmt))
    kernels.loaded().use_int8(integers)
    assert all(x.isfinite().all() for x in attend_to(provider, torch.randn(1, 4, 2, 64), store, store, fmt, fmt))
    assert provider.read(*store, 150, str(fmt)).isfinite().all()


def test_windows_that_do_not_fit_are_refused(provider):
    fmt = PackedFormat(64, 3, True, keep=200)
    store, other = make_store(1, 1, 0, fmt, torch.float32), make_store(1, 1, 0, fmt, torch.float32)
    new = torch.randn(1, 1, 500, 64)
    short = [store[0][:, :, 1:], *store[1:]]
    provider.append(*short, new[:, :, :192], None, str(fmt))  # so far no page takes another's slot
    with pytest.raises(ValueError, match="pages are full: there are 6, 692 tokens take 7"):
        provider.append(*short, new, None, str(fmt))
    provider.append(*other, new, None, str(fmt))
    with pytest.raises(ValueError, match="start must not lie before token 300, the first that is held, got 299"):
        provider.append(*other, new, torch.tensor([299]), str(fmt))
    mixed = [*other[:2], other[2] - torch.tensor([0, 0, 1])]
    with pytest.raises(ValueError, match="k_state and v_state must agree: keys are held from token 300 on, values"):
        attend_to(provider, new[:, :, :1], other, mixed, fmt, fmt)


def test_a_level_that_is_unknown_is_refused(monkeypatch):
    monkeypatch.setenv("TQC_CPU_LEVEL", "avx1024")
    assert "must be one of" in PROVIDER.unavailable()
    monkeypatch.undo()
    assert PROVIDER.unavailable() is None


def test_supports():
    fmt = PackedFormat(64, 4, True)
    assert supports(fmt, fmt, torch.bfloat16, "cpu") is None
    assert "cuda" in supports(fmt, fmt, torch.bfloat16, "cuda")
    assert "float64" in supports(fmt, fmt, torch.float64, "cpu")
    assert "head_dim" in supports(PackedFormat(520, 4, True), fmt, torch.float32, "cpu")


def test_a_batch_of_no_rows(provider):
    fmt = PackedFormat(64, 4, True)
    ours, theirs = make_store(0, 2, 300, fmt, torch.float32), make_store(0, 2, 300, fmt, torch.float32)
    new = torch.zeros(0, 2, 150, 64)
    for store, kernel in ((ours, provider), (theirs, ops)):
        kernel.append(*store, new, None, str(fmt))
        assert kernel.read(*store, 150, str(fmt)).shape == (0, 2, 150, 64)
        how = (None, None, None, 0.125, 0.0, False, str(fmt), str(fmt))
        out, lse = kernel.attend(new[:, :, :1], *store, *store, new[:, :, :1], new[:, :, :1], *how)
        assert out.shape == (0, 2, 1, 64) and lse.shape == (0, 2, 1)
    assert ours[2].tolist() == theirs[2].tolist() == [150, 96, 0]
