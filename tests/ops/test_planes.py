"""The dialect's reference: append and read, and how the ops are registered."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import ReinplaceCounters

from tests.common import empty, filled, normal
from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.format.quantizer import fold, unfold
from tqc.ops import planes as ops

CENTRED = PackedFormat(64, 4, True)
PLAIN = PackedFormat(64, 4, False)
FOLDED = PackedFormat(64, 4, False, folded=True)


def stored(parts, fmt):
    """What a cache holds, without the slots that hold nothing."""
    pages, dense, state = parts
    length, packed, _ = state.tolist()
    rows = list(range(min(length, fmt.sink_tokens)))
    tokens = max(0, length - fmt.sink_tokens)
    rows += [fmt.sink_tokens + u % fmt.residual_window for u in range(packed, tokens)]
    rows += range(fmt.token_rows, fmt.dense_rows if packed else fmt.token_rows)
    return pages[:, :, : packed // PAGE_TOKENS], dense[:, :, rows], state


def assert_same_cache(a, b, fmt):
    for left, right in zip(stored(a, fmt), stored(b, fmt), strict=True):
        assert torch.equal(left, right)


FORMATS = st.builds(
    PackedFormat,
    head_dim=st.sampled_from([8, 16]),
    bits=st.integers(1, 8),
    centred=st.booleans(),
    sink_tokens=st.sampled_from([0, 1, 4, 40]),
    residual_window=st.sampled_from([32, 64, 128]),
)


@given(fmt=FORMATS, counts=st.lists(st.integers(0, 90), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_append_does_not_depend_on_how_tokens_are_split(fmt, counts):
    x = normal(1, 2, sum(counts), fmt.head_dim)
    split = empty(fmt, pages=18)
    for part in x.split(counts, dim=2):
        ops.append(*split, part, None, str(fmt))
    whole = filled(x, fmt, pages=18)
    assert split[2].tolist() == [sum(counts), fmt.packed_tokens(sum(counts)), 0]
    assert_same_cache(split, whole, fmt)


@pytest.mark.parametrize("sink_tokens, residual_window", [(0, 32), (4, 64), (40, 128)])
def test_append_token_by_token(sink_tokens, residual_window):
    fmt = PackedFormat(16, 3, True, sink_tokens, residual_window)
    x = normal(2, 1, 250, 16)
    single = empty(fmt, heads=1, batch=2)
    for t in range(250):
        ops.append(*single, x[:, :, t : t + 1], None, str(fmt))
        assert single[2].tolist() == [t + 1, fmt.packed_tokens(t + 1), 0]
    assert_same_cache(single, filled(x, fmt), fmt)


@given(fmt=FORMATS, length=st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_read_returns_dense_tokens_exactly_and_packed_ones_nearly(fmt, length):
    x = normal(1, 2, length, fmt.head_dim)
    parts = filled(x, fmt)
    out = ops.read(*parts, length + 3, str(fmt))
    assert out.shape == (1, 2, length + 3, fmt.head_dim) and (out[:, :, length:] == 0).all()
    sinks, packed = fmt.sink_tokens, int(parts[2][1])
    assert torch.equal(out[:, :, :sinks][:, :, :length], x[:, :, :sinks])
    assert torch.equal(out[:, :, sinks + packed : length], x[:, :, sinks + packed :])
    if packed:
        old = slice(sinks, sinks + packed)
        error = (out[:, :, old] - x[:, :, old]).square().mean() / x[:, :, old].square().mean()
        assert error < {1: 0.5, 2: 0.2, 3: 0.07, 4: 0.03}.get(fmt.bits, 0.02)


@given(length=st.integers(0, 210))
@settings(max_examples=25, deadline=None)
def test_read_of_fewer_tokens_is_a_prefix(length):
    fmt = PackedFormat(16, 4, True)
    parts = filled(normal(1, 2, 200, 16), fmt)
    whole = ops.read(*parts, 210, str(fmt))
    assert torch.equal(ops.read(*parts, length, str(fmt)), whole[:, :, :length])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    x = normal(1, 2, 200, 64, dtype=dtype)
    parts = filled(x, CENTRED)
    out = ops.read(*parts, 200, str(CENTRED))
    assert out.dtype == dtype
    assert (out - x).float().square().mean() < 0.011
    assert torch.equal(out[:, :, -33:], x[:, :, -33:])


@pytest.mark.parametrize("length", [3, 60, 100, 200, 330])
def test_folded_values_are_the_same_in_another_basis(length):
    """Rotated values in, rotated output out; what is read is not rotated. A page that is cut goes back rotated."""
    keys, values = normal(1, 2, 330, 64), normal(1, 2, 330, 64, seed=1)
    k, plain, folded = filled(keys, CENTRED), filled(values, PLAIN), filled(fold(values, FOLDED), FOLDED)
    start, (query, key, value) = torch.tensor([length]), (normal(1, 2, 1, 64, seed=seed) for seed in (2, 3, 4))
    out = [
        ops.attend(query, *k, *v, key, v_new, None, None, start, 0.125, 0.0, False, str(CENTRED), str(fmt))[0]
        for v, v_new, fmt in ((plain, value, PLAIN), (folded, fold(value, FOLDED), FOLDED))
    ]
    torch.testing.assert_close(unfold(out[1], FOLDED), out[0], atol=1e-5, rtol=0)
    assert (out[1] - out[0]).abs().max() > 0.1
    ops.append(*plain, value, start, str(PLAIN))
    ops.append(*folded, fold(value, FOLDED), start, str(FOLDED))
    actual, expected = (ops.read(*v, length + 2, str(fmt)) for v, fmt in ((folded, FOLDED), (plain, PLAIN)))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


class TestAppendAtStart:
    """`start` as the position tensor of a preallocated cache."""

    @pytest.mark.parametrize("length", [3, 4, 50, 68, 69, 100, 200])
    def test_at_the_end_is_plain_append(self, length):
        x = normal(1, 2, 230, 64)
        parts = filled(x[:, :, :length], CENTRED)
        ops.append(*parts, x[:, :, length:], torch.arange(length, 230), str(CENTRED))
        assert_same_cache(parts, filled(x, CENTRED), CENTRED)

    @pytest.mark.parametrize("start", [0, 2, 4, 30, 67])
    def test_rewind_before_anything_is_packed(self, start):
        x, other = normal(1, 2, 68, 64), normal(1, 2, 150, 64, seed=1)
        parts = filled(x, CENTRED)
        ops.append(*parts, other, torch.tensor([start]), str(CENTRED))
        assert_same_cache(parts, filled(torch.cat([x[:, :, :start], other], dim=2), CENTRED), CENTRED)

    @pytest.mark.parametrize("start", [164, 180, 199, 200])
    def test_rewind_inside_the_window(self, start):
        x, other = normal(1, 2, 200, 64), normal(1, 2, 70, 64, seed=1)
        parts = filled(x, CENTRED)
        assert parts[2].tolist() == [200, 160, 0]
        packed = parts[0][:, :, :5].clone()
        ops.append(*parts, other, torch.tensor([start]), str(CENTRED))
        expected = torch.cat([x[:, :, :start], other], dim=2)
        assert torch.equal(parts[0][:, :, :5], packed)
        assert_same_cache(parts, filled(expected, CENTRED), CENTRED)

    @pytest.mark.parametrize("start", [5, 36, 37, 60, 100])
    def test_rewind_into_a_packed_page(self, start):
        x, other = normal(1, 2, 230, 64), normal(1, 2, 20, 64, seed=1)
        parts = filled(x, CENTRED)
        before = ops.read(*parts, 230, str(CENTRED))
        ops.append(*parts, other, torch.tensor([start]), str(CENTRED))
        length, packed, _ = parts[2].tolist()
        assert length == start + 20 and packed == (start - 4) // PAGE_TOKENS * PAGE_TOKENS
        out = ops.read(*parts, length, str(CENTRED))
        assert torch.allclose(out[:, :, :start], before[:, :, :start], atol=1e-6)
        assert torch.equal(out[:, :, start:], other)

    def test_tokens_that_come_back_from_a_page_are_packed_again_with_little_loss(self):
        x, other = normal(1, 2, 230, 64), normal(1, 2, 150, 64, seed=1)
        parts = filled(x, CENTRED)
        ops.append(*parts, other, torch.tensor([60]), str(CENTRED))
        out = ops.read(*parts, 210, str(CENTRED))
        assert (out - torch.cat([x[:, :, :60], other], dim=2)).square().mean() < 0.015

    @pytest.mark.parametrize("length, start", [(0, 3), (0, 200), (2, 3), (2, 80), (70, 100), (70, 200), (150, 260)])
    def test_a_gap_reads_as_zeros(self, length, start):
        x = normal(1, 2, length, 64)
        parts, new = filled(x, PLAIN), normal(1, 2, 5, 64, seed=1)
        ops.append(*parts, new, torch.tensor([start]), str(PLAIN))
        out = ops.read(*parts, start + 5, str(PLAIN))
        assert (out[:, :, length:start] == 0).all()
        assert torch.equal(out[:, :, start:], new)
        assert (out[:, :, :length] - x).square().sum() <= 0.011 * x.square().sum()


def test_append_of_nothing_changes_nothing():
    x = normal(1, 2, 100, 64)
    parts = filled(x, CENTRED)
    before = [part.clone() for part in parts]
    ops.append(*parts, x[:, :, :0], None, str(CENTRED))
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


class TestRegistration:
    """What the compiler needs to know about the ops."""

    @pytest.mark.parametrize("length, count", [(0, 3), (10, 1), (60, 40), (100, 1)])
    @pytest.mark.parametrize("start", [None, 0, 50])
    def test_append(self, length, count, start):
        parts = filled(normal(1, 2, length, 64), CENTRED)
        at = None if start is None else torch.tensor([start])
        torch.library.opcheck(torch.ops.tqai.append.default, (*parts, normal(1, 2, count, 64), at, str(CENTRED)))

    @pytest.mark.parametrize("length", [0, 40, 120, 130])
    def test_read(self, length):
        parts = filled(normal(1, 2, 120, 64), CENTRED)
        torch.library.opcheck(torch.ops.tqai.read.default, (*parts, length, str(CENTRED)))

    def test_append_declares_what_it_mutates(self):
        arguments = torch.ops.tqai.append.default._schema.arguments
        assert [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write] == [
            "pages",
            "dense",
            "state",
        ]
        assert not any(
            a.alias_info for op in ("read", "attend") for a in getattr(torch.ops.tqai, op).default._schema.arguments
        )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_append_writes_in_place(backend):
    def step(pages, dense, state, new):
        torch.ops.tqai.append(pages, dense, state, new, None, str(CENTRED))
        return torch.ops.tqai.read(pages, dense, state, 110, str(CENTRED))

    x = normal(1, 2, 110, 64)
    eager, compiled = filled(x[:, :, :90], CENTRED), filled(x[:, :, :90], CENTRED)
    pointers = [part.data_ptr() for part in compiled]
    expected = step(*eager, x[:, :, 90:])
    ReinplaceCounters.clear()
    with torch._inductor.config.patch(force_disable_caches=True):
        out = torch.compile(step, fullgraph=True, backend=backend)(*compiled, x[:, :, 90:])
    assert ReinplaceCounters.get_total_missed() == 0
    assert torch.equal(out, expected)
    assert [part.data_ptr() for part in compiled] == pointers
    assert_same_cache(compiled, eager, CENTRED)


def test_compiled_loop_keeps_writing_to_the_same_cache():
    """Several steps of a growing cache through one compiled function: no stale copy is read."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(pages, dense, state, new, query):
        torch.ops.tqai.append(pages, dense, state, new, None, str(CENTRED))
        out, _ = torch.ops.tqai.attend(
            query, pages, dense, state, pages, dense, state, None, None, None, None, None, 0.125, 0.0, False,
            str(CENTRED), str(CENTRED),
        )  # fmt: skip
        return out

    x, query = normal(1, 2, 120, 64), normal(1, 4, 1, 64, seed=1)
    compiled, eager = filled(x[:, :, :95], CENTRED), filled(x[:, :, :95], CENTRED)
    for t in range(95, 120):
        out = step(*compiled, x[:, :, t : t + 1], query)
        ops.append(*eager, x[:, :, t : t + 1], None, str(CENTRED))
        both = (*eager, *eager, None, None, None, None, None, 0.125, 0.0, False, str(CENTRED), str(CENTRED))
        assert torch.allclose(out, ops.attend(query, *both)[0])
    assert_same_cache(compiled, eager, CENTRED)
