"""The byte layout: planes, offsets, spec strings, and files that must decode the same for ever."""

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from tqc.cache.packed_tensor import extend, pack
from tqc.config import Config
from tqc.format import (
    ALIGNMENT,
    HEADER_BYTES,
    PAGE_TOKENS,
    SCALE_NAN,
    SCALE_ZERO,
    PackedFormat,
    codebook,
    pack_plane,
    scale_table,
    unpack_plane,
)
from tqc.format.quantizer import decode_pages, encode_pages, unrotate

GOLDEN = Path(__file__).parent / "golden"
PLANE_WIDTHS = (1, 2, 4, 8)


@given(
    width=st.sampled_from(PLANE_WIDTHS),
    shape=st.lists(st.integers(0, 4), max_size=3),
    head_dim=st.integers(1, 40).map(lambda n: 8 * n),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_plane_round_trip(width, shape, head_dim, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2**width, (*shape, head_dim), generator=generator, dtype=torch.uint8)
    packed = pack_plane(values, width)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape, head_dim * width // 8)
    assert torch.equal(unpack_plane(packed, width), values)


@pytest.mark.parametrize("width", PLANE_WIDTHS)
def test_element_e_is_field_e_div_stride_of_byte_e_mod_stride(width):
    head_dim = 24
    stride = head_dim * width // 8
    for element in range(head_dim):
        values = torch.zeros(head_dim, dtype=torch.uint8)
        values[element] = 2**width - 1
        expected = torch.zeros(stride, dtype=torch.uint8)
        expected[element % stride] = (2**width - 1) << (width * (element // stride))
        assert torch.equal(pack_plane(values, width), expected)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("centred", [False, True])
def test_parts_of_a_page_are_aligned_and_disjoint(head_dim, bits, centred):
    fmt = PackedFormat(head_dim, bits, centred)
    assert fmt.scales_offset == HEADER_BYTES and fmt.centre_offset == HEADER_BYTES + PAGE_TOKENS
    end = fmt.centre_offset + (head_dim // 2 if centred else 0)
    for width, shift, offset in fmt.planes:
        assert offset % ALIGNMENT == 0 and 0 <= offset - end < ALIGNMENT
        assert shift == sum(other for other, _, _ in fmt.planes if other > width)
        end = offset + PAGE_TOKENS * head_dim * width // 8
    assert sum(width for width, _, _ in fmt.planes) == bits
    assert fmt.page_bytes % ALIGNMENT == 0 and 0 <= fmt.page_bytes - end < ALIGNMENT


@pytest.mark.parametrize(
    "head_dim, bits, centred, page_bytes",
    [(64, 4, True, 1104), (64, 3, False, 816), (128, 4, True, 2160), (128, 2, False, 1072), (64, 1, True, 336)],
)
def test_page_bytes(head_dim, bits, centred, page_bytes):
    assert PackedFormat(head_dim, bits, centred).page_bytes == page_bytes


FORMATS = st.builds(
    PackedFormat,
    head_dim=st.integers(1, 64).map(lambda n: 8 * n),
    bits=st.integers(1, 8),
    centred=st.booleans(),
    sink_tokens=st.integers(0, 100),
    residual_window=st.integers(1, 16).map(lambda n: 32 * n),
    rotation=st.sampled_from(["hadamard", "haar"]),
    seed=st.integers(0, 2**64 - 1),
    folded=st.booleans(),
)


@given(FORMATS)
def test_spec_string_round_trip(fmt):
    assert PackedFormat.parse(str(fmt)) == fmt


def test_spec_string_is_stable():
    assert str(PackedFormat(64, 3, True)) == "tq2:d64:b3:centred:s4:w64:hadamard:0"
    assert str(PackedFormat(128, 8, False, 0, 32, "haar", 9)) == "tq2:d128:b8:plain:s0:w32:haar:9"
    assert str(PackedFormat(64, 3, False, folded=True)) == "tq2:d64:b3:plain:s4:w64:hadamard:0:folded"
    assert str(PackedFormat(64, 3, False, folded=True, keep=511)) == "tq2:d64:b3:plain:s4:w64:hadamard:0:keep511:folded"


@pytest.mark.parametrize(
    "spec, message",
    [
        ("tq1:d64:b3:centred:s4:w64:hadamard:0", "version 2"),
        ("", "version 2"),
        ("tq2", "malformed"),
        ("tq2:d64:b3:plain:s4:w64:hadamard:0:keep", "malformed"),
        ("tq2:d64:b3:plain:s4:w64:hadamard:0:folded:keep8", "malformed"),
        ("tq2:d64:b3:plain:s4:w64:hadamard:0:keep0", "keep must be between 1 and"),
        ("tq2:d64:b3:centred:s4:w64:hadamard", "malformed"),
        ("tq2:d64:b3:centred:s4:w64:hadamard:0:0", "malformed"),
        ("tq2:d64:b3:plain:s4:w64:hadamard:0:fold", "malformed"),
        ("tq2:d64:b3:plain:s4:w64:hadamard:0:folded:folded", "malformed"),
        ("tq2:d64:b3:plain:s4:w64:hadamard:folded", "malformed"),
        ("tq2:64:b3:centred:s4:w64:hadamard:0", "malformed"),
        ("tq2:d64:b3:central:s4:w64:hadamard:0", "malformed"),
        ("tq2:d:b3:centred:s4:w64:hadamard:0", "malformed"),
        ("tq2:d64::centred:s4:w64:hadamard:0", "malformed"),
        ("tq2:d64:b3:centred:s4:w64:hadamard:x", "malformed"),
        ("tq2:d60:b3:centred:s4:w64:hadamard:0", "head_dim must be a multiple of 8, got 60"),
        ("tq2:d64:b9:centred:s4:w64:hadamard:0", "bits must be between 1 and 8, got 9"),
        ("tq2:d64:b3:centred:s4:w64:fourier:0", "rotation must be one of hadamard, haar; got 'fourier'"),
    ],
)
def test_malformed_specs_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        PackedFormat.parse(spec)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"head_dim": 0}, "head_dim must be a multiple of 8, got 0"),
        ({"head_dim": -8}, "head_dim must be a multiple of 8, got -8"),
        ({"head_dim": 100}, "head_dim must be a multiple of 8, got 100"),
        ({"bits": 0}, "bits must be between 1 and 8, got 0"),
        ({"sink_tokens": -1}, "sink_tokens must be at least 0, got -1"),
        ({"residual_window": 0}, "residual_window must be a positive multiple of 32, got 0"),
        ({"residual_window": 48}, "residual_window must be a positive multiple of 32, got 48"),
        ({"rotation": "dct"}, "rotation must be one of hadamard, haar; got 'dct'"),
        ({"seed": -1}, r"seed must be between 0 and 2\*\*64 - 1, got -1"),
    ],
)
def test_errors_name_argument_and_value(change, message):
    with pytest.raises(ValueError, match=message):
        PackedFormat(**{"head_dim": 64, "bits": 4, "centred": True} | change)


