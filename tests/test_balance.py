"""The balance of keys: what it must hold for any input, and that it finds what makes keys hard to code."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.common import normal
from tqc.format import PackedFormat
from tqc.format.balance import LARGEST, balance
from tqc.format.quantizer import decode_pages, decoded, encode_pages, head_rows

DIM = 64


def gain(channels, factor):
    g = torch.ones(DIM)
    g[channels] = factor
    return g


def score_error(keys, query, s, bits=3):
    """Mean squared error of the scores of coded keys."""
    fmt = PackedFormat(DIM, bits, True)
    head = head_rows(keys[:, :, :32], fmt, s[:, :, None])
    coded = decoded(decode_pages(encode_pages(keys, head, fmt), head, fmt), head, fmt)
    query = query.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    return (query @ (coded - keys).transpose(-1, -2)).square().mean().item()


SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-44, 1e-20, 1e-5, 65504.0, 3e38]


@st.composite
def anything(draw, rows, heads):
    """[2, heads, rows, 16]: normal numbers of any size, and whole rows, channels, heads or single numbers replaced."""
    x = torch.randn(2, heads, rows, 16, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    x = x * 10.0 ** draw(st.integers(-38, 38)) + draw(st.sampled_from([0.0, 1.0, 1e4, 1e30]))
    for _ in range(draw(st.integers(0, 4))):
        where = [draw(st.integers(0, n - 1) | st.just(slice(None))) for n in x.shape]
        x[tuple(where)] = draw(st.sampled_from(SPECIAL))
    return x


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
def test_any_input_gives_usable_numbers(data, dtype):
    keys = data.draw(anything(data.draw(st.sampled_from([1, 32, 33, 100])), 2)).to(dtype)
    query = data.draw(anything(data.draw(st.sampled_from([1, 2, 40])), 4)).to(dtype)
    s = balance(keys, query)
    assert s.shape == (2, 2, 16) and s.dtype == dtype
    assert ((s >= 1 / LARGEST) & (s <= LARGEST)).all()


@pytest.mark.parametrize("rows", [1, 10, 300])
def test_it_leaves_the_scores_as_they_are(rows):
    keys, query = normal(2, 3, 100, DIM, seed=1), normal(2, 9, rows, DIM, seed=2)
    g = gain([5, 37], 16.0)
    s = balance(keys * g, query / g)
    spread = s.repeat_interleave(3, 1)[:, :, None]
    scores = [
        (q @ k.repeat_interleave(3, 1).transpose(-1, -2))
        for q, k in ((query, keys), (query / g * spread, keys * g / s[:, :, None]))
    ]
    torch.testing.assert_close(scores[1], scores[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 4, 512])
@pytest.mark.parametrize("tokens", [32, 512])
def test_where_channels_are_alike_nothing_is_lost(tokens, rows):
    """Few rows look as if there were something to gain: what the balance does to others of the kind is small."""
    keys, query = normal(1, 3, 512, DIM, seed=3), normal(1, 9, 512, DIM, seed=4)
    s = balance(keys[:, :, :tokens], query[:, :, :rows])
    assert score_error(keys, query, s) < (1.25 if rows == 1 else 1.03) * score_error(keys, query, torch.ones_like(s))


@pytest.mark.parametrize("given", [torch.zeros, torch.ones, lambda *shape: torch.full(shape, math.nan)])
def test_ones_where_there_is_nothing_to_go_by(given):
    keys, query = normal(1, 2, 64, DIM), normal(1, 4, 64, DIM)
    keys[:, 0], query[:, :2] = given(64, DIM), query[:, :2]
    s = balance(keys, query)
    assert (s[:, 0] == 1).all() and (s[:, 1] != 1).any()


@pytest.mark.parametrize("factor", [4, 64])
@pytest.mark.parametrize("tokens,rows", [(32, 1), (512, 512)])
@pytest.mark.parametrize("channels", [[0], [7, 39], [5, 9, 37, 41], list(range(8, 24))])
def test_outliers_are_found(channels, tokens, rows, factor):
    keys, query = normal(1, 2, 512, DIM, seed=5), normal(1, 6, 512, DIM, seed=6)
    g = gain(channels, float(factor))
    s = balance((keys * g)[:, :, :tokens], (query / g)[:, :, :rows])
    plain = score_error(keys, query, torch.ones_like(s))
    assert score_error(keys * g, query / g, s) < (2.0 if rows == 1 else 1.3) * plain
    assert score_error(keys * g, query / g, torch.ones_like(s)) > 1.1 * plain


def test_a_constant_in_the_keys_is_no_outlier():
    keys, query = normal(1, 2, 256, DIM, seed=7), normal(1, 4, 256, DIM, seed=8)
    torch.testing.assert_close(balance(keys + gain([31, 63], 400.0), query), balance(keys, query), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("key_factor,query_factor", [(1e-6, 1e6), (1e6, 1e-6), (1e20, 1e-20)])
def test_only_the_size_of_the_scores_matters(key_factor, query_factor):
    g = torch.logspace(-2, 2, DIM)
    keys, query = normal(1, 2, 256, DIM, seed=9) * g, normal(1, 4, 256, DIM, seed=10)
    torch.testing.assert_close(balance(keys * key_factor, query * query_factor), balance(keys, query))


def test_batch_rows_and_heads_are_on_their_own_and_useless_rows_ignored():
    keys, query = normal(2, 2, 256, DIM, seed=11) * torch.logspace(-1, 1, DIM), normal(2, 4, 50, DIM, seed=12)
    alone = torch.cat(
        [balance(keys[b : b + 1, h : h + 1], query[b : b + 1, 2 * h : 2 * h + 2]) for b in (0, 1) for h in (0, 1)]
    )
    assert torch.equal(balance(keys, query).flatten(0, 1), alone.flatten(0, 1))
    gaps = torch.stack([query, torch.full_like(query, math.nan), torch.zeros_like(query)], dim=3).flatten(2, 3)
    torch.testing.assert_close(balance(keys, gaps), balance(keys, query))
    keys[:, :, 40:64] = math.inf
    padded = keys.clone()
    padded[:, :, 40:64] = 0
    assert torch.equal(balance(keys, query), balance(padded, query))
