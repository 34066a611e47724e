"""The memory behind packed tensors: how much there is for how many tokens, and what sliding windows do with it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tqc.cache.packed_tensor import PackedTensor, extend, pack
from tqc.config import PRESETS, Config
from tqc.format import PackedFormat
from tqc.format.quantizer import fold
from tqc.ops import planes

# The most that a packed cache takes over a dense one, from 8, 64 and 105 tokens on. In bfloat16 pages begin (101 tokens
# by default) where the recent tokens still are most of the cache, and those have full size as in a dense one.
LIMITS = {torch.float32: (1.14, 1.05, 1.05), torch.bfloat16: (1.14, 1.09, 1.05)}


def no_kernel(*_: Any) -> None:
    """Memory is the host's affair."""


def excess(formats: tuple[PackedFormat, ...], new: Tensor, lengths: range, step: bool, append: Any) -> dict[int, float]:
    """Bytes of keys and values over those of dense ones at each length, of one call or token by token."""
    held, result = [pack(new[:, :, :0], fmt, append) for fmt in formats], {}
    for n in lengths:
        if step:
            held = [extend(x, new[:, :, n - 1 : n], append) for x in held]
        else:
            held = [pack(new[:, :, :n], fmt, append) for fmt in formats]
        result[n] = sum(x.packed_nbytes() for x in held) / (len(formats) * new[:, :, :n].nbytes)
    return result


@pytest.mark.parametrize("step", [False, True], ids=["one call", "token by token"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "off"])
def test_a_packed_cache_hardly_takes_more_than_a_dense_one(preset: str, dtype: torch.dtype, step: bool) -> None:
    formats = Config.from_options({"preset": preset}).formats(64, 64)
    for batch in (1, 64):
        found = excess(formats, torch.zeros(batch, 1, 400, 64, dtype=dtype), range(1, 401), step, no_kernel)
        for start, limit in zip((8, 64, 105), LIMITS[dtype], strict=True):
            worst = max(range(start, 401), key=found.__getitem__)
            assert found[worst] <= limit, (batch, worst, found[worst])
        assert found[400] < (0.55 if dtype is torch.float32 else 0.75)


def test_memory_does_not_depend_on_kernels() -> None:
    formats = Config(residual_window=32).formats(64, 64)
    new = torch.randn(2, 1, 130, 64)
    assert excess(formats, new, range(1, 131), True, planes.append) == excess(
        formats, new, range(1, 131), True, no_kernel
    )


HEADS, DIM = 2, 16
TOLERANCE = 0.15  # of 8 bits, and of tokens that were packed, cut off and packed anew
WINDOWS = [
    PackedFormat(DIM, 8, True, sinks, window, keep=keep)
    for sinks, window, keep in [(4, 32, 8), (0, 32, 31), (4, 96, 50), (4, 64, 64), (4, 32, 99), (40, 32, 70)]
] + [PackedFormat(DIM, 8, False, 4, 32, folded=True, keep=99)]


class Interrupted(BaseException):
    """As KeyboardInterrupt, which is no Exception."""