@given(length=st.integers(0, 2000), fmt=FORMATS)
def test_packed_tokens_leave_at_most_a_window(length, fmt):
    packed = fmt.packed_tokens(length)
    dense = max(0, length - fmt.sink_tokens) - packed
    assert packed % PAGE_TOKENS == 0 and packed >= 0
    assert dense <= fmt.residual_window
    if packed:
        assert dense > fmt.residual_window - PAGE_TOKENS
    assert fmt.packed_tokens(length, packed + PAGE_TOKENS) == packed + PAGE_TOKENS


def test_scale_table():
    table = scale_table()
    assert table.shape == (256,) and table[0] == 1.0 and table[32] == 0.5 and table[224] == 2**-7
    assert table[1] == pytest.approx(2 ** (-1 / 32), rel=1e-7)
    assert table[SCALE_NAN].isnan() and table[SCALE_ZERO] == 0.0


def golden_cases():
    return json.loads((GOLDEN / "pages.json").read_text())


def golden_format(case):
    """Pages have the same bytes in version 1, which had no balance."""
    return PackedFormat.parse(golden_cases()[case].replace("tq1", "tq2", 1))


def golden_head(parts, case, fmt):
    centre = parts[f"{case}.centre"].unsqueeze(2)
    return torch.cat([centre, torch.ones_like(centre)], dim=2)[:, :, : fmt.head_rows]


@pytest.mark.parametrize("case", golden_cases())
def test_golden_pages_decode_the_same_for_ever(case):
    """Pages that version 1 wrote. A failure means that files in the field would read differently: never regenerate."""
    fmt = golden_format(case)
    parts = load_file(GOLDEN / "pages.safetensors")
    pages, expected = (parts[f"{case}.{name}"] for name in ("pages", "decoded"))
    decoded = unrotate(decode_pages(pages, golden_head(parts, case, fmt), fmt), fmt)
    assert torch.allclose(decoded, expected, rtol=1e-5, atol=1e-5 * expected.nan_to_num().abs().max(), equal_nan=True)


@pytest.mark.parametrize("case", golden_cases())
def test_golden_vectors_are_encoded_no_worse(case):
    """What a writer chooses may change within a version, for the better."""
    fmt = golden_format(case)
    parts = load_file(GOLDEN / "pages.safetensors")
    tokens, head = parts[f"{case}.tokens"], golden_head(parts, case, fmt)
    pages = encode_pages(tokens, head, fmt)
    assert pages.shape == parts[f"{case}.pages"].shape
    decoded = unrotate(decode_pages(pages, head, fmt), fmt)
    error, golden_error = ((x - tokens).nan_to_num().square().sum() for x in (decoded, parts[f"{case}.decoded"]))
    assert error <= golden_error * 1.001


