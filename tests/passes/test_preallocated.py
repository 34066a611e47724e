"""Hand-written caches of full length: the caller's tensor becomes packed where that loses nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.passes.common import compiled, error
from tqc.cache.packed_tensor import PackedTensor
from tqc.passes.plan import DENSE, FUSE, PACK

CAPACITY = 128
HEADS, QUERY_HEADS, HEAD_DIM = 2, 4, 16


class Attention(torch.nn.Module):
    """Attention with registered buffers for its cache, and a mask by position."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(1, HEADS, CAPACITY, HEAD_DIM))
        self.register_buffer("causal", torch.tril(torch.ones(CAPACITY, CAPACITY, dtype=torch.bool)))

    def write(self, cache: Tensor, positions: Tensor, new: Tensor) -> None:
        cache[:, :, positions] = new

    def mask(self, positions: Tensor) -> Tensor:
        return self.causal[None, None, positions]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        self.write(self.k_cache, positions, k)
        self.write(self.v_cache, positions, v)
        return F.scaled_dot_product_attention(
            q, self.k_cache, self.v_cache, self.mask(positions), scale=0.25, enable_gqa=True
        )


class WithIndexCopy(Attention):
    def write(self, cache: Tensor, positions: Tensor, new: Tensor) -> None:
        cache.index_copy_(2, positions, new)


class WithFloatMask(Attention):
    def mask(self, positions: Tensor) -> Tensor:
        return torch.where(super().mask(positions), 0.0, torch.finfo(torch.float32).min)


class Ring(Attention):
    """Every slot is visible once it has been written: going round must not drop what lies behind."""

    def mask(self, positions: Tensor) -> Tensor:
        return (self.k_cache.abs().sum((1, 3)) > 0)[:, None, None]


class RingByMask(Attention):
    """Positions wrap outside of the graph; the mask lets every slot be seen."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        self.write(self.k_cache, positions, k)
        self.write(self.v_cache, positions, v)
        return F.scaled_dot_product_attention(q, self.k_cache, self.v_cache, mask, enable_gqa=True)


class WrittenTwice(Attention):
    def write(self, cache: Tensor, positions: Tensor, new: Tensor) -> None:
        cache[:, :, positions] = new
        cache[:, :, :1] = 0.0


class WithoutMask(Attention):
    def mask(self, positions: Tensor) -> None:
        return None


class ReadElsewhere(Attention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        return super().forward(q, k, v, positions) + self.k_cache.mean()


def steps(cuts: tuple[int, ...] = (0, 80, 81, 82, 90, 91)) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int) -> Tensor:
        return torch.randn(1, heads, cuts[-1], HEAD_DIM, generator=generator)

    q, k, v = normal(QUERY_HEADS), normal(HEADS), normal(HEADS)
    pairs = zip(cuts, cuts[1:], strict=False)
    return [(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], torch.arange(a, b)) for a, b in pairs]


def run(kind: type[Attention], calls: list[tuple[Tensor, ...]]) -> Any:
    """Outputs dense and compiled, the compiled module's caches against the dense one's, and the plans."""
    slow, fast_module = kind(), kind()
    with torch.no_grad():
        expected = [slow(*call) for call in calls]
    with compiled(fast_module) as (fast, plans):
        actual = [fast(*call) for call in calls]
    return expected, actual, slow, fast_module, plans


@pytest.mark.parametrize("kind", [Attention, WithIndexCopy, WithFloatMask])
def test_the_buffer_becomes_packed(kind: type[Attention]) -> None:
    expected, actual, slow, module, plans = run(kind, steps())
    assert [plan.sites[0].action for plan in plans] == [PACK] + [FUSE] * (len(plans) - 1) and len(plans) > 1
    for a, b in zip(actual, expected, strict=True):
        assert error(a, b) < 0.02
    for name in ("k_cache", "v_cache"):
        buffer = module.get_buffer(name)
        assert isinstance(buffer, PackedTensor) and buffer.packed_nbytes() < 0.8 * getattr(slow, name).nbytes
        assert error(buffer.dequantize(), getattr(slow, name)) < 0.05


def test_going_back_drops_what_lies_behind() -> None:
    """A second prompt over the first one's remains: the causal mask hides these, as in a dense cache."""
    expected, actual, _, module, _ = run(Attention, [*steps(), *steps((0, 30, 31))])
    for a, b in zip(actual, expected, strict=True):
        assert error(a, b) < 0.02
    assert module.k_cache.packed_storage.length == 31


def ring_calls() -> list[tuple[Tensor, ...]]:
    calls = [(*call, torch.zeros(1, 1, 1, CAPACITY, dtype=torch.bool)) for call in steps((0, 100, 101, 102))]
    for *_, positions, mask in calls:
        mask[..., : int(positions[-1]) + 1] = True
    q, k, v, _, _ = calls[1]
    return [*calls, (2 * q, -k, -v, torch.tensor([3]), calls[-1][-1])]


def test_a_ring_buffer_keeps_what_is_still_visible() -> None:
    expected, actual, slow, module, _ = run(RingByMask, ring_calls())
    for a, b in zip(actual, expected, strict=True):
        assert error(a, b) < 0.05
    keys = module.k_cache.dequantize() if isinstance(module.k_cache, PackedTensor) else module.k_cache
    assert error(keys, slow.k_cache) < 0.05


@pytest.mark.parametrize(
    "kind, reason",
    [
        (WrittenTwice, "written more than once"),
        (WithoutMask, "without a mask"),
        (ReadElsewhere, "also read by"),
        (Ring, "also read by"),
    ],
)
def test_what_is_not_understood_stays_dense(kind: type[Attention], reason: str) -> None:
    expected, actual, slow, module, plans = run(kind, steps((0, 40, 41, 42)))
    for plan in plans:
        assert plan.sites[0].action == DENSE and reason in plan.sites[0].reason
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(module.k_cache, slow.k_cache)


def test_a_view_of_the_callers_memory_stays_dense() -> None:
    """Turned into a packed tensor, a view would leave its base behind."""
    both = torch.zeros(2, 1, HEADS, CAPACITY, HEAD_DIM)

    class Views(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.k_cache, self.v_cache = both[0], both[1]

    with compiled(Views()) as (fast, _):
        for call in steps((0, 40, 41)):
            fast(*call)
    assert float(both[:, :, :, 40].abs().sum()) > 0


def slices(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, start: int) -> Tensor:
    stop = start + k.shape[2]
    k_cache[:, :, start:stop] = k
    v_cache[:, :, start:stop] = v
    return F.scaled_dot_product_attention(q, k_cache[:, :, :stop], v_cache[:, :, :stop], enable_gqa=True)


def test_slice_assignment() -> None:
    theirs = [torch.zeros(1, HEADS, CAPACITY, HEAD_DIM) for _ in range(2)]
    ours = [cache.clone() for cache in theirs]
    for cache in (theirs, ours):
        for tensor, seed in zip(cache, (0, 1), strict=True):
            tensor[:, :, :80] = torch.randn(1, HEADS, 80, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    with compiled(slices) as (fast, plans):
        for q, k, v, positions in steps((0, 80, 81, 82, 83))[1:]:
            expected = slices(q, k, v, *theirs, int(positions[0]))
            assert error(fast(q, k, v, *ours, int(positions[0])), expected) < 0.02
    assert plans[-1].sites[0].action == FUSE
    assert all(isinstance(cache, PackedTensor) for cache in ours)
    assert error(ours[0].dequantize(), theirs[0]) < 0.05
