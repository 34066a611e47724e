"""Quantize and append of the Triton provider against the reference, on a GPU or in Triton's interpreter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lowering.common import DTYPES, EPSILON, check_bytes, drawn, make_store
from tqc.format import PackedFormat
from tqc.ops import planes as ops

pytest.importorskip("triton")
from tqc.lowering.triton.append import append, append_pair  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:invalid value")  # NaNs, in the interpreter


formats = st.builds(
    PackedFormat,
    head_dim=st.sampled_from([8, 64, 72, 80, 96, 112, 128, 256]),
    bits=st.integers(1, 8),
    centred=st.booleans(),
    sink_tokens=st.sampled_from([0, 3, 4, 20]),
    residual_window=st.sampled_from([32, 64]),
    rotation=st.sampled_from(["hadamard", "hadamard", "haar"]),
    seed=st.integers(0, 1),
    keep=st.sampled_from([None, None, 20, 90, 150]),
)


def with_rows(dense, rows, fmt):
    """`dense` with at least so many rows, as a storage's grows: full as soon as something will be packed."""
    if rows <= dense.shape[2]:
        return dense
    batch, heads, old, _ = dense.shape
    larger = make_store(batch, heads, 0, fmt, dense.dtype, dense.device)[1][:, :, :rows].clone()
    larger[:, :, :old] = dense
    return larger


