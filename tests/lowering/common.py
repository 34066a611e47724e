"""What tests of providers share: stored tokens, drawn arguments, and how results are compared with the reference's."""

from __future__ import annotations

import math

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tqc.format import PackedFormat
from tqc.lowering.cpu import build
from tqc.ops import planes as ops

CPU_LEVELS = [name for name, needs in build.LEVELS.items() if needs.keys() <= build.cpu_features()]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The reference rounds stored tokens to the dtype before it multiplies.
EPSILON = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

drawn = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


def make_store(batch, heads, capacity, fmt, dtype, device="cpu"):
    """No tokens: NaNs and set bits, since what was not written must not be read. The balance is drawn."""
    num_pages = -(-capacity // 32) if fmt.ring_pages is None else fmt.ring_pages
    dense = torch.full((batch, heads, fmt.dense_rows, fmt.head_dim), math.nan, dtype=dtype, device=device)
    drawn = torch.randn(batch, heads, 1, fmt.head_dim, generator=torch.Generator().manual_seed(fmt.bits)).mul(0.5).exp()
    fmt.head(dense)[:, :, 1:] = drawn.to(device, dtype)
    return [
        torch.full((batch, heads, num_pages, fmt.page_bytes), 255, dtype=torch.uint8, device=device),
        dense,
        torch.zeros(3, dtype=torch.int64, device=device),
    ]


def filled(batch, heads, length, fmt, dtype, seed=0, device="cpu", capacity=None):
    """`length` tokens with a mean, by the reference; `capacity` is one page more than they need."""
    capacity = fmt.packed_tokens(length) + 32 if capacity is None else capacity
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(1, heads, 1, fmt.head_dim, generator=generator)
    tokens = torch.randn(batch, heads, length, fmt.head_dim, generator=generator) + mean
    store = make_store(batch, heads, capacity, fmt, dtype)
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


def check_bytes(append, bits, batch, heads, count, device="cpu"):
    """Pages that `append` makes of `count` tokens are the reference's, but for rounding."""
    fmt = PackedFormat(128, bits, centred=True)
    new = torch.randn(batch, heads, count, 128, generator=torch.Generator().manual_seed(bits))
    ours = make_store(batch, heads, count, fmt, torch.float32, device)
    theirs = make_store(batch, heads, count, fmt, torch.float32)
    ops.append(*theirs, new, None, str(fmt))
    append(*ours, new.to(device), None, str(fmt))
    ours = [part.cpu() for part in ours]
    # The first page's own mean is what the head's centre leaves of it: rounding noise.
    pages = [store[0][:, :, 1 : int(theirs[2][1]) // 32] for store in (ours, theirs)]
    assert (pages[0][..., 16:] == pages[1][..., 16:]).float().mean() >= 0.999
    headers = [part[..., :8].contiguous().view(torch.float32) for part in pages]
    assert torch.isclose(*headers, rtol=1e-4).float().mean() >= 0.98
    decoded = [ops.read(*store, count, str(fmt)) for store in (ours, theirs)]
    assert (decoded[0] - decoded[1]).norm() <= 5e-3 * decoded[1].norm()


def arguments(
    k_fmt, v_fmt, length, device="cpu", *, batch=1, heads=1, group=2, rows=1, new=None, dtype=torch.float16, **given
):
    """Of `attend`; `new`: how many new tokens, -1 for None; `given`: arguments by name."""
    generator = torch.Generator().manual_seed(length)
    new = rows if new is None else new
    key = value = None
    if new >= 0:  # one of them as a projection leaves it
        key = torch.randn(batch, new, heads, k_fmt.head_dim, generator=generator).to(device, dtype).transpose(1, 2)
        value = torch.randn(batch, heads, new, v_fmt.head_dim, generator=generator).to(device, dtype)
    query = torch.randn(batch, rows, heads * group, k_fmt.head_dim, generator=generator).to(device, dtype)
    k, v = (filled(batch, heads, length, fmt, dtype, seed, device) for seed, fmt in ((1, k_fmt), (2, v_fmt)))
    result = dict(
        query=query.transpose(1, 2),
        **dict(zip(("k_pages", "k_dense", "k_state"), k, strict=True)),
        **dict(zip(("v_pages", "v_dense", "v_state"), v, strict=True)),
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


def draw_keep(data, length, sink_tokens):
    """How many of `length` tokens are held: all, or those behind one of the sinks, of a page, of the recent ones."""
    page = sink_tokens + 32 * data.draw(st.integers(0, length // 32))
    begin = data.draw(st.sampled_from([None, None, 2, page, page + 7, length - 20, length - 1]))
    return None if begin is None else max(1, length - begin)


MASKS = ("none", "none", "bool", "float", "model dtype", "wide", "all false")


def draw_mask(data, batch, heads, rows, columns, generator, kinds=MASKS):
    kind = data.draw(st.sampled_from(kinds))
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


def draw_arguments(data, k_fmt, v_fmt, length, rows, device="cpu", *, batch, heads, group, dtypes=DTYPES, masks=MASKS):
    """Of `attend`: everything that formats and sizes leave open."""
    dtype = data.draw(st.sampled_from(dtypes))
    new = data.draw(st.sampled_from([-1, 0, rows, rows, rows, 2 * rows + 1]))
    begin = k_fmt.first_held(length)
    back = [max(begin, position) for position in (length - 50, length // 2)]
    start = data.draw(st.sampled_from([None, None, length, *back, length + 11]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    columns = (length if start is None else start) - begin + max(new, 0)
    mask = draw_mask(data, batch, heads * group, rows, columns, generator, masks)
    sinks = torch.randn(heads * group, generator=generator).to(device, dtype)
    return arguments(
        k_fmt,
        v_fmt,
        length,
        device,
        batch=batch,
        heads=heads,
        group=group,
        rows=rows,
        new=new,
        dtype=dtype,
        attn_mask=None if mask is None else mask.to(device),
        sinks=data.draw(st.sampled_from([None, sinks])),
        start=None if start is None else torch.tensor([start, 77], device=device),
        scale=data.draw(st.sampled_from([k_fmt.head_dim**-0.5, 0.3, -0.2])),
        softcap=data.draw(st.sampled_from([0.0, 0.0, 20.0])),
        is_causal=data.draw(st.booleans()),
    )


def check_attend(attend, given):
    expected, expected_lse = ops.attend(**given)
    actual, lse = attend(*given.values())
    dtype = given["query"].dtype
    assert actual.dtype == dtype and actual.transpose(1, 2).is_contiguous()
    compare(actual, expected, dtype)
    compare(lse, expected_lse, dtype)


def check_large_scores(attend, bits, device="cpu"):
    """Scores that deviate by more than ten nats, where corrections for coding errors decide; negative factors."""
    for scale in (0.3, -0.3):
        k_fmt, v_fmt = PackedFormat(64, bits, True), PackedFormat(64, bits, False)
        given = arguments(k_fmt, v_fmt, 300, device, heads=2, group=3, rows=2, dtype=torch.float32, scale=scale)
        given["query"] = 5 * given["query"]
        check_attend(attend, given)


def check_int8(int8, plain, exact):
    """Outputs by int8 products add at most 5 % to the error of the format, which is that of `plain` ones."""
    packing = (plain - exact).square().sum()
    assert (int8 - exact).square().sum() - packing <= 0.05 * packing
    # Where errors of both kinds happen to cancel, the difference alone must be small too.
    assert (int8 - plain).square().sum() <= 0.1 * packing
