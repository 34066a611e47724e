"""Where tokens lie, as the Triton provider finds them: pages that wrap, dropped tokens, few dense rows, balances."""

import math
from functools import partial

import pytest
import torch

from tests.lowering.common import DTYPES, arguments, check_attend, compare, make_store
from tqc.format import PackedFormat
from tqc.ops import planes as ops

pytest.importorskip("triton")
from tqc.lowering.triton import kernels, tuning  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")  # in the interpreter
check = partial(check_attend, kernels.attend)
PARTS = ("pages", "dense", "state")
# Tokens that came, and how many are kept, with 4 sinks and a window of 32: the first one that is held is ...
WINDOWS = [
    (150, 60),  # inside a page; the last page lies before it
    (150, 50),  # the first of a page
    (150, 51),  # the last of a page
    (150, 15),  # in the ring
    (36, 10),  # in the ring, nothing is packed
    (40, 38),  # a sink
    (150, 146),  # the first behind the sinks
    (430, 300),  # tiles behind the one that wraps
]


def windows(keep, k_bits=3, v_bits=4):
    return (PackedFormat(32, bits, centred, 4, 32, keep=keep) for bits, centred in ((k_bits, True), (v_bits, False)))


@pytest.mark.parametrize("length,keep", WINDOWS)
def test_dropped_tokens_are_not_seen(triton_device, length, keep):
    k_fmt, v_fmt = windows(keep)
    rows = 1 + length % 3
    mask = torch.rand(1, 4, rows, keep + rows, generator=torch.Generator().manual_seed(0)).to(triton_device) < 0.8
    given = arguments(k_fmt, v_fmt, length, triton_device, heads=2, rows=rows, attn_mask=mask)
    assert given["k_state"].tolist()[2] == length - keep
    check(given)
    generator = torch.Generator().manual_seed(1)
    for side, fmt in zip("kv", windows(keep), strict=True):
        tokens = torch.randn(1, 2, length, 32, generator=generator).half()
        tokens[:, :, length - keep - 1] = math.nan
        store = make_store(1, 2, 0, fmt, torch.float16)
        ops.append(*store, tokens, None, str(fmt))
        given |= {f"{side}_{part}": tensor.to(triton_device) for part, tensor in zip(PARTS, store, strict=True)}
    check(given)
    assert kernels.attend(**given)[0].isfinite().all()
    store = [given[f"k_{part}"] for part in PARTS]
    for count in (0, 1, keep, keep + 40):
        compare(kernels.read(*store, count, str(k_fmt)), ops.read(*store, count, str(k_fmt)), torch.float16)


