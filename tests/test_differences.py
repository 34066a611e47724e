"""Closed-loop differences: what is stored is enough, errors do not add up, and a page takes no worse prediction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqc.format import PackedFormat
from tqc.format.differences import Difference, Differences


def states(steps: int, moved: float, seed: int, heads: int = 2, tokens: int = 64, head_dim: int = 32) -> list:
    generator = torch.Generator().manual_seed(seed)
    now = torch.randn(1, heads, tokens, head_dim, generator=generator)
    found = []
    for _ in range(steps):
        found.append(now)
        now = now + moved * torch.randn(now.shape, generator=generator)
    return found


def through(coder: Differences, sequence: list) -> list:
    """What a reader that gets bytes alone makes of the sequence."""
    sent, mine = [], []
    for state in sequence:
        sent.append(coder.write(state, mine))
        mine = [coder.read(sent[-1], mine), *mine][: coder.order]
    found, held = [], []
    for stored in sent:
        copy = Difference(*(torch.tensor(x.tolist(), dtype=torch.uint8) for x in (stored.pages, stored.orders)))
        found.append(coder.read(copy, held))
        held = [found[-1], *held][: coder.order]
    return found


def errors(found: list, wanted: list) -> list[float]:
    return [float((a - b).square().mean() / b.square().mean()) for a, b in zip(found, wanted, strict=True)]


@settings(max_examples=15, deadline=None)
@given(
    bits=st.sampled_from([2, 4]),
    order=st.sampled_from([1, 2]),
    moved=st.sampled_from([0.0, 0.03, 1.0]),
    seed=st.integers(0, 99),
)
def test_a_reader_of_the_bytes_alone_is_never_worse_off_than_without_differences(bits, order, moved, seed):
    wanted = states(6, moved, seed)
    fmt = PackedFormat(32, bits, centred=False)
    plain = errors(through(Differences(fmt, 0), wanted), wanted)
    found = errors(through(Differences(fmt, order), wanted), wanted)
    assert all(a <= 1.05 * b for a, b in zip(found, plain, strict=True))
    if moved < 0.1:  # each step codes a small rest, so that the error shrinks with it
        assert found[-1] < 0.2 * plain[-1]


def test_delta2_follows_a_steady_move_and_delta_a_stop():
    first, step = (torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    wanted = [first + number * step for number in range(6)]
    fmt = PackedFormat(32, 4, centred=False)
    one, two = (errors(through(Differences(fmt, order), wanted), wanted)[-1] for order in (1, 2))
    assert two < 0.2 * one


def test_each_page_chooses_its_own_prediction():
    fmt = PackedFormat(32, 4, centred=False)
    coder = Differences(fmt)
    before, other = states(1, 0.0, 0)[0], states(1, 0.0, 1)[0]
    now = torch.cat([before[:, :, :32], other[:, :, 32:]], 2)
    assert coder.write(now, [before]).orders.tolist() == [[[1, 0], [1, 0]]]


def test_bad_input_is_named():
    fmt = PackedFormat(32, 4, centred=False)
    with pytest.raises(ValueError, match="order must be 0 to 2, got 3"):
        Differences(fmt, 3)
    with pytest.raises(ValueError, match="fmt must be plain"):
        Differences(PackedFormat(32, 4, centred=True))
    with pytest.raises(ValueError, match="multiple of 32"):
        Differences(fmt).write(torch.zeros(1, 1, 31, 32))
    with pytest.raises(ValueError, match="shape of those before"):
        Differences(fmt).write(torch.zeros(1, 1, 32, 32), [torch.zeros(1, 2, 32, 32)])
