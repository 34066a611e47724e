"""Whether correcting the scores of packed tokens brings attention nearer to that of the keys as they came."""

import pytest
import torch
import torch.nn.functional as F

from tests.common import normal
from tqc.format import PackedFormat
from tqc.format.quantizer import decode_pages, decoded, encode_pages, head_rows
from tqc.ops.planes import correction

SCALE, TOKENS, PACKED = 0.125, 512, 256


def divergences(query, keys, bits):
    """Mean KL to the weights of `keys`, in nats, where the older half of them is packed: as they are, corrected, and
    with half the score's nominal variance added."""
    fmt = PackedFormat(64, bits, True)
    head = head_rows(keys[:, :, :32], fmt)
    pages = encode_pages(keys, head, fmt)
    coded = decoded(decode_pages(pages, head, fmt), head, fmt)
    exact, scores = ((query @ k.transpose(-1, -2) * SCALE).double() for k in (keys, coded))
    residual = keys - keys.unflatten(2, (-1, 32)).mean(3, keepdim=True).expand(-1, -1, -1, 32, -1).flatten(2, 3)
    energy = (query * SCALE).square().sum(-1)[..., None]
    half = 0.5 * fmt.score_stretch * energy * residual.square().mean(-1)[:, :, None]
    exact, scores = exact.float(), torch.cat([scores.float()[..., :PACKED], exact.float()[..., PACKED:]], dim=-1)
    added = (torch.zeros_like(scores), correction(query, pages, head, SCALE, fmt), half)
    added = [F.pad(a[..., :PACKED], (0, TOKENS - PACKED)) for a in added]
    log_p = exact.log_softmax(-1)
    return [(log_p.exp() * (log_p - (scores + a).log_softmax(-1))).sum(-1).mean().item() for a in added]


def drawn(size, aligned=0.2):
    """Queries that look for some of the keys, whose scores deviate by about `size`."""
    keys = normal(1, 2, TOKENS, 64, seed=1)
    query = normal(1, 2, 100, 64, seed=2) + aligned * keys[:, :, ::5][:, :, :100]
    return query * size, keys


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("size", [0.5, 1.0])
def test_it_helps_where_queries_look_for_keys(bits, size):
    none, corrected, _ = divergences(*drawn(size, aligned=0.6), bits)
    assert corrected < 0.98 * none


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("size", [0.5, 1.0, 2.0, 4.0])
def test_it_costs_next_to_nothing_where_they_do_not(bits, size):
    none, corrected, _ = divergences(*drawn(size), bits)
    assert corrected < 1.05 * none


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("factor", [4, 16, 64])
def test_large_keys_where_the_query_does_not_look_are_left_alone(bits, factor):
    """K times and Q over `factor` in four channels: the scores are the same, and half the variance of an error spread
    evenly is far too much."""
    query, keys = drawn(1.5)
    gain = torch.ones(64)
    gain[[5, 9, 37, 41]] = factor
    none, corrected, half = divergences(query / gain, keys * gain, bits)
    assert corrected <= 1.1 * none
    if factor == 64:
        assert half > 2 * none


@pytest.mark.parametrize("bits", [2, 4])
def test_keys_with_a_bias_are_corrected_as_without(bits):
    query, keys = drawn(1.5)
    bias = torch.zeros(64)
    bias[[31, 63]] = 400.0
    plain, biased = divergences(query, keys, bits), divergences(query, keys + bias, bits)
    assert biased[1] <= 1.05 * biased[0] and biased[1] < 1.2 * plain[1]
