"""Packed caches in ops of MLX against the reference in torch: the same bytes, the same attention."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("mlx_lm", reason="needs mlx and mlx-lm")

import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

from tests.test_format import GOLDEN, golden_cases, golden_format, golden_head  # noqa: E402
from tqc import ops  # noqa: E402
from tqc.format import PackedFormat, quantizer  # noqa: E402
from tqc.format import balance as reference_balance  # noqa: E402
from tqc.mlx_trace import codec  # noqa: E402
from tqc.mlx_trace.arrays import array_of, tensor_of  # noqa: E402
from tqc.mlx_trace.attention import attend  # noqa: E402
from tqc.mlx_trace.balance import balance  # noqa: E402
from tqc.mlx_trace.packed import Call, Packed, append, cut, read, settle  # noqa: E402
from tqc.mlx_trace.placement import Placement  # noqa: E402
from tqc.ops.value import Planes  # noqa: E402


@pytest.mark.parametrize("case", [case for case in golden_cases() if not golden_format(case).folded])
def test_golden_pages(case: str) -> None:
    fmt, parts = golden_format(case), load_file(GOLDEN / "pages.safetensors")
    head, tokens = golden_head(parts, case, fmt), parts[f"{case}.tokens"]
    y = codec.decode_pages(array_of(parts[f"{case}.pages"]), array_of(head), fmt)
    expected = quantizer.decode_pages(parts[f"{case}.pages"], head, fmt)
    assert torch.allclose(tensor_of(y), expected, atol=1e-5, equal_nan=True)
    pages = tensor_of(codec.encode_pages(array_of(tokens), array_of(head), fmt))
    # A code falls the other way where sums are rounded in another order.
    assert (pages != quantizer.encode_pages(tokens, head, fmt)).float().mean() < 0.015


def test_the_balance_of_keys_is_the_references() -> None:
    torch.manual_seed(0)
    keys = torch.randn(2, 2, 120, 16) * torch.linspace(0.1, 5, 16) ** 2
    keys[0, 0, 3] = torch.nan
    query = torch.randn(2, 4, 70, 16)
    expected = reference_balance.balance(keys, query)
    assert (expected != 1).any()
    assert torch.allclose(tensor_of(balance(array_of(keys), array_of(query))), expected, rtol=1e-4)


class Twins:
    """A cache of MLX and the reference's, which are told the same."""

    def __init__(self, fmt: PackedFormat, heads: int = 2) -> None:
        self.fmt, self.heads = fmt, heads
        self.placement = Placement.empty(fmt)
        self.ours = Packed.empty(1, heads, fmt, array_of(torch.zeros(1)).dtype)
        self.own = Planes.empty(1, heads, fmt, torch.float32, "cpu", 0)

    def stepped(self, count: int) -> Packed:
        self.ours = self.ours.with_pages(self.placement.behind(count).pages())
        return replace(self.ours, step=Call.plain(self.placement, count).step(self.ours.num_pages))

    def extend(self, new: Tensor, query: Tensor | None = None) -> None:
        ours = append(self.stepped(new.shape[2]), array_of(new), None if query is None else array_of(query))
        call = Call.plain(self.placement, new.shape[2])
        self.ours, self.placement = settle(ours, call), self.placement.behind(new.shape[2])
        self.own = ops.extend(self.own, new, query)

    def cut(self, length: int) -> None:
        self.own = ops.rewind(self.own, length - self.placement.begin)
        self.ours, self.placement = cut(self.ours, self.placement, length)

    def share(self) -> None:
        """Take the reference's bytes, so that no code differs."""
        if self.own.dense.shape[2] == self.fmt.dense_rows:
            self.ours = Packed(self.fmt, array_of(self.own.pages), array_of(self.own.dense))

    def check(self) -> None:
        numbers = [self.placement.length, self.placement.packed, self.placement.begin]
        assert numbers == self.own.state.tolist()
        expected = ops.read(self.own)
        held = tensor_of(read(self.ours, self.placement))
        assert held.shape == expected.shape
        # Nearly all tokens alike; where a code falls the other way, its whole token does by the scale.
        wrong = ((held - expected).abs() > 1e-3).any(-1).sum()
        assert wrong <= max(3, 0.02 * held[..., 0].numel()), wrong


FORMATS = [
    PackedFormat(16, 4, True, 4, 32),
    PackedFormat(16, 2, False, 4, 64),
    PackedFormat(24, 3, True, 0, 32, keep=50),
    PackedFormat(16, 8, False, 4, 32, keep=100),
]


@settings(max_examples=12, deadline=None)
@given(
    fmt=st.sampled_from(FORMATS),
    calls=st.lists(st.one_of(st.integers(1, 3), st.integers(20, 150)), min_size=1, max_size=6),
    back=st.lists(st.integers(0, 90), max_size=2),
)
def test_a_session_holds_what_the_reference_holds(fmt: PackedFormat, calls: list[int], back: list[int]) -> None:
    torch.manual_seed(0)
    twins = Twins(fmt)
    for index, count in enumerate(calls):
        tokens = torch.randn(1, 2, count, fmt.head_dim) * torch.linspace(0.2, 3, fmt.head_dim)
        twins.extend(tokens, torch.randn(1, 4, count, fmt.head_dim) if fmt.centred else None)
        twins.check()
        if index < len(back):
            twins.cut(max(twins.placement.begin, twins.placement.length - back[index]))
            twins.check()


@pytest.mark.parametrize("tile", [1 << 10, 1 << 22])
@pytest.mark.parametrize("softcap, sunk", [(0.0, False), (0.0, True), (5.0, False)])
@pytest.mark.parametrize("keep, window", [(None, None), (None, 40), (90, 91)])
def test_attention_is_the_references(
    tile: int, softcap: float, sunk: bool, keep: int | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tqc.mlx_trace.attention.TILE_ELEMENTS", tile)
    torch.manual_seed(0)
    k, v = Twins(PackedFormat(16, 4, True, 4, 32, keep=keep)), Twins(PackedFormat(16, 3, False, 4, 32, keep=keep))
    sinks = torch.randn(4) if sunk else None
    for count in (0, 3, 30, 150, 1, 5):
        held = k.placement.held
        query, key, value = (torch.randn(1, heads, 7, 16) * 2 for heads in (4, 2, 2))
        columns, rows = torch.arange(held + 7), held + torch.arange(7)[:, None]
        mask = (columns <= rows) & (columns > rows - (window or 10**6))
        expected = ops.attend(query, k.own, v.own, key, value, attn_mask=mask, sinks=sinks, scale=0.3, softcap=softcap)
        arrays = [array_of(x) for x in (query, key, value)]
        how = {"scale": 0.3, "softcap": softcap, "window": window}
        if softcap and sunk:
            continue
        given_sinks = None if sinks is None else array_of(sinks)
        made = attend(arrays[0], k.stepped(7), v.stepped(7), *arrays[1:], given_sinks, **how)
        assert torch.allclose(tensor_of(made), expected, atol=1e-4), (count, held)
        if count:
            new = torch.randn(2, 1, 2, count, 16) * 2
            k.extend(new[0], torch.randn(1, 4, count, 16))
            v.extend(new[1])
            k.share()
            v.share()