def assert_same(ours, theirs, fmt):
    """Equal state, equal dense rows, and pages that decode alike."""
    ours = [part.cpu() for part in ours]
    assert torch.equal(ours[2], theirs[2])
    length, _, begin = ours[2].tolist()
    dtype = theirs[1].dtype
    tolerance = EPSILON[dtype]
    centre, expected = ours[1].float(), theirs[1].float()
    scale = expected.nan_to_num(0, 0, 0).abs().max().item()
    torch.testing.assert_close(centre, expected, atol=tolerance * max(scale, 1.0), rtol=0, equal_nan=True)
    a, b = (ops.read(*store, length - begin, str(fmt)).float() for store in (ours, theirs))
    assert torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    # A value on the boundary between two levels may get another code; codes make up for another page centre.
    assert (a - b).norm() <= 2 * tolerance * max(b.norm().item(), 1.0) + 0.05 * fmt.head_dim**-0.5 * b.norm()
    empty = (theirs[0] == 255).all(-1)
    assert (ours[0][empty] == 255).all()
    if not empty.all():
        codes = fmt.planes[0][2]
        pages, expected = ours[0][~empty], theirs[0][~empty]
        assert (pages[:, codes:] == expected[:, codes:]).float().mean() >= (0.998 if dtype is torch.float32 else 0.9)
        gap = slice(fmt.centre_offset + fmt.head_dim // 2 * fmt.centred, codes)
        assert not pages[:, gap].any() and not pages[:, 8:16].any()


@given(data=st.data())
@settings(drawn, max_examples=10)
def test_append_stores_what_the_reference_stores(triton_device, data):
    fmt = data.draw(formats)
    dtype = data.draw(st.sampled_from(DTYPES))
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    ours = make_store(batch, heads, 800, fmt, dtype, triton_device)
    theirs = make_store(batch, heads, 800, fmt, dtype)
    if data.draw(st.booleans()):
        ours[1], theirs[1] = ours[1][:, :, :1].contiguous(), theirs[1][:, :, :1].contiguous()
    for _ in range(data.draw(st.integers(1, 4))):
        count = data.draw(st.sampled_from([0, 1, 1, 5, 31, 64, 110]))
        new = torch.randn(batch, heads, count, fmt.head_dim, generator=generator) * 3 + 1
        if count and data.draw(st.booleans()):
            new[:, :, data.draw(st.integers(0, count - 1))] = data.draw(st.sampled_from([0.0, math.nan, math.inf, 1e4]))
        new = new.to(dtype)
        if data.draw(st.booleans()):
            new = new.transpose(1, 2).contiguous().transpose(1, 2)
        length, _, begin = theirs[2].tolist()
        back = max(begin, data.draw(st.sampled_from([length - 40, length // 2])))
        start = data.draw(st.sampled_from([None, length, back, length + 7, length + 90]))
        rows = fmt.rows_for((length if start is None else start) + count)
        ours[1], theirs[1] = with_rows(ours[1], rows, fmt), with_rows(theirs[1], rows, fmt)
        start = None if start is None else torch.tensor([start, 123])
        ops.append(*theirs, new, start, str(fmt))
        append(*ours, new.to(triton_device), None if start is None else start.to(triton_device), str(fmt))
        assert_same(ours, theirs, fmt)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pages_are_the_references_bytes(triton_device, bits):
    check_bytes(append, bits, 1, 1, 220, triton_device)


@given(data=st.data())
@settings(drawn, max_examples=4)
def test_how_tokens_are_split_over_calls_leaves_no_trace(triton_device, data):
    fmt = PackedFormat(data.draw(st.sampled_from([64, 80])), 3, data.draw(st.booleans()), residual_window=32)
    dtype = data.draw(st.sampled_from(DTYPES))
    cuts = sorted(data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=4)))
    tokens = torch.randn(1, 2, 150, fmt.head_dim, generator=torch.Generator().manual_seed(len(cuts))).to(dtype)
    tokens = tokens.to(triton_device)
    whole, parts = (make_store(1, 2, 150, fmt, dtype, triton_device) for _ in range(2))
    append(*whole, tokens, None, str(fmt))
    for begin, end in zip([0, *cuts], [*cuts, 150], strict=True):
        append(*parts, tokens[:, :, begin:end], None, str(fmt))
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[2], parts[2])
    assert torch.equal(whole[1].view(torch.uint8), parts[1].view(torch.uint8))


@pytest.mark.parametrize("counts", [(1, 60, 1, 1), (150, 1)])
def test_keys_and_values_at_once(triton_device, counts):
    generator = torch.Generator().manual_seed(0)
    k_fmt, v_fmt = PackedFormat(64, 4, True), PackedFormat(80, 2, False, residual_window=32)
    k, v = (make_store(2, 2, 200, fmt, torch.bfloat16, triton_device) for fmt in (k_fmt, v_fmt))
    alone = [[part.clone() for part in store] for store in (k, v)]
    for count in counts:
        key = torch.randn(2, count, 2, 64, generator=generator).bfloat16().transpose(1, 2).to(triton_device)
        value = torch.randn(2, 2, count, 80, generator=generator).bfloat16().to(triton_device)
        append_pair(*k, key, *v, value, None, str(k_fmt), str(v_fmt))
        append(*alone[0], key, None, str(k_fmt))
        append(*alone[1], value, None, str(v_fmt))
    for ours, theirs in zip([*k, *v], [*alone[0], *alone[1]], strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_arguments_that_do_not_fit_are_refused(triton_device):
    fmt = PackedFormat(64, 3, True)
    store = make_store(1, 2, 64, fmt, torch.float32, triton_device)
    new = torch.zeros(1, 2, 1, 64, device=triton_device)
    with pytest.raises(ValueError, match="does not fit"):
        append(*store, new[:, :1], None, str(fmt))
    with pytest.raises(ValueError, match="dtype"):
        append(*store, new.half(), None, str(fmt))
    with pytest.raises(ValueError, match="spec"):
        append(*store, new, None, str(PackedFormat(128, 3, True)))
    with pytest.raises(ValueError, match="contiguous"):
        append(torch.cat([store[0]] * 2, dim=2)[:, :, ::2], *store[1:], new, None, str(fmt))
    with pytest.raises(ValueError, match="same tokens"):
        append_pair(*store, new, *store, new[:, :, :0], None, str(fmt), str(fmt))
    with pytest.raises(ValueError, match="does not fit"):
        append(store[0], torch.zeros(1, 2, fmt.dense_rows + 1, 64, device=triton_device), store[2], new, None, str(fmt))
    assert store[2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("part,room,message", [(0, 2, "pages are full"), (1, 20, "dense is too small")])
def test_what_has_no_room_is_not_written(triton_device, part, room, message):
    """The number of stored tokens is on the device: nothing can be raised, but no other memory may be hit."""
    fmt = PackedFormat(64, 2, True, sink_tokens=0, residual_window=32)
    store = make_store(1, 1, 300, fmt, torch.float32, triton_device)
    memory = torch.full_like(store[part].repeat(1, 1, 10, 1), 77)
    if part == 1:
        memory[:, :, fmt.token_rows + 1 : fmt.dense_rows] = 1
    store[part] = memory[:, :, :room]
    before = memory.clone()
    tokens = torch.randn(1, 1, 300, 64, generator=torch.Generator().manual_seed(0)).to(triton_device)
    try:
        append(*store, tokens, None, str(fmt))
    except Exception as error:  # the interpreter checks what the device leaves unchecked
        assert message in str(error)
    assert torch.equal(memory[:, :, room:], before[:, :, room:])
