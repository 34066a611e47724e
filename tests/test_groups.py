"""Formats with groups: their spec, their blocks, and attention over what is kept."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.common import normal
from tqc import ops
from tqc.format import Groups, PackedFormat
from tqc.format.blocks import decode_blocks, encode_blocks, kept
from tqc.format.quantizer import decode_pages, encode_pages, head_rows
from tqc.ops import Planes, planes

EVICT = Groups(64, ((1, 8),))
TIERED = Groups(128, ((1, 8), (2, 2)))
SCORED = replace(EVICT, scorer="snapkv(queries=8)", queries=8, repeats=2)


def fmt(groups, centred=True, **options):
    return PackedFormat(16, groups.tiers[0][1], centred, 4, 160, groups=groups, **options)


@pytest.mark.parametrize("groups", [EVICT, TIERED, SCORED], ids=["evict", "tiered", "scored"])
def test_spec_gives_the_format_back(groups):
    for options in ({}, {"folded": True, "centred": False}):
        made = fmt(groups, **options)
        assert PackedFormat.parse(str(made)) == made
    assert str(fmt(EVICT)).endswith(":hadamard:0:group64=1x8")
    assert str(fmt(TIERED, centred=False, folded=True)).endswith(":folded:group128=1x8+2x2")
    assert str(fmt(SCORED)).endswith(":group64=1x8:scored8x2+0=snapkv(queries=8)")


@pytest.mark.parametrize(
    "tail", ["group64", "group64=", "group64=1x9", "group65=1x8", "group64=3x8", "group64=0x8", "group512=1x8",
             "group64=1x8:scored8x2", "scored8x2+0=snapkv()", "group64=1x8:folded", "keep96:group64=1x8", "group64=1x4"]
)  # fmt: skip
def test_a_malformed_group_is_refused(tail):
    with pytest.raises(ValueError):
        PackedFormat.parse(f"tq2:d16:b8:centred:s4:w160:hadamard:0:{tail}")


def test_a_window_too_small_for_the_queries_behind_a_group_is_refused():
    with pytest.raises(ValueError, match="residual_window must be at least 71 for groups of 64"):
        PackedFormat(16, 8, True, 4, 64, groups=SCORED)


def test_without_groups_blocks_are_the_pages():
    plain = PackedFormat(16, 3, True, 4, 96)
    assert (plain.block_bytes, plain.block_tokens) == (plain.page_bytes, 32)
    x = normal(1, 2, 64, 16)
    head = head_rows(x[:, :, :32], plain)
    pages = encode_pages(x, head, plain)
    assert torch.equal(encode_blocks(x, head, plain, None), pages)
    assert torch.equal(decode_blocks(pages, head, plain), decode_pages(pages, head, plain))


def test_a_block_holds_the_pages_of_its_tiers_and_then_the_places():
    format_, x, score = fmt(TIERED), normal(2, 3, 256, 16), normal(2, 3, 256, seed=1)
    head = head_rows(x[:, :, :32], format_)
    blocks = encode_blocks(x, head, format_, score)
    assert blocks.shape == (2, 3, 2, format_.block_bytes)
    wide, narrow = (PackedFormat(16, bits, True, 4, 160) for bits in (8, 2))
    assert format_.block_bytes == wide.page_bytes + 2 * narrow.page_bytes + 96
    for b, h, group in ((0, 0, 0), (1, 2, 1)):
        block, of_group = blocks[b, h, group], score[b, h, 128 * group : 128 * (group + 1)]
        places = block[-96:].long()
        order = sorted(range(128), key=lambda i: -of_group[i])
        assert places[:32].tolist() == sorted(order[:32]) and places[32:].tolist() == sorted(order[32:96])
        chosen = x[b, h, 128 * group + places][None, None]
        mine = head[b : b + 1, h : h + 1]
        parts = (encode_pages(chosen[:, :, :32], mine, wide), encode_pages(chosen[:, :, 32:], mine, narrow))
        assert torch.equal(block[:-96], torch.cat([part.flatten() for part in parts]))


def test_decoding_puts_tokens_back_and_zeros_where_they_were_evicted():
    format_, x, score = fmt(EVICT, centred=False), normal(1, 2, 128, 16), normal(1, 2, 128, seed=1)
    blocks = encode_blocks(x, x[:, :, :0], format_, score)
    held, there = decode_blocks(blocks, x[:, :, :0], format_), kept(blocks, format_)
    assert there.sum().item() == 2 * 64 and not held[~there].any()
    y = x @ format_.rotation_matrix().T
    torch.testing.assert_close(held[there], y[there], rtol=0, atol=0.05)
    assert (score[there].mean() > score[~there].mean()).item()


def test_equal_and_broken_scores_keep_the_later_token():
    format_, x = fmt(EVICT, centred=False), normal(1, 1, 64, 16)
    for score in (torch.zeros(1, 1, 64), torch.full((1, 1, 64), -math.inf), torch.full((1, 1, 64), math.nan)):
        blocks = encode_blocks(x, x[:, :, :0], format_, score)
        assert kept(blocks, format_)[0, 0].tolist() == [False] * 32 + [True] * 32
    with pytest.raises(ValueError, match="packed by their scores, and there are none"):
        encode_blocks(x, x[:, :, :0], format_, None)


def cache(groups, length=400, heads=2, seed=0):
    """Keys and values with random scores, and the dense tokens that are left of them with -inf where none is."""
    k_fmt, v_fmt = fmt(groups), fmt(groups, centred=False)
    key, value, score = (normal(2, heads, length, *dims, seed=seed + i) for i, dims in enumerate([(16,), (16,), ()]))
    packed = [ops.pack(x, f.spec, score=score) for x, f in ((key, k_fmt), (value, v_fmt))]
    return *packed, key, value


@pytest.mark.parametrize("groups", [EVICT, TIERED], ids=["evict", "tiered"])
def test_attention_is_softmax_over_what_is_kept(groups):
    keys, values, _, _ = cache(groups)
    gone = planes.evicted(keys.pages, keys.state, 400, keys.fmt)
    assert gone.sum().item() == 2 * 2 * (int(keys.state[1]) // groups.tokens) * (groups.tokens - groups.kept) > 0
    query, key, value = normal(2, 4, 3, 16, seed=7), normal(2, 2, 3, 16, seed=8), normal(2, 2, 3, 16, seed=9)
    mask = torch.ones(2, 1, 3, 403, dtype=torch.bool)
    mask[1, :, :, :30], mask[:, :, 0, 402], mask[:, :, 1, 402] = False, False, False
    out, lse = ops.attend(query, keys, values, key, value, attn_mask=mask, scale=0.3, return_lse=True)
    k, v = torch.cat([ops.read(keys), key], 2), torch.cat([ops.read(values), value], 2)
    added = planes.correction(query, keys.pages[:, :, : int(keys.state[1]) // groups.tokens], keys.fmt.head(keys.dense),
                              0.3, keys.fmt)  # fmt: skip
    for b in range(2):
        for h in range(4):
            there = ~torch.cat([gone[b, h // 2], torch.zeros(3, dtype=torch.bool)])
            for i in range(3):
                scores = (k[b, h // 2] @ query[b, h, i]) * 0.3
                scores[4 : 4 + added.shape[3]] += added[b, h, i]
                seen = there & mask[b, 0, i]
                weights = scores[seen].softmax(0)
                torch.testing.assert_close(out[b, h, i], weights @ v[b, h // 2][seen], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(lse[b, h, i], scores[seen].logsumexp(0))


@pytest.mark.parametrize("groups", [EVICT, TIERED], ids=["evict", "tiered"])
def test_traceable_attention_and_read_are_the_reference(groups):
    keys, values, _, _ = cache(groups)
    query, key, value = normal(2, 4, 2, 16, seed=7), normal(2, 2, 2, 16, seed=8), normal(2, 2, 2, 16, seed=9)
    mask = torch.ones(2, 1, 2, 402, dtype=torch.bool)
    mask[1, :, :, :30] = False
    for how in ({}, {"attn_mask": mask}, {"is_causal": True, "softcap": 5.0}):
        expected = ops.attend(query, keys, values, key, value, scale=0.3, **how)
        torch.testing.assert_close(ops.attend.traceable(query, keys, values, key, value, scale=0.3, **how), expected)
    torch.testing.assert_close(ops.read.traceable(keys), ops.read(keys))


def test_a_cut_between_groups_or_behind_them_works_and_one_inside_is_refused():
    keys, _, key, _ = cache(EVICT)
    first = int(keys.state[1])
    assert first == 256
    for length in (4 + 256, 300, 4 + 64, 4, 0):
        shorter = ops.rewind(keys, length)
        assert int(shorter.state[0]) == length
        torch.testing.assert_close(ops.read(shorter), ops.read(keys)[:, :, :length])
        torch.testing.assert_close(ops.read(ops.rewind.traceable(keys, length)), ops.read(shorter))
    for length in (5, 67, 69, 4 + 255):
        before = keys.state.clone(), keys.pages.clone(), keys.dense.clone()
        with pytest.raises(ValueError, match=f"cannot be cut to {length} tokens: .* some were evicted"):
            ops.rewind(keys, length)
        assert all(torch.equal(a, b) for a, b in zip(before, (keys.state, keys.pages, keys.dense), strict=True))


def test_tiers_that_keep_all_tokens_can_be_cut_anywhere():
    whole = Groups(128, ((1, 8), (3, 8)))
    keys, _, key, _ = cache(whole)
    for length in (300, 200, 132, 70):
        shorter = ops.rewind(keys, length)
        torch.testing.assert_close(ops.read(shorter), ops.read(keys)[:, :, :length])
        torch.testing.assert_close(ops.read(ops.rewind.traceable(keys, length)), ops.read(shorter))
        again = ops.extend(shorter, key[:, :, length:], score=normal(2, 2, 400, seed=5))
        torch.testing.assert_close(ops.read(again), key, rtol=0, atol=0.1)


def test_half_the_tokens_take_half_the_bytes():
    """8,192 tokens of Llama's shape in bfloat16, at 4 bits; two query heads to a head as SmolLM2 has three."""
    sizes = []
    for strategy in (None, "evict"):
        from tqc.config import Config

        config = Config.from_options({"preset": "quality", "strategy": strategy})
        parts = [Planes.empty(1, 1, f, torch.bfloat16, "cpu", 8192) for f in config.formats(64, 64, repeats=3)]
        sizes.append(sum(part.nbytes for planes_ in parts for part in planes_.parts))
    assert sizes[1] <= 0.55 * sizes[0]
