"""Sliding windows of fixed size: what is copied back over a preallocated tensor is packed, in place, page by page."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.common import compiled, error
from tqc.cache import preallocated
from tqc.cache.packed_tensor import PackedTensor, pack
from tqc.cache.storage import Storage
from tqc.cache.views import family, hold
from tqc.format import PackedFormat
from tqc.ops.library import ops as library
from tqc.passes.plan import DENSE, FUSE, PACK

WINDOW, HEADS, QUERY_HEADS, HEAD_DIM = 60, 2, 4, 16


class Window(torch.nn.Module):
    """One attention and its window: written by index until it is full, then rolled, or cut and concatenated."""

    def __init__(self, length: int = WINDOW) -> None:
        super().__init__()
        self.length, self.seen = length, 0
        self.keys = torch.zeros(1, HEADS, length, HEAD_DIM)
        self.values = torch.zeros(1, HEADS, length, HEAD_DIM)

    def update(self, cache: Tensor, new: Tensor, positions: Tensor) -> Tensor:
        seen, count = self.seen, new.shape[2]
        if seen + count <= self.length:
            return cache.index_copy_(2, positions, new)
        if seen >= self.length and count == 1:
            rolled = cache.roll(-1, dims=-2)
            rolled[:, :, torch.tensor([-1])] = new
            cache.copy_(rolled)
            return cache
        full = new
        if seen:
            past = cache[:, :, 1:] if seen >= self.length else cache[:, :, :seen, :]
            full = torch.cat([past, new], dim=-2)
        cache.copy_(full[:, :, -self.length :])
        return full

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen, count = self.seen, k.shape[2]
        rows = torch.arange(count) + seen
        keys, values = self.update(self.keys, k, rows), self.update(self.values, v, rows)
        self.seen = seen + count
        columns = torch.arange(keys.shape[2]) + max(0, seen - self.length + 1)
        mask = (columns <= rows[:, None]) & (columns > rows[:, None] - self.length)
        return F.scaled_dot_product_attention(q, keys, values, mask[None, None], scale=0.25, enable_gqa=True)

    def reset(self) -> None:
        self.keys.zero_()
        self.values.zero_()
        self.seen = 0


def tokens(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(1, h, count, HEAD_DIM, generator=generator) for h in (QUERY_HEADS, HEADS, HEADS))  # type: ignore[return-value]


def both(ours: Any, theirs: Window, counts: list[int], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for count in counts:
        new = tokens(generator, count)
        assert error(ours(*new), theirs(*new)) < 0.06, (theirs.seen, count)


def test_every_form_is_packed_and_stays_in_place() -> None:
    ours, theirs = Window(), Window()
    keys = ours.keys
    with compiled(ours) as (run, plans):
        # Written by index, becoming full, chunks, single tokens; round and round its three pages.
        both(run, theirs, [40, 5, 30, 25, 1, 1, 29, 32, 33, 50, 70, 1])
        storage = ours.keys.packed_storage
        both(run, theirs, [1] * 8)
        assert ours.keys.packed_storage is storage, "a token copies the window"
        assert storage.pages.shape[2] == storage.fmt.ring_pages
        assert storage.fmt.keep == WINDOW and ours.keys.begin == theirs.seen - WINDOW
        assert error(ours.keys.dequantize(), theirs.keys) < 0.06
        ours.reset(), theirs.reset()
        assert not ours.keys.dequantize().any()
        both(run, theirs, [90, 1])  # a prompt longer than the window, into the packed one
        ours.reset(), theirs.reset()
        both(run, theirs, [20, 1, 45])
    assert {plan.sites[0].action for plan in plans} == {PACK, FUSE}
    assert ours.keys is keys, "the caller's own tensor object is the packed one"


@pytest.mark.parametrize("counts", [[90, 1, 7], [60, 1], [30, 50, 1]])
def test_a_window_that_was_filled_before_is_packed(counts: list[int]) -> None:
    """By calls that were not compiled: dense until then."""
    ours, theirs = Window(), Window()
    both(ours, theirs, counts)
    with compiled(ours) as (run, plans):
        both(run, theirs, [1, 3, 1])
    assert [plan.sites[0].action for plan in plans] == [PACK, FUSE, FUSE]
    assert error(ours.keys.dequantize(), theirs.keys) < 0.06


class ReadTwice(Window):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = self.keys[:, :, 1:].sum()
        return super().forward(q, k, v) + before


class Scaled(Window):
    """What is kept is not what attention reads."""

    def update(self, cache: Tensor, new: Tensor, positions: Tensor) -> Tensor:
        full = torch.cat([cache[:, :, 1:], new], dim=-2)
        cache.copy_(full[:, :, -self.length :] * 2)
        return full


class RolledTooFar(Window):
    def update(self, cache: Tensor, new: Tensor, positions: Tensor) -> Tensor:
        rolled = cache.roll(-2, dims=-2)
        rolled[:, :, -1:] = new
        return cache.copy_(rolled)


@pytest.mark.parametrize("kind", [ReadTwice, Scaled, RolledTooFar])
def test_others_stay_right(kind: type[Window]) -> None:
    ours, theirs = kind(), kind()
    for window in (ours, theirs):
        window.seen = WINDOW
        window.keys.copy_(torch.randn(window.keys.shape, generator=torch.Generator().manual_seed(1)))
    with compiled(ours) as (run, plans):
        both(run, theirs, [1, 1])
    assert all(plan.sites[0].action == DENSE and plan.sites[0].reason for plan in plans)
    assert not isinstance(ours.keys, PackedTensor)


FORMATS = [PackedFormat(HEAD_DIM, 8, True, sinks, 32) for sinks in (0, 4)] + [PackedFormat(HEAD_DIM, 8, False, 4, 64)]


@settings(max_examples=25, deadline=None)
@given(
    fmt=st.sampled_from(FORMATS),
    seed=st.integers(0, 1 << 16),
    steps=st.lists(st.sampled_from(["slide", "slide", "slide", "reset", "index", "fork", "rows", "cat"]), max_size=10),
)
def test_windows_and_their_copies_keep_their_own_tokens(fmt: PackedFormat, seed: int, steps: list[str]) -> None:
    """Any order of uses is that of dense tensors of the same size."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *options: options[int(torch.randint(len(options), (), generator=generator))]  # noqa: E731

    def new(count: int) -> Tensor:
        return torch.randn(2, HEADS, count, HEAD_DIM, generator=generator)

    dense = new(WINDOW)
    pairs = [(PackedTensor(Storage.holding(dense, fmt, WINDOW, library.append), WINDOW), dense)]
    for step in ["slide", *steps]:
        x, dense = draw(*pairs)
        if step == "slide":
            count = draw(1, 1, 7, 32, 40, 100)
            begin = min(count, draw(0, 1, 1, 5))
            more = new(count)
            storage = preallocated.window(x, begin, WINDOW, WINDOW, count)
            storage.append(more, count, None, library.append)
            hold(family(x), storage)
            dense.copy_(torch.cat([dense[:, :, begin:], more], 2)[:, :, -WINDOW:])
        elif step == "reset":
            x.zero_(), dense.zero_()
        elif step == "index":
            at = WINDOW - draw(1, 7)
            more = new(WINDOW - at)
            x[:, :, at:], dense[:, :, at:] = more, more
        elif step == "fork":
            pairs.append((x.clone(), dense.clone()))
        elif step == "rows":
            rows = torch.tensor([1, draw(0, 1)])
            pairs.append((x.index_select(0, rows), dense.index_select(0, rows)))
        elif x.fmt.keep:
            more = new(draw(1, 20))
            longer = torch.cat([x, more], 2)
            assert isinstance(longer, PackedTensor)
            assert (longer.dequantize() - torch.cat([dense, more], 2)).abs().max() < 0.15
            last = longer[:, :, -WINDOW:]
            assert isinstance(last, PackedTensor)
            pairs.append((last, torch.cat([dense, more], 2)[:, :, -WINDOW:].clone()))
            del longer
        pairs = pairs[-4:]
        for x, dense in pairs:
            assert (x.dequantize() - dense).abs().max() < 0.15, step


def test_a_window_that_grows_past_its_pages_says_so(caplog: pytest.LogCaptureFixture) -> None:
    dense, more = torch.randn(1, HEADS, 200, HEAD_DIM), torch.randn(1, HEADS, 90, HEAD_DIM)
    x = pack(dense, PackedFormat(HEAD_DIM, 8, True, 4, 32, keep=WINDOW))
    with caplog.at_level(logging.WARNING):
        longer = torch.cat([x, more], 2)
    assert not isinstance(longer, PackedTensor) and "dense" in caplog.text
    assert (longer - torch.cat([dense[:, :, -WINDOW:], more], 2)).abs().max() < 0.1
