"""A packed tensor and the dense one it stands for go through the same ops: they stay equal, and so do all others.

A step may be refused, by an error that says what to do; then nothing may have changed.
"""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tqc.cache.packed_tensor import PackedTensor, pack, write_at
from tqc.cache.storage import Storage
from tqc.format import PackedFormat
from tqc.format.quantizer import fold

HEADS, DIM = 2, 16
FORMATS = [PackedFormat(DIM, 8, True, 4, 32), PackedFormat(DIM, 8, False, 0, 32, folded=True)]
# Of 8 bits, and of packing anew a few times; what is wrong is off by more.
TOLERANCE = 0.15
LONGEST, MOST_ROWS, MOST_TENSORS = 260, 6, 6


def tokens(rng: random.Random, batch: int, count: int) -> Tensor:
    return torch.randn(batch, HEADS, count, DIM, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))


def positions(rng: random.Random, length: int) -> Tensor:
    count = rng.randint(1, min(length, 40))
    first = rng.randint(0, length - count)
    return rng.choice([torch.arange(first, first + count), torch.randperm(length)[:count], torch.tensor([first])])


def rows(rng: random.Random, batch: int) -> Tensor:
    return torch.tensor([rng.randrange(batch) for _ in range(rng.randint(0, MOST_ROWS))], dtype=torch.int64)


