"""Attention and reading of the Triton provider against the reference; without a GPU in Triton's interpreter."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tqc import ops
from tqc.format import PackedFormat

triton = pytest.importorskip("triton")
from tqc.lowering import triton as provider  # noqa: E402
from tqc.lowering.triton import tuning  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The reference rounds stored tokens to the dtype before it multiplies.
EPSILON = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

drawn = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` gives NaNs."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_store(batch, heads, length, fmt, dtype, device, seed=0, pages=None):
    """`length` tokens; what holds no token is NaN, in codes, scales and dense slots."""
    pages = fmt.packed_tokens(length) // 32 + 1 if pages is None else pages
    store = [
        torch.full((batch, heads, pages, fmt.page_bytes), 255, dtype=torch.uint8),
        torch.full((batch, heads, fmt.dense_rows, fmt.head_dim), math.nan, dtype=dtype),
        torch.zeros(2, dtype=torch.int64),
    ]
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(1, heads, 1, fmt.head_dim, generator=generator)
    tokens = torch.randn(batch, heads, length, fmt.head_dim, generator=generator) + mean
    ops.append(*store, tokens.to(dtype), None, str(fmt))
    return [part.to(device) for part in store]


def compare(actual, expected, dtype):
    """Equal up to rounding, and equal in where they are not finite."""
    actual, expected = actual.float().cpu(), expected.float().cpu()
    assert actual.shape == expected.shape
    bad = ~torch.isfinite(expected)
    assert torch.equal(bad, ~torch.isfinite(actual))
    largest = expected[~bad].abs().max().item() if (~bad).any() else 1.0
    torch.testing.assert_close(actual[~bad], expected[~bad], atol=EPSILON[dtype] * max(largest, 1.0), rtol=0)


def arguments(
    k_fmt, v_fmt, length, device, *, batch=1, heads=1, group=2, rows=1, new=None, dtype=torch.float16, **given
):
    """Of `attend`; `new`: how many new tokens, -1 for None; `given`: arguments by name."""
    generator = torch.Generator().manual_seed(length)
    new = rows if new is None else new
    key = value = None
    if new >= 0:  # one of them as a projection leaves it
        key = torch.randn(batch, new, heads, k_fmt.head_dim, generator=generator).to(device, dtype).transpose(1, 2)
        value = torch.randn(batch, heads, new, v_fmt.head_dim, generator=generator).to(device, dtype)
    result = dict(
        query=torch.randn(batch, rows, heads * group, k_fmt.head_dim, generator=generator)
        .to(device, dtype)
        .transpose(1, 2),
        **dict(
            zip(
                ("k_pages", "k_dense", "k_state"),
                make_store(batch, heads, length, k_fmt, dtype, device, 1),
                strict=True,
            )
        ),
        **dict(
            zip(
                ("v_pages", "v_dense", "v_state"),
                make_store(batch, heads, length, v_fmt, dtype, device, 2),
                strict=True,
            )
        ),
        key=key,
        value=value,
        attn_mask=None,
        sinks=None,
        start=None,
        scale=k_fmt.head_dim**-0.5,
        softcap=0.0,
        is_causal=True,
        k_spec=str(k_fmt),
        v_spec=str(v_fmt),
    )
    return {**result, **given}


def check(given):
    expected, expected_lse = ops.attend(**given)
    actual, lse = provider.attend(**given)
    dtype = given["query"].dtype
    assert actual.dtype == dtype and actual.transpose(1, 2).is_contiguous()
    compare(actual, expected, dtype)
    compare(lse, expected_lse, dtype)


def formats(k_bits, v_bits, k_dim=64, v_dim=None, k_centred=True, v_centred=False, sinks=4):
    return (
        PackedFormat(k_dim, k_bits, k_centred, sinks, 32),
        PackedFormat(v_dim or k_dim, v_bits, v_centred, sinks, 32),
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


def draw_mask(data, batch, heads, rows, columns, generator):
    kind = data.draw(st.sampled_from(["none", "none", "bool", "float", "model dtype", "wide", "all false"]))
    if kind == "none":
        return None
    if kind == "wide":
        columns += data.draw(st.integers(1, 150))
    shape = [data.draw(st.sampled_from([1, size])) for size in (batch, heads, rows)] + [columns]
    shape = shape[data.draw(st.integers(0, 3)) :]
    if kind in ("bool", "wide", "all false"):
        mask = torch.rand(shape, generator=generator) < (0.0 if kind == "all false" else 0.7)
    else:
        mask = torch.randn(shape, generator=generator).to(torch.float32 if kind == "float" else torch.bfloat16)
        mask = mask.masked_fill(torch.rand(shape, generator=generator) < 0.3, -math.inf)
    if mask.ndim >= 2 and data.draw(st.booleans()):
        mask = mask.transpose(-1, -2).contiguous().transpose(-1, -2)
    return mask


@given(data=st.data())
@settings(drawn, max_examples=12)
def test_attend(triton_device, data):
    k_fmt, v_fmt = formats(
        data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)), data.draw(st.sampled_from([32, 48, 64]))
    )
    batch, heads, group = data.draw(st.sampled_from([(1, 1, 3), (2, 1, 1), (1, 2, 2)]))
    length = data.draw(st.sampled_from([0, 3, 40, 120]))
    rows = data.draw(st.sampled_from([1, 1, 2, 7, 20]))
    new = data.draw(st.sampled_from([-1, 0, rows, rows, rows, 2 * rows + 1]))
    start = data.draw(st.sampled_from([None, None, length, max(0, length - 50), length // 2, length + 11]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    columns = (length if start is None else start) + max(new, 0)
    mask = draw_mask(data, batch, heads * group, rows, columns, generator)
    dtype = data.draw(st.sampled_from(DTYPES))
    sinks = torch.randn(heads * group, generator=generator).to(triton_device, dtype)
    check(
        arguments(
            k_fmt,
            v_fmt,
            length,
            triton_device,
            batch=batch,
            heads=heads,
            group=group,
            rows=rows,
            new=new,
            dtype=dtype,
            attn_mask=None if mask is None else mask.to(triton_device),
            sinks=data.draw(st.sampled_from([None, sinks])),
            start=None if start is None else torch.tensor([start, 77], device=triton_device),
            scale=data.draw(st.sampled_from([k_fmt.head_dim**-0.5, 0.3])),
            softcap=data.draw(st.sampled_from([0.0, 0.0, 20.0])),
            is_causal=data.draw(st.booleans()),
        )
    )


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
        store = [torch.zeros_like(given[f"{part}_{name}"]).cpu() for name in ("pages", "dense", "state")]
        ops.append(*store, tokens, None, str(fmt))
        given |= {
            f"{part}_{name}": t.to(triton_device) for name, t in zip(("pages", "dense", "state"), store, strict=True)
        }
    check(given)
    out, _ = provider.attend(**given)
    assert out[:, :2].isfinite().all() and out[0, 2].isnan().all()


def test_keys_and_values_that_disagree_give_nans(triton_device):
    given = arguments(*formats(3, 3, 32), 70, triton_device)
    given["v_state"] = given["v_state"] - torch.tensor([1, 0], device=triton_device)
    with pytest.raises(ValueError, match="agree"):
        ops.attend(**given)
    assert provider.attend(**given)[0].isnan().all()
    check(given | {"start": torch.tensor([69], device=triton_device)})


@pytest.mark.parametrize("rows", [1, 3])
def test_pages_in_any_order(triton_device, rows):
    """A ragged batch on a pool of blocks of two pages, with padding at the left."""
    k_fmt, v_fmt = formats(3, 4, 32)
    lengths, padding = [150, 3, 70], [20, 0, 5]
    stores = [
        [make_store(1, 2, n, fmt, torch.float16, "cpu", n + fmt.bits, pages=6) for n in lengths]
        for fmt in (k_fmt, v_fmt)
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
    out, lse = provider.attend_paged(
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
    store = make_store(1, 2, 100, fmt, dtype, triton_device)
    for length in (0, 2, 50, 100, 107):
        actual = provider.read(*store, length, str(fmt))
        assert actual.dtype == dtype and actual.is_contiguous()
        compare(actual, ops.read(*store, length, str(fmt)), dtype)


def test_arguments_that_do_not_fit_are_refused(triton_device):
    given = arguments(*formats(3, 3, 32), 10, triton_device)
    with pytest.raises(ValueError, match="both be given"):
        provider.attend(**given | {"value": None})
    with pytest.raises(TypeError, match="float16, got torch.float32"):
        provider.attend(**given | {"query": given["query"].float()})
    with pytest.raises(ValueError, match="one sink_tokens and residual_window"):
        provider.attend(**given | {"v_spec": str(PackedFormat(32, 3, False, 4, 64))})
    with pytest.raises(ValueError, match="page_table"):
        provider.attend_paged(
            given["query"], *[given[name] for name in ("k_pages", "k_dense", "v_pages", "v_dense")],
            torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32), None, None,
            given["k_spec"], given["v_spec"], scale=1.0,
        )  # fmt: skip


def test_accepts():
    fmt = PackedFormat(64, 4, True)
    assert provider.accepts(fmt, fmt, torch.bfloat16, "cuda") is None
    assert "cpu" in provider.accepts(fmt, fmt, torch.bfloat16, "cpu")
    assert "float64" in provider.accepts(fmt, fmt, torch.float64, "cuda")
    assert "head_dim" in provider.accepts(fmt, PackedFormat(512, 4, True), torch.float32, "cuda")
    assert "head_dim" in provider.accepts(PackedFormat(8, 4, True), fmt, torch.float32, "cuda")
    assert "residual_window" in provider.accepts(fmt, PackedFormat(64, 4, True, 4, 96), torch.float32, "cuda")


def test_without_a_gpu_it_says_so():
    assert (provider.supported() is None) == torch.cuda.is_available()
    assert torch.cuda.is_available() or "CUDA" in provider.supported()