@pytest.mark.parametrize("keep", [20, 60])
def test_appends_to_a_window(triton_device, keep):
    """Pages that wrap, pages that are dropped at once, a step back into a page, a gap."""
    fmt = PackedFormat(32, 4, True, 4, 32, keep=keep)
    ours = make_store(1, 2, 0, fmt, torch.float32, triton_device)
    theirs = make_store(1, 2, 0, fmt, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for count, step in ((3, 0), (60, 0), (33, 0), (1, -15), (40, 0), (200, 0), (1, 5)):
        new = torch.randn(1, 2, count, 32, generator=generator) + 1
        start = theirs[2][:1] + step
        ops.append(*theirs, new, start, str(fmt))
        kernels.append(*ours, new.to(triton_device), start.to(triton_device), str(fmt))
        length, _, begin = theirs[2].tolist()
        assert ours[2].tolist() == theirs[2].tolist() and begin >= length - keep
        # What was never stored stays as it was, set bits.
        assert torch.equal((ours[0] == 255).all(-1).cpu(), (theirs[0] == 255).all(-1))
        stored = [ops.read(*(part.cpu() for part in store), keep, str(fmt)) for store in (ours, theirs)]
        compare(*stored, torch.float32)


@pytest.mark.parametrize("start", [-10, 0, 200])
def test_writes_at_a_position_in_a_window(triton_device, monkeypatch, start):
    """Back, and with a gap, several programs sharing the tiles."""
    monkeypatch.setattr(tuning, "shares", lambda *_: 3)
    k_fmt, v_fmt = windows(300)
    start = torch.tensor([430 + start], device=triton_device)
    mask = torch.rand(1, 1, 1, 700, device=triton_device) < 0.8
    for attn_mask in (None, mask):
        check(arguments(k_fmt, v_fmt, 430, triton_device, start=start, attn_mask=attn_mask, is_causal=False))


def test_windows_that_disagree_give_nans(triton_device):
    given = arguments(*windows(60), 150, triton_device)
    given["v_state"] = given["v_state"] + torch.tensor([0, 0, 1], device=triton_device)
    assert kernels.attend(**given)[0].isnan().all()


@pytest.mark.parametrize("rows", [20, 23, 36])
def test_few_dense_rows(triton_device, rows):
    """Of as many tokens as there are; heads and batch rows lie closer together then."""
    k_fmt, v_fmt = windows(None)
    given = arguments(k_fmt, v_fmt, 20, triton_device, batch=2, heads=2, dtype=torch.float32)
    for side in "kv":
        given[f"{side}_dense"] = given[f"{side}_dense"][:, :, :rows].clone()
    check(given)
    for side, fmt in (("k", k_fmt), ("v", v_fmt)):
        ours, theirs = ([given[f"{side}_{part}"].clone() for part in PARTS] for _ in range(2))
        assert torch.equal(kernels.read(*ours, 22, str(fmt)), ops.read(*theirs, 22, str(fmt)))
        new = torch.randn(2, 2, rows - 20, 32, generator=torch.Generator().manual_seed(rows)).to(triton_device)
        kernels.append(*ours, new, None, str(fmt))
        ops.append(*theirs, new, None, str(fmt))
        assert torch.equal(ours[2], theirs[2]) and torch.equal(ours[1].nan_to_num(7), theirs[1].nan_to_num(7))
    lengths = torch.tensor([20, 17], dtype=torch.int32, device=triton_device)
    stored = [given[name] for name in ("query", "k_pages", "k_dense", "v_pages", "v_dense")]
    pools = [torch.zeros(1, 2, fmt.page_bytes, dtype=torch.uint8, device=triton_device) for fmt in (k_fmt, v_fmt)]
    stored[1], stored[3] = pools
    table = torch.zeros(2, 1, dtype=torch.int32, device=triton_device)
    new, specs = (given["key"], given["value"]), (given["k_spec"], given["v_spec"])
    out, _ = kernels.attend_paged(*stored, table, lengths, *new, *specs, scale=given["scale"])
    for b in range(2):
        shorter = given | {f"{side}_state": torch.tensor([int(lengths[b]), 0, 0]) for side in "kv"}
        compare(out[b], ops.attend(**{k: v.cpu() if torch.is_tensor(v) else v for k, v in shorter.items()})[0][b],
                torch.float32)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_of_any_size(triton_device, dtype):
    """Balanced tokens are as they would be with channels of one size: the error is small in all of them."""
    k_fmt, v_fmt = (PackedFormat(32, 8, True, 4, 32) for _ in range(2))
    sizes = 2.0 ** torch.linspace(-6, 6, 32)[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    given = arguments(k_fmt, v_fmt, 100, triton_device, heads=2, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for side, fmt in (("k", k_fmt), ("v", v_fmt)):
        tokens = ((torch.randn(1, 2, 100, 32, generator=generator) + 1) * sizes).to(dtype)
        store = make_store(1, 2, 100, fmt, dtype)
        fmt.head(store[1])[:, :, 1] = sizes.to(dtype)
        ours = [part.to(triton_device, copy=True) for part in store]
        ops.append(*store, tokens, None, str(fmt))
        kernels.append(*ours, tokens.to(triton_device), None, str(fmt))
        given |= {f"{side}_{part}": tensor for part, tensor in zip(PARTS, ours, strict=True)}
        error = (kernels.read(*ours, 100, str(fmt)).cpu().float() - tokens.float()) / sizes
        assert error.abs().max() < 0.1
    given["query"] = (given["query"] / sizes.to(triton_device)).to(dtype)
    check(given)