def with_buffer(x: Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    module.register_buffer("cache", x)
    return module


def saved(x: Tensor) -> Any:
    file = io.BytesIO()
    torch.save(with_buffer(x).state_dict(), file)
    file.seek(0)
    return torch.load(file)


# Functions of a random choice and a shape give what is done to a tensor of this shape. Values:
VALUES: dict[str, Callable[[random.Random, torch.Size], Callable[[Tensor], Any]]] = {}
# ... views:
VIEWS: dict[str, Callable[[random.Random, torch.Size], Callable[[Tensor], Any]]] = {}
# ... and writes:
WRITES: dict[str, Callable[[random.Random, torch.Size], Callable[[Tensor], Any]]] = {}


def listed(where: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda function: where.setdefault(function.__name__, function)


@listed(VALUES)
def cat(rng: random.Random, shape: Sequence[int]) -> Any:
    new = tokens(rng, shape[0], rng.choice([0, 1, 3, 40]))
    parts = rng.choice([[new], [new, new], []])
    return lambda x: torch.cat([x, *parts], rng.choice([2, -2]))


@listed(VALUES)
def cat_with_itself(rng: random.Random, shape: Sequence[int]) -> Any:
    dim = rng.choice([0, 2, -4])
    return lambda x: torch.cat([torch.tensor([]), x, x], dim)


@listed(VALUES)
def select(rng: random.Random, shape: Sequence[int]) -> Any:
    index = rows(rng, shape[0]) if shape[0] else torch.zeros(0, dtype=torch.int64)
    kept = torch.rand(shape[0]) < 0.5
    return rng.choice(
        [
            lambda x: x.index_select(0, index),
            lambda x: x[index - x.shape[0]],
            lambda x: x[kept],
            lambda x: x.repeat(2, 1, 1, 1),
            lambda x: x.repeat_interleave(2, dim=0),
        ]
    )


@listed(VALUES)
def copied(rng: random.Random, shape: Sequence[int]) -> Any:
    return rng.choice([torch.clone, copy.deepcopy, lambda x: x.to("cpu", copy=True)])


@listed(VALUES)
def stacked(rng: random.Random, shape: Sequence[int]) -> Any:
    return lambda x: torch.stack([x, x])


@listed(VALUES)
def split_and_put_together(rng: random.Random, shape: Sequence[int]) -> Any:
    return lambda x: torch.cat(x.split(1)[::-1]) if x.shape[0] else x.clone()


@listed(VALUES)
def taken_apart_and_stacked(rng: random.Random, shape: Sequence[int]) -> Any:
    return lambda x: torch.stack([x[i][None] for i in range(x.shape[0])]).squeeze(1) if x.shape[0] else x.clone()


@listed(VALUES)
def loaded(rng: random.Random, shape: Sequence[int]) -> Any:
    return lambda x: saved(x)["cache"]


@listed(VIEWS)
def prefix(rng: random.Random, shape: Sequence[int]) -> Any:
    end = rng.randint(1, shape[2])
    return rng.choice([lambda x: x[:, :, :end], lambda x: x[..., :end, :], lambda x: x.narrow(2, 0, end)])


@listed(VIEWS)
def whole(rng: random.Random, shape: Sequence[int]) -> Any:
    return rng.choice([torch.detach, copy.copy, lambda x: x[:], lambda x: with_buffer(x).state_dict()["cache"]])


@listed(VIEWS)
def some_rows(rng: random.Random, shape: Sequence[int]) -> Any:
    first, end = sorted(rng.randint(-shape[0], shape[0]) for _ in range(2))
    return rng.choice([lambda x: x[first:end], lambda x: x.chunk(2)[-1], lambda x: x.split(1)[0]])


@listed(VIEWS)
def part(rng: random.Random, shape: Sequence[int]) -> Any:
    begin = rng.randrange(shape[2])
    return rng.choice(
        [lambda x: x[:, :, begin:], lambda x: x[:, 1], lambda x: x.transpose(1, 2), lambda x: x.unbind(2)[begin]]
    )


@listed(WRITES)
def emptied(rng: random.Random, shape: Sequence[int]) -> Any:
    return rng.choice([torch.Tensor.zero_, lambda x: x.fill_(0)])


@listed(WRITES)
def filled(rng: random.Random, shape: Sequence[int]) -> Any:
    value = rng.choice([1.0, torch.tensor(-0.5)])
    return lambda x: x.fill_(value)


@listed(WRITES)
def index_copied(rng: random.Random, shape: Sequence[int]) -> Any:
    where = positions(rng, shape[2])
    new = tokens(rng, shape[0], len(where))
    return lambda x: x.index_copy_(rng.choice([2, -2]), where, new)


@listed(WRITES)
def set_by_index(rng: random.Random, shape: Sequence[int]) -> Any:
    where = positions(rng, shape[2])
    new = tokens(rng, shape[0], len(where))
    first = int(where[0])
    index, value = rng.choice(
        [
            ((slice(None), slice(None), where), new),
            ((slice(None), slice(None), slice(first, first + 1)), new[:, :, :1]),
            ((slice(None), slice(None), slice(first, None)), 0.5),
            (..., new[:, :, :1]),
            (slice(0, 1), 1.0),
        ]
    )
    return lambda x: x.__setitem__(index, value)


@listed(WRITES)
def overwritten(rng: random.Random, shape: Sequence[int]) -> Any:
    new = tokens(rng, *shape[::2])
    new = rng.choice([new, new[:1], pack(new, FORMATS[0]), preallocated(new, shape[2] // 2, FORMATS[0])[0]])
    return rng.choice([lambda x: x.copy_(new), lambda x: with_buffer(x).load_state_dict({"cache": new.expand_as(x)})])


def preallocated(dense: Tensor, stored: int, fmt: PackedFormat) -> tuple[Tensor, Tensor]:
    """One for as many tokens as there are, of which it holds some; and what it stands for."""
    batch, _, length, _ = dense.shape
    x = PackedTensor(Storage.allocate(batch, HEADS, fmt, dense.dtype, dense.device, length), length)
    dense = torch.cat([dense[:, :, :stored], torch.zeros_like(dense[:, :, stored:])], dim=2)
    if stored:
        x.index_copy_(2, torch.arange(stored), dense[:, :, :stored])
    return x, dense


def started(rng: random.Random) -> tuple[Tensor, Tensor]:
    dense = tokens(rng, rng.choice([0, 1, 2]), rng.choice([1, 5, 36, 37, 70, 130]))
    fmt = rng.choice(FORMATS)
    if rng.random() < 0.5:
        return pack(fold(dense, fmt), fmt), dense
    return preallocated(dense, rng.randint(0, dense.shape[2]), fmt)


def check(pairs: list[tuple[Tensor, Tensor]], history: list[str]) -> None:
    for x, dense in pairs:
        assert x.shape == dense.shape and x.dtype == dense.dtype, history
        held = x.dequantize() if isinstance(x, PackedTensor) else x
        torch.testing.assert_close(held, dense, atol=TOLERANCE, rtol=0, msg=lambda text: f"{history}: {text}")


STEPS = ["start", "drop", *VALUES, *VIEWS, *WRITES]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 1 << 16), st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 1 << 16)), max_size=14))
def test_session(seed: int, steps: list[tuple[str, int]]) -> None:
    pairs = [started(random.Random(seed))]
    history: list[str] = []
    for name, choice in steps:
        rng = random.Random(choice)
        torch.manual_seed(choice)
        history.append(name)
        if name == "start" or not pairs:
            pairs.append(started(rng))
            continue
        if name == "drop":
            pairs.pop(rng.randrange(len(pairs)))
            continue
        x, dense = rng.choice(pairs)
        act = {**VALUES, **VIEWS, **WRITES}[name](rng, dense.shape)
        state = rng.getstate()
        try:
            result = act(x)
        except (NotImplementedError, RuntimeError) as refusal:  # `load_state_dict` wraps it
            assert name in WRITES and ".clone() them" in str(refusal)
            check(pairs, history)
            continue
        rng.setstate(state)
        expected = act(dense)
        check(pairs, history)
        if name not in WRITES:
            check([(result, expected)], history)
            small = expected.shape[0] <= MOST_ROWS and 0 < expected.shape[2] <= LONGEST
            if isinstance(result, PackedTensor) and small and len(pairs) < MOST_TENSORS:
                pairs.append((result, expected))
        del x, dense, result, expected


