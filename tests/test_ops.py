"""The dialect's reference: append, read and attend."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import ReinplaceCounters

from tqc import codebook, ops
from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.quantizer import fold, unfold

CENTRED = PackedFormat(64, 4, True)
PLAIN = PackedFormat(64, 4, False)
FOLDED = PackedFormat(64, 4, False, folded=True)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def empty(fmt, heads=2, batch=1, pages=12, dtype=torch.float32):
    """Storage of a cache without tokens, full of junk where nothing may be read."""
    dense = torch.full((batch, heads, fmt.dense_rows, fmt.head_dim), 77.0, dtype=dtype)
    page = torch.full((batch, heads, pages, fmt.page_bytes), 0xAB, dtype=torch.uint8)
    return page, dense, torch.zeros(2, dtype=torch.int64)


def filled(x, fmt, **kwargs):
    parts = empty(fmt, x.shape[1], x.shape[0], dtype=x.dtype, **kwargs)
    ops.append(*parts, x, None, str(fmt))
    return parts


def stored(parts, fmt):
    """What a cache holds, without the slots that hold nothing."""
    pages, dense, state = parts
    length, packed = state.tolist()
    rows = list(range(1 + min(length, fmt.sink_tokens)))
    rows = rows if packed else rows[1:]
    tokens = max(0, length - fmt.sink_tokens)
    rows += [1 + fmt.sink_tokens + u % fmt.residual_window for u in range(packed, tokens)]
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
    assert split[2].tolist() == [sum(counts), fmt.packed_tokens(sum(counts))]
    assert_same_cache(split, whole, fmt)


@pytest.mark.parametrize("sink_tokens, residual_window", [(0, 32), (4, 64), (40, 128)])
def test_append_token_by_token(sink_tokens, residual_window):
    fmt = PackedFormat(16, 3, True, sink_tokens, residual_window)
    x = normal(2, 1, 250, 16)
    single = empty(fmt, heads=1, batch=2)
    for t in range(250):
        ops.append(*single, x[:, :, t : t + 1], None, str(fmt))
        assert single[2].tolist() == [t + 1, fmt.packed_tokens(t + 1)]
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
        assert parts[2].tolist() == [200, 160]
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
        length, packed = parts[2].tolist()
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


def coding_variance(parts, fmt, length, columns):
    """Variance of the error in each coordinate of each key, [batch, heads, columns]; 0 where a key is not packed."""
    pages, _, state = parts
    variance = torch.zeros(*pages.shape[:2], columns, dtype=torch.float64)
    stored, packed = state.tolist()
    for u in range(min(packed, min(stored, length) - fmt.sink_tokens)):
        page = pages[:, :, u // PAGE_TOKENS]
        base = page[..., :4].contiguous().view(torch.float32)[..., 0].double()
        scale = base * 2.0 ** (-page[..., fmt.scales_offset + u % PAGE_TOKENS].double() / 32)
        variance[:, :, fmt.sink_tokens + u] = codebook.distortion(fmt.head_dim, fmt.bits) * scale**2
    return variance


def dense_attention(query, keys, values, mask=None, sinks=None, scale=0.125, softcap=0.0, variance=None):
    """Softmax attention in float64, with `mask` as additive [batch, query_heads, n, columns].

    `variance`: of the error in each coordinate of each key; a score gets half its own.
    """
    group = query.shape[1] // keys.shape[1]
    keys = keys.double().repeat_interleave(group, dim=1)
    values = values.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query.double(), keys) * scale
    if variance is not None:
        energy = (query.double() * scale).square().sum(-1)
        scores = scores + torch.einsum("bhq,bhk->bhqk", energy, variance.repeat_interleave(group, dim=1)) / 2
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask.double()
    if sinks is not None:
        extra = sinks.double().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], dim=-1)
    weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)[..., : keys.shape[2]]
    return weights @ values, torch.logsumexp(scores, dim=-1)


class TestAttend:
    HEADS, GROUP, LENGTH, NEW = 2, 3, 150, 5

    def inputs(self, dtype=torch.float32, length=LENGTH, new=NEW, rows=NEW, v_dim=64, batch=1):
        k_fmt, v_fmt = CENTRED, PackedFormat(v_dim, 3, False)
        k = filled(normal(batch, self.HEADS, length, 64, seed=1, dtype=dtype), k_fmt)
        v = filled(normal(batch, self.HEADS, length, v_dim, seed=2, dtype=dtype), v_fmt)
        query = normal(batch, self.HEADS * self.GROUP, rows, 64, seed=3, dtype=dtype)
        key = normal(batch, self.HEADS, new, 64, seed=4, dtype=dtype) if new else None
        value = normal(batch, self.HEADS, new, v_dim, seed=5, dtype=dtype) if new else None
        return query, k, v, key, value, (str(k_fmt), str(v_fmt))

    def tokens(self, k, v, key, value, specs, length=LENGTH):
        keys, values = ops.read(*k, length, specs[0]), ops.read(*v, length, specs[1])
        if key is not None:
            keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        return keys, values

    def attend(self, query, k, v, key, value, specs, mask=None, sinks=None, start=None, softcap=0.0, causal=False):
        return torch.ops.tqai.attend(query, *k, *v, key, value, mask, sinks, start, 0.125, softcap, causal, *specs)

    def check(self, given, mask=None, additive=None, atol=2e-6, length=LENGTH, **kwargs):
        out, lse = self.attend(*given, mask=mask, **kwargs)
        keys, values = self.tokens(*given[1:], length=length)
        expected = {name: kwargs[name] for name in ("sinks", "softcap") if name in kwargs}
        expected["variance"] = coding_variance(given[1], CENTRED, length, keys.shape[2])
        out_expected, lse_expected = dense_attention(given[0], keys, values, additive, **expected)
        assert out.dtype == given[0].dtype and lse.dtype == torch.float32
        assert out.shape == (*given[0].shape[:3], values.shape[3]) and lse.shape == given[0].shape[:3]
        assert torch.allclose(out.double(), out_expected, atol=atol)
        assert torch.allclose(lse.double(), lse_expected, atol=max(atol, 1e-5))

    def test_stored_and_new_tokens(self):
        self.check(self.inputs(batch=2))

    @pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
    def test_half_precision(self, dtype, atol):
        self.check(self.inputs(dtype=dtype), atol=atol)

    @pytest.mark.parametrize("rows", [1, 7])
    def test_cross_attention_reads_stored_tokens_alone(self, rows):
        self.check(self.inputs(new=0, rows=rows))

    @pytest.mark.parametrize("v_dim", [32, 128])
    def test_values_of_another_head_dim(self, v_dim):
        self.check(self.inputs(v_dim=v_dim))

    @pytest.mark.parametrize("length", [0, 3, 68, 69])
    def test_short_histories(self, length):
        self.check(self.inputs(length=length), length=length)

    def test_softcap_and_sinks(self):
        sinks = normal(self.HEADS * self.GROUP, seed=9)
        self.check(self.inputs(), softcap=2.0)
        self.check(self.inputs(), sinks=sinks)
        self.check(self.inputs(), sinks=sinks, softcap=2.0)

    @pytest.mark.parametrize("rows", [1, 3, 5, 8])
    def test_causal_is_aligned_to_the_last_new_token(self, rows):
        column = torch.arange(self.LENGTH + self.NEW)[None, :] - self.LENGTH
        allowed = column <= torch.arange(rows)[:, None] + self.NEW - rows
        additive = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)
        self.check(self.inputs(rows=rows), additive=additive, causal=True)

    @pytest.mark.parametrize(
        "shape", [(), (1,), (5,), (1, 5), (6, 1), (6, 5), (1, 6, 1), (2, 6, 5), (2, 1, 5), (2, 1, 1)]
    )
    @pytest.mark.parametrize("kind", [torch.bool, torch.float32])
    def test_masks_broadcast(self, shape, kind):
        given = self.inputs(batch=2)
        shape = (*shape, self.LENGTH + self.NEW)
        if kind == torch.bool:
            mask = normal(*shape, seed=7) > -0.5
            additive = torch.zeros(shape).masked_fill(~mask, -math.inf)
        else:
            mask = additive = normal(*shape, seed=7)
        self.check(given, mask=mask, additive=additive)

    def test_a_mask_of_one_column_is_broadcast_over_tokens(self):
        mask = torch.tensor([True, False, True, True, False])[:, None]
        self.check(self.inputs(), mask=mask, additive=torch.zeros(5, 1).masked_fill(~mask, -math.inf))

    @pytest.mark.parametrize("kind", [torch.bool, torch.float32])
    def test_rows_that_may_attend_to_nothing_are_zeros(self, kind):
        given = self.inputs()
        allowed = torch.ones(5, self.LENGTH + self.NEW, dtype=torch.bool)
        allowed[2] = False
        additive = torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)
        mask = allowed if kind == torch.bool else additive
        out, lse = self.attend(*given, mask=mask)
        assert (out[:, :, 2] == 0).all() and (lse[:, :, 2] == -math.inf).all()
        assert torch.isfinite(out).all() and torch.isfinite(lse[:, :, [0, 1, 3, 4]]).all()
        self.check(given, mask=mask, additive=additive)

    def test_an_empty_cache_without_new_tokens(self):
        out, lse = self.attend(*self.inputs(length=0, new=0))
        assert (out == 0).all() and (lse == -math.inf).all()

    def test_columns_behind_the_tokens_stand_for_zeros(self):
        given = self.inputs()
        query, k, v, key, value, specs = given
        mask = normal(1, 1, 5, 200, seed=8)
        keys, values = self.tokens(*given[1:])
        pad = (0, 0, 0, 200 - keys.shape[2])
        keys, values = torch.nn.functional.pad(keys, pad), torch.nn.functional.pad(values, pad)
        variance = coding_variance(k, CENTRED, self.LENGTH, 200)
        expected, lse_expected = dense_attention(query, keys, values, mask, variance=variance)
        out, lse = self.attend(*given, mask=mask)
        assert torch.allclose(out.double(), expected, atol=2e-6)
        assert torch.allclose(lse.double(), lse_expected, atol=1e-5)

    @pytest.mark.parametrize("start", [0, 2, 50, 100, 150, 160])
    def test_start_hides_stored_tokens_and_zeros_fill_a_gap(self, start):
        self.check(self.inputs(), start=torch.tensor([start, start + 1]), length=start)

    def test_output_is_laid_out_by_token(self):
        out, _ = self.attend(*self.inputs())
        assert out.transpose(1, 2).is_contiguous()

    def test_keys_and_values_of_different_length_are_refused(self):
        query, k, v, key, value, specs = self.inputs()
        ops.append(*k, key, None, specs[0])
        with pytest.raises(ValueError, match="k_state and v_state must agree: 155 keys are stored and 150 values"):
            self.attend(query, k, v, key, value, specs)
        # Tokens from `start` on do not count, so between the two appends of a step all is well.
        self.attend(query, k, v, key, value, specs, start=torch.tensor([150]))
        with pytest.raises(ValueError, match="must agree"):
            self.attend(query, k, v, key, value, specs, start=torch.tensor([152]))

    def test_a_key_without_a_value_is_refused(self):
        query, k, v, key, value, specs = self.inputs()
        with pytest.raises(ValueError, match="key and value must both be given or both be None, got only key"):
            self.attend(query, k, v, key, None, specs)


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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("new, rows, causal", [(1, 1, False), (4, 4, True), (0, 2, False)])
    def test_attend(self, new, rows, causal, dtype):
        query, k, v, key, value, specs = TestAttend().inputs(dtype=dtype, new=new, rows=rows, length=100, v_dim=32)
        mask = torch.ones(rows, 100 + new, dtype=torch.bool)
        for given_mask, sinks in ((None, None), (mask, normal(6))):
            given = (*k, *v, key, value, given_mask, sinks, None, 0.125, 0.0, causal, *specs)
            torch.library.opcheck(torch.ops.tqai.attend.default, (query, *given))

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
