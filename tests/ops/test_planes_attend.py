"""The dialect's reference: attend."""

import math

import pytest
import torch

from tests.common import filled, normal
from tqc.format import PAGE_TOKENS, PackedFormat, codebook
from tqc.format.quantizer import decode_pages
from tqc.ops import planes as ops

CENTRED = PackedFormat(64, 4, True)
PLAIN = PackedFormat(64, 4, False)
FOLDED = PackedFormat(64, 4, False, folded=True)


def corrections(query, parts, fmt, length, columns, scale=0.125):
    """What the coding error adds to each score, [batch, query_heads, n, columns]; 0 where a key is not packed."""
    pages, dense, state = parts
    stored, packed, _ = state.tolist()
    rotated = (query.double() * scale) @ fmt.rotation_matrix().double().T
    group = query.shape[1] // pages.shape[1]
    added = torch.zeros(*query.shape[:3], columns, dtype=torch.float64)
    for u in range(min(packed, min(stored, length) - fmt.sink_tokens)):
        page, place = pages[:, :, u // PAGE_TOKENS], u % PAGE_TOKENS
        decoded = decode_pages(page.unsqueeze(2), fmt.head(dense), fmt)[:, :, place].double()
        nibbles = page[..., fmt.centre_offset : fmt.centre_offset + fmt.head_dim // 2]
        centre = torch.cat([nibbles & 15, nibbles >> 4], dim=-1).double() - 8
        centre = (
            centre * page[..., 4:8].contiguous().view(torch.float32).double() + dense[:, :, fmt.token_rows].double()
        )
        by_codes = (decoded - centre).repeat_interleave(group, 1)
        scale_of = page[..., :4].contiguous().view(torch.float32)[..., 0].double()
        scale_of = scale_of * 2.0 ** (-page[..., fmt.scales_offset + place].double() / 32)
        deviation = rotated.norm(dim=-1) * scale_of.repeat_interleave(group, 1)[..., None]
        part = torch.einsum("bhqd,bhd->bhq", rotated, by_codes)
        stretch = codebook.distortion(fmt.head_dim, fmt.bits)
        added[..., fmt.sink_tokens + u] = torch.where(part > deviation, stretch * (part - deviation), 0.0)
    return added


def dense_attention(query, keys, values, mask=None, sinks=None, scale=0.125, softcap=0.0, added=0.0):
    """Softmax attention in float64, with `mask` as additive [batch, query_heads, n, columns]; `added` goes to the
    scores before `softcap`."""
    group = query.shape[1] // keys.shape[1]
    keys = keys.double().repeat_interleave(group, dim=1)
    values = values.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query.double(), keys) * scale + added
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
        expected["added"] = corrections(given[0], given[1], CENTRED, length, keys.shape[2])
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
        added = corrections(query, k, CENTRED, self.LENGTH, 200)
        expected, lse_expected = dense_attention(query, keys, values, mask, added=added)
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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("new, rows, causal", [(1, 1, False), (4, 4, True), (0, 2, False)])
    def test_registration(self, new, rows, causal, dtype):
        query, k, v, key, value, specs = self.inputs(dtype=dtype, new=new, rows=rows, length=100, v_dim=32)
        mask = torch.ones(rows, 100 + new, dtype=torch.bool)
        for given_mask, sinks in ((None, None), (mask, normal(6))):
            given = (*k, *v, key, value, given_mask, sinks, None, 0.125, 0.0, causal, *specs)
            torch.library.opcheck(torch.ops.tqai.attend.default, (query, *given))