class Session:
    """Packed windows, and the dense tokens that each of them stands for."""

    def __init__(self, fmt: PackedFormat, rng: random.Random) -> None:
        self.fmt, self.rng = fmt, rng
        self.pairs: list[tuple[PackedTensor, Tensor]] = []
        self.history: list[Any] = [fmt.spec]

    def tokens(self, batch: int, count: int) -> Tensor:
        return torch.randn(
            batch, HEADS, count, DIM, generator=torch.Generator().manual_seed(self.rng.randrange(1 << 30))
        )

    def start(self) -> None:
        new = self.tokens(2, self.rng.choice([1, 5, 36, 60, 130, 230]))
        self.add(pack(fold(new, self.fmt), self.fmt), new)

    def add(self, x: Any, dense: Tensor) -> None:
        assert isinstance(x, PackedTensor), self.history
        assert self.fmt.keep is not None
        self.pairs.append((x, dense[:, :, -self.fmt.keep :]))

    def extend(self) -> None:
        x, dense = self.rng.choice(self.pairs)
        for _ in range(self.rng.choice([1, 1, 3, 40])):
            new = self.tokens(x.shape[0], self.rng.choice([1, 1, 1, 7, 32, 33, 150]))
            x, dense = extend(x, fold(new, self.fmt)), torch.cat([dense, new], 2)
        self.add(x, dense)

    def interrupted(self) -> None:
        """Before or behind what the kernel does; then done again."""
        x, dense = self.rng.choice(self.pairs)
        new, behind = self.tokens(x.shape[0], self.rng.choice([1, 1, 30, 100])), self.rng.random() < 0.5

        def append(*args: Any) -> None:
            if behind:
                planes.append(*args)
            raise Interrupted

        with pytest.raises(Interrupted):
            extend(x, fold(new, self.fmt), append)
        self.check()
        self.add(extend(x, fold(new, self.fmt)), torch.cat([dense, new], 2))

    def prefix(self) -> None:
        x, dense = self.rng.choice(self.pairs)
        end = self.rng.randint(1, dense.shape[2])
        self.add(x[:, :, :end], dense[:, :, :end])

    def rows(self) -> None:
        x, dense = self.rng.choice(self.pairs)
        rows = torch.tensor([self.rng.randrange(x.shape[0]) for _ in range(2)])
        self.add(x.index_select(0, rows), dense.index_select(0, rows))

    def rows_together(self) -> None:
        x, dense = self.rng.choice(self.pairs)
        longer = [extend(each, fold(dense[:, :, -3:], self.fmt)) for each in (x, x.clone())]
        dense = torch.cat([dense, dense[:, :, -3:]], 2)
        self.add(torch.cat([each[:2] for each in longer][:: self.rng.choice([1, -1])]), torch.cat([dense[:2]] * 2))

    def drop(self) -> None:
        if len(self.pairs) > 1:
            self.pairs.pop(self.rng.randrange(len(self.pairs)))

    def check(self) -> None:
        for x, dense in self.pairs:
            assert x.shape == dense.shape, self.history
            fault = (x.dequantize() - dense).abs().max()
            assert fault < TOLERANCE, (self.history, x.shape, float(fault))
            storage = x.packed_storage
            assert [storage.length, storage.packed, storage.begin] == storage.state.tolist()
            assert storage.pages.shape[2] <= self.fmt.ring_pages


STEPS = ["start", "extend", "extend", "interrupted", "prefix", "rows", "rows_together", "drop"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(WINDOWS), st.integers(0, 1 << 16), st.lists(st.sampled_from(STEPS), min_size=1, max_size=8))
def test_windows_keep_their_own_tokens(fmt: PackedFormat, seed: int, steps: list[str]) -> None:
    session = Session(fmt, random.Random(seed))
    session.start()
    for step in steps:
        session.history.append(step)
        getattr(session, step)()
        session.check()
        session.pairs = session.pairs[-5:]


@pytest.mark.parametrize("fmt", WINDOWS, ids=str)
@pytest.mark.parametrize("count", [1, 31, 32, 33, 200])
def test_a_window_goes_on_in_place_where_its_older_tensor_can_still_be_read(fmt: PackedFormat, count: int) -> None:
    rng = random.Random(0)
    assert fmt.keep is not None
    for length in (3, 40, 100, 163, 230):
        session = Session(fmt, rng)
        new, more = session.tokens(1, length), session.tokens(1, count)
        older = pack(fold(new, fmt), fmt)
        newer = extend(older, fold(more, fmt))
        session.add(older, new)
        session.add(newer, torch.cat([new, more], 2))
        session.check()
        in_place = newer.packed_storage is older.packed_storage
        # Else a page would have to be stored for the older tensor alone.
        if fmt.keep > fmt.residual_window and count <= 32:
            assert in_place
        if count > fmt.keep + 64 and length > fmt.keep + 64:
            assert not in_place
    assert extend(newer, fold(more[:, :, :1], fmt)).packed_storage is newer.packed_storage