@pytest.mark.parametrize("fmt", FORMATS, ids=["keys", "values"])
def test_what_is_longer_than_what_it_holds_is_extended_behind_zeros(fmt: PackedFormat) -> None:
    rng = random.Random(0)
    dense, new = tokens(rng, 2, 300), tokens(rng, 2, 5)
    x, dense = preallocated(dense, 120, fmt)
    longer = torch.cat([x, new], 2)
    assert isinstance(longer, PackedTensor) and longer.packed_storage is not x.packed_storage
    torch.testing.assert_close(longer.dequantize(), torch.cat([dense, new], 2), atol=0.06, rtol=0)
    assert x.packed_storage.length == 120 and not x.dequantize()[:, :, 120:].any(), "exactly zero, not a code of it"


def test_a_write_spares_what_was_made_of_the_tensor_before() -> None:
    """And the other way: what is made of a prefix spares the zeros behind it."""
    rng = random.Random(0)
    x = pack(tokens(rng, 1, 100), FORMATS[0])
    longer = torch.cat([x, tokens(rng, 1, 40)], 2)
    kept = longer.dequantize()
    x.zero_()
    write_at(x, tokens(rng, 1, 3), torch.tensor([0]))
    assert torch.equal(longer.dequantize(), kept)
    roomy, _ = preallocated(tokens(rng, 1, 100), 50, FORMATS[0])
    torch.cat([roomy[:, :, :50], tokens(rng, 1, 9)], 2)
    assert not roomy.dequantize()[:, :, 50:].any()


def test_errors_are_those_of_a_dense_tensor() -> None:
    rng = random.Random(0)
    x, dense = preallocated(tokens(rng, 2, 60), 50, FORMATS[0])
    wrong: list[Callable[[Tensor], Any]] = [
        lambda t: t.index_copy_(2, torch.tensor([60]), tokens(rng, 2, 1)),
        lambda t: t.index_copy_(2, torch.tensor([3]), tokens(rng, 2, 2)),
        lambda t: t.__setitem__((slice(None), slice(None), torch.tensor([99])), 1.0),
        lambda t: t.copy_(tokens(rng, 2, 61)),
        lambda t: torch.cat([t, tokens(rng, 3, 1)], 2),
        lambda t: torch.cat([t, tokens(rng, 2, 1)[..., :8]], 2),
        lambda t: t[torch.tensor([2])],
        lambda t: t[torch.tensor([True])],
        lambda t: t.index_select(0, torch.tensor([-1])),
    ]
    for act in wrong:
        with pytest.raises(Exception) as expected:  # noqa: PT011
            act(dense)
        with pytest.raises(type(expected.value)):
            act(x)
        check([(x, dense)], [])
