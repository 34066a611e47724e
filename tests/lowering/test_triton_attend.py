"""Attention and reading of the Triton provider against the reference; without a GPU in Triton's interpreter."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lowering.common import (
    DTYPES,
    arguments,
    check_attend,
    check_large_scores,
    compare,
    draw_arguments,
    drawn,
    filled,
    make_store,
)
from tqc.format import PackedFormat
from tqc.ops import planes as ops

triton = pytest.importorskip("triton")
from tqc.lowering.triton import kernels, tuning  # noqa: E402

check = partial(check_attend, kernels.attend)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` gives NaNs."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def formats(k_bits, v_bits, k_dim=64, v_dim=None, k_centred=True, v_centred=False, sinks=4, keep=None):
    return (
        PackedFormat(k_dim, k_bits, k_centred, sinks, 32, keep=keep),
        PackedFormat(v_dim or k_dim, v_bits, v_centred, sinks, 32, keep=keep),
    )


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(triton_device, bits):
    check(arguments(*formats(bits, 9 - bits), 150, triton_device, dtype=DTYPES[1 + bits % 2]))


@pytest.mark.parametrize("bits", [2, 3, 7])
def test_float32_loses_nothing(triton_device, bits):
    check(arguments(*formats(bits, bits, 80, 64), 150, triton_device, rows=3, dtype=torch.float32))


@pytest.mark.parametrize("head_dim, v_head_dim", [(16, 24), (96, 96), (112, 80), (256, 128), (128, 256)])
def test_head_dims(triton_device, head_dim, v_head_dim):
    check(arguments(*formats(3, 1, head_dim, v_head_dim), 100, triton_device))


def test_both_centred_or_neither(triton_device):
    check(arguments(*formats(2, 4, k_centred=False, v_centred=True, sinks=0), 100, triton_device, rows=2))


@given(data=st.data())
@settings(drawn, max_examples=8)
def test_attend(triton_device, data):
    keep = data.draw(st.sampled_from([None, None, 20, 70]))
    k_bits, v_bits, head_dim = data.draw(st.tuples(*[st.integers(1, 4)] * 2, st.sampled_from([32, 48, 64])))
    k_fmt, v_fmt = formats(k_bits, v_bits, head_dim, v_centred=data.draw(st.booleans()), keep=keep)
    batch, heads, group = data.draw(st.sampled_from([(1, 1, 3), (2, 1, 1), (1, 2, 2)]))
    length = data.draw(st.sampled_from([0, 3, 40, 120]))
    rows = data.draw(st.sampled_from([1, 1, 2, 7, 20]))
    check(draw_arguments(data, k_fmt, v_fmt, length, rows, triton_device, batch=batch, heads=heads, group=group))


@pytest.mark.parametrize("bits", [1, 3])
def test_large_scores(triton_device, bits):
    check_large_scores(kernels.attend, bits, triton_device)


@pytest.mark.extended
def test_prefill_takes_several_blocks_of_rows(triton_device):
    check(arguments(*formats(3, 2, 32), 120, triton_device, rows=150))


@pytest.mark.parametrize("wide_mask", [False, True])
def test_shares_are_joined(triton_device, monkeypatch, wide_mask):
    monkeypatch.setattr(tuning, "shares", lambda *_: 4)
    mask = torch.rand(1, 1, 1, 600, device=triton_device) < 0.8 if wide_mask else None
    sinks = torch.tensor([0.5, -1.0], device=triton_device)
    check(arguments(*formats(4, 2, 32), 420, triton_device, attn_mask=mask, sinks=sinks, is_causal=not wide_mask))
    # One share has all there is.
    check(arguments(*formats(4, 2, 32), 3, triton_device))


@pytest.mark.parametrize("part", ["k", "v", "query"])
def test_a_vector_that_is_not_finite_spoils_its_head_alone(triton_device, part):
    k_fmt, v_fmt = formats(3, 3, 32)
    given = arguments(k_fmt, v_fmt, 100, triton_device, heads=2, dtype=torch.float32)
    if part == "query":
        given["query"][0, 2, 0, 3] = math.inf
    else:
        tokens = torch.randn(1, 2, 100, 32, generator=torch.Generator().manual_seed(0))
        tokens[0, 1, 30, 5] = math.nan
        fmt = k_fmt if part == "k" else v_fmt
        store = make_store(1, 2, 100, fmt, torch.float32)
        ops.append(*store, tokens, None, str(fmt))
        given |= {
            f"{part}_{name}": t.to(triton_device) for name, t in zip(("pages", "dense", "state"), store, strict=True)
        }
    check(given)
    out, _ = kernels.attend(**given)
    assert out[:, :2].isfinite().all() and out[0, 2].isnan().all()


def test_keys_and_values_that_disagree_give_nans(triton_device):
    given = arguments(*formats(3, 3, 32), 70, triton_device)
    given["v_state"] = given["v_state"] - torch.tensor([1, 0, 0], device=triton_device)
    with pytest.raises(ValueError, match="agree"):
        ops.attend(**given)
    assert kernels.attend(**given)[0].isnan().all()
    check(given | {"start": torch.tensor([69], device=triton_device)})


@pytest.mark.parametrize("rows", [1, 3])
def test_pages_in_any_order(triton_device, rows):
    """A ragged batch on a pool of blocks of two pages, with padding at the left."""
    k_fmt, v_fmt = formats(3, 4, 32)
    lengths, padding = [150, 3, 70], [20, 0, 5]
    stores = [
        [filled(1, 2, n, fmt, torch.float16, n + fmt.bits, capacity=192) for n in lengths] for fmt in (k_fmt, v_fmt)
    ]
    table = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:9].reshape(3, 3).int()
    pools = []
    for fmt, parts in zip((k_fmt, v_fmt), stores, strict=True):
        pool = torch.full((24, 2, fmt.page_bytes), 255, dtype=torch.uint8)
        for b, (pages, _, _) in enumerate(parts):
            for page in range(6):
                pool[2 * table[b, page // 2] + page % 2] = pages[0, :, page]
        pools.append(pool.to(triton_device))
    denses = [torch.cat([dense for _, dense, _ in parts]).to(triton_device) for parts in stores]
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(3, h, rows, 32, generator=generator).half() for h in (4, 2, 2))
    # What lies behind the packed tokens is not looked up.
    table[1] = -(2**30)
    out, lse = kernels.attend_paged(
        query.to(triton_device),
        pools[0],
        denses[0],
        pools[1],
        denses[1],
        table.to(triton_device),
        torch.tensor(lengths, dtype=torch.int32, device=triton_device),
        key.to(triton_device),
        value.to(triton_device),
        str(k_fmt),
        str(v_fmt),
        scale=0.2,
        padding=torch.tensor(padding, dtype=torch.int32, device=triton_device),
    )
    for b, length in enumerate(lengths):
        mask = (torch.arange(length + rows) >= padding[b])[None]
        one = slice(b, b + 1)
        expected, expected_lse = ops.attend(
            query[one], *stores[0][b], *stores[1][b], key[one], value[one],
            mask, None, None, 0.2, 0.0, True, str(k_fmt), str(v_fmt),
        )  # fmt: skip
        compare(out[one], expected, torch.float16)
        compare(lse[one], expected_lse, torch.float16)


@pytest.mark.parametrize("bits", range(1, 9))
def test_read(triton_device, bits):
    head_dim, dtype = (64, 80, 32)[bits % 3], DTYPES[bits % 3]
    fmt = PackedFormat(head_dim, bits, bits != 4, bits % 2 * 4, 32, rotation="haar" if bits == 5 else "hadamard")
    store = filled(1, 2, 100, fmt, dtype, device=triton_device)
    for length in (0, 2, 50, 100, 107):
        actual = kernels.read(*store, length, str(fmt))
        assert actual.dtype == dtype and actual.is_contiguous()
        compare(actual, ops.read(*store, length, str(fmt)), dtype)


def test_arguments_that_do_not_fit_are_refused(triton_device):
    given = arguments(*formats(3, 3, 32), 10, triton_device)
    with pytest.raises(ValueError, match="both be given"):
        kernels.attend(**given | {"value": None})
    with pytest.raises(TypeError, match="float16, got torch.float32"):
        kernels.attend(**given | {"query": given["query"].float()})
    with pytest.raises(ValueError, match="one sink_tokens, residual_window and keep"):
        kernels.attend(**given | {"v_spec": str(PackedFormat(32, 3, False, 4, 64))})
    with pytest.raises(ValueError, match="page_table"):
        kernels.attend_paged(
            given["query"], *[given[name] for name in ("k_pages", "k_dense", "v_pages", "v_dense")],
            torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32), None, None,
            given["k_spec"], given["v_spec"], scale=1.0,
        )  # fmt: skip
    specs = [str(fmt) for fmt in formats(3, 3, 32, keep=64)]
    with pytest.raises(ValueError, match="no keep, got .*keep64"):
        kernels.attend_paged(
            given["query"], *[given[name] for name in ("k_pages", "k_dense", "v_pages", "v_dense")],
            torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), None, None, *specs, scale=1.0,
        )  # fmt: skip