def decode_token_by_the_document(page, token, fmt, centre):
    """docs/format.md in pure Python: the rotated vector of one token of a page."""
    head_dim = fmt.head_dim
    base, step = struct.unpack("<ff", page[:8])
    scale = base * 2.0 ** (-page[16 + token] / 32)

    def field(offset, width, element):
        stride = head_dim * width // 8
        return page[offset + element % stride] >> (width * (element // stride)) & (2**width - 1)

    offset, shift, codes = 48 + (head_dim // 2 if fmt.centred else 0), 0, [0] * head_dim
    for width in (8, 4, 2, 1):
        if fmt.bits & width:
            offset = -(-offset // 16) * 16
            for element in range(head_dim):
                codes[element] |= field(offset + token * head_dim * width // 8, width, element) << shift
            shift += width
            offset += 32 * head_dim * width // 8
    levels = codebook.levels(head_dim, fmt.bits).tolist()
    y = [scale * levels[code] for code in codes]
    if fmt.centred:
        y = [y[e] + centre[e] + (field(48, 4, e) - 8) * step for e in range(head_dim)]
    return y


@pytest.mark.parametrize("case", golden_cases())
def test_pages_are_as_documented(case):
    fmt = golden_format(case)
    parts = load_file(GOLDEN / "pages.safetensors")
    pages, centre = parts[f"{case}.pages"], parts[f"{case}.centre"]
    decoded = decode_pages(pages, golden_head(parts, case, fmt), fmt)[0, 0]
    for token in (0, 13, 31, 32, 39, 63):
        page = bytes(pages[0, 0, token // 32].tolist())
        expected = decode_token_by_the_document(page, token % 32, fmt, centre[0, 0].tolist())
        assert decoded[token].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_worked_example_of_the_document():
    text = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    rows = re.findall(r"^ *\d+  ((?:[0-9a-f]{2} ){15}[0-9a-f]{2})", text, flags=re.MULTILINE)
    page = bytes.fromhex(" ".join(rows))
    parts = load_file(GOLDEN / "pages.safetensors")
    assert page == bytes(parts["worked_example.pages"][0, 0, 1].tolist())
    fmt = golden_format("worked_example")
    y = decode_token_by_the_document(page, 3, fmt, parts["worked_example.centre"][0, 0].tolist())
    x = unrotate(torch.tensor(y), fmt)
    for vector in (y, x.tolist(), parts["worked_example.tokens"][0, 0, 35].tolist()):
        assert ", ".join(f"{value:.3f}" for value in vector) in text


def test_sizes_in_the_document():
    text = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    for head_dim in (64, 128):
        for bits in range(1, 9):
            sizes = [PackedFormat(head_dim, bits, centred).page_bytes for centred in (True, False)]
            row = " | ".join(f"{size:,} | {size / 4 / head_dim:.4f}" for size in sizes)
            assert f"| {head_dim} | {bits} | {row} |" in text


def test_all_in_bits_and_rows_in_the_document():
    text = (Path(__file__).parent.parent / "docs" / "format.md").read_text()
    formats = Config().formats(64, 64)
    new = torch.zeros(1, 1, 4096, 64, dtype=torch.bfloat16)
    held = [pack(new[:, :, :3000], fmt, lambda *parts: None) for fmt in formats]
    for at in range(3000, 4096):
        held = [extend(x, new[:, :, at : at + 1], lambda *parts: None) for x in held]
    bits = 8 * sum(x.packed_nbytes() - 24 for x in held) / (2 * 4096 * 64)
    pages, rows = ([getattr(x, part).shape[2] for x in held] for part in ("pages", "dense"))
    assert pages == [125, 125] and rows == [102, 100]
    assert f"8 * (125 * (848 + 816) + (102 + 100) * 128) / (2 * 4096 * 64) = {bits:.2f} bits" in " ".join(text.split())


def decode_by_the_document(state, pages, dense, fmt):
    """docs/format.md in plain Python: the tokens of one head of an unfolded cache file."""
    s, w = fmt.sink_tokens, fmt.residual_window
    length, packed, begin = state
    first = max(0, begin - s) // 32
    centre, balance = dense[s + w : s + w + 2] if packed and fmt.centred else ([0.0] * fmt.head_dim, 1.0)
    for t in range(begin, length):
        if s <= t < s + packed:
            page, token = divmod(t - s, 32)
            y = decode_token_by_the_document(bytes(pages[page - first]), token, fmt, centre)
            yield unrotate(torch.tensor(y), fmt) * torch.tensor(balance)
        else:
            yield torch.tensor(dense[t if t < s else s + (t - s) % w])


@pytest.mark.parametrize("name", ["0.keys", "0.values", "1.keys", "1.values", "2.keys", "2.values", "3.keys"])
def test_cache_files_are_as_documented(name):
    with safe_open(GOLDEN / "cache_v2.safetensors", framework="pt") as file:
        layer, part = name.split(".")
        spec = json.loads(file.metadata()["cache"])["layers"][int(layer)][part]["spec"]
        pages, dense, state = (file.get_tensor(f"layers.{name}.{part}") for part in ("pages", "dense", "state"))
    expected = load_file(GOLDEN / "cache_v2_values.safetensors")[name][0]
    for head in range(2):
        found = decode_by_the_document(
            state.tolist(), pages[0, head].tolist(), dense[0, head].float().tolist(), PackedFormat.parse(spec)
        )
        found = torch.stack(list(found)).bfloat16()
        torch.testing.assert_close(found, expected[head], rtol=2**-7, atol=1e-5)
