"""Encoding and decoding of pages: error, robustness, independence of chunks, bounded memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tqc.format import PAGE_TOKENS, SCALE_NAN, SCALE_ZERO, PackedFormat, codebook, quantizer
from tqc.format.quantizer import decode_pages, encode_pages, head_rows, rotate, unrotate


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def roundtrip(x, fmt):
    head = head_rows(x[:, :, :PAGE_TOKENS], fmt)
    return unrotate(decode_pages(encode_pages(x, head, fmt), head, fmt), fmt)


def nmse(decoded, x):
    x = x.double()
    return ((decoded.double() - x).square().sum() / x.square().sum()).item()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("head_dim, rotation", [(64, "hadamard"), (128, "hadamard"), (96, "hadamard"), (80, "haar")])
def test_error_of_gaussian_vectors_is_at_most_that_of_the_codebook(bits, head_dim, rotation):
    x = normal(1, 2, 1024, head_dim)
    error = nmse(roundtrip(x, PackedFormat(head_dim, bits, False, rotation=rotation)), x)
    # The scale is stored to 1/32 of an octave, which shows at 7 and 8 bits; one fitted to the vector can gain a fifth.
    ratio = error / codebook.distortion(head_dim, bits)
    assert 0.75 < ratio < (1.03 if bits < 7 else 1.1)


@pytest.mark.parametrize("bits", [2, 4])
def test_spiky_vectors_are_no_worse_than_gaussian_ones(bits):
    x = normal(1, 1, 512, 64) * 0.1
    x[..., 5] += 30 * normal(1, 1, 512, seed=1)
    assert nmse(roundtrip(x, PackedFormat(64, bits, False)), x) < 1.5 * codebook.distortion(64, bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("offset", [0.0, 1.0, 30.0, 1e3])
def test_constant_channels_do_not_hurt_centred_keys(bits, offset):
    """Large key biases (Qwen2.5): a code without a centre would spend all its levels on the constant."""
    x = normal(2, 2, 512, 64)
    biased = x.clone()
    biased[..., [3, 17, 31, 63]] += offset * torch.tensor([1.0, -1.0, 0.5, 0.8])
    error = ((roundtrip(biased, PackedFormat(64, bits, True)) - biased).square().mean()).item()
    assert error < 1.15 * codebook.distortion(64, bits)
    if offset >= 30:
        plain = ((roundtrip(biased, PackedFormat(64, bits, False)) - biased).square().mean()).item()
        assert plain > 10 * error


def test_centre_of_the_page_follows_a_drifting_constant():
    drift = torch.linspace(-200, 200, 1024).reshape(1, 1, -1, 1)
    x = normal(1, 1, 1024, 64)
    x[..., :2] += drift
    error = (roundtrip(x, PackedFormat(64, 4, True)) - x).square().mean()
    assert error < 0.15
    assert (roundtrip(x, PackedFormat(64, 4, False)) - x).square().mean() > 2 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e-4, 1.0, 1e4, 1e12, 1e30])
@pytest.mark.parametrize("centred", [False, True])
def test_any_magnitude(magnitude, dtype, centred):
    x = (normal(1, 1, 128, 64) * magnitude).to(dtype)
    decoded = roundtrip(x, PackedFormat(64, 4, centred))
    assert torch.isfinite(decoded).all()
    # Scaled down first: squares of 1e-30 vanish and those of 1e30 overflow.
    assert nmse(decoded.double() / magnitude, x.double() / magnitude) < 0.011


def test_float16_near_its_limit():
    x = (60000.0 + 100 * normal(1, 1, 96, 64)).half()
    assert rotate(x, PackedFormat(64, 4, True)).abs().max() > 65504
    for centred in (False, True):
        decoded = roundtrip(x, PackedFormat(64, 4, centred))
        assert torch.isfinite(decoded).all()
        assert nmse(decoded, x) < (1e-4 if centred else 0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_codes_as_float32_does(dtype):
    x = normal(1, 2, 128, 64).to(dtype)
    fmt = PackedFormat(64, 4, True)
    head = head_rows(x[:, :, :PAGE_TOKENS], fmt)
    assert head.dtype == dtype
    assert torch.equal(encode_pages(x, head, fmt), encode_pages(x.float(), head.float(), fmt))


def test_zero_vectors_read_back_as_zeros():
    x = normal(1, 1, 64, 64)
    x[:, :, 7] = 0.0
    x[:, :, 32:] = 0.0
    fmt = PackedFormat(64, 4, False)
    decoded = roundtrip(x, fmt)
    assert (decoded[:, :, 7] == 0).all() and (decoded[:, :, 32:] == 0).all()
    page = encode_pages(x, head_rows(torch.zeros(1, 1, 32, 64), fmt), fmt)
    assert page[0, 0, 0, fmt.scales_offset + 7] == SCALE_ZERO
    assert (roundtrip(torch.zeros(1, 1, 64, 64), PackedFormat(64, 4, True)) == 0).all()


def test_equal_vectors_read_back_exactly_when_centred():
    x = normal(1, 1, 1, 64).expand(1, 1, 64, 64).contiguous()
    assert torch.allclose(roundtrip(x, PackedFormat(64, 1, True)), x, atol=1e-5)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_vector_that_is_not_finite_harms_no_other(centred, value):
    x = normal(1, 2, 96, 64)
    clean, broken = x.clone(), x.clone()
    broken[0, 0, 40, 3] = value
    clean[0, 0, 40] = 0.0
    fmt = PackedFormat(64, 4, centred)
    decoded = roundtrip(broken, fmt)
    assert decoded[0, 0, 40].isnan().all()
    others = torch.ones(2, 96, dtype=torch.bool)
    others[0, 40] = False
    assert torch.isfinite(decoded[0][others]).all()
    assert nmse(decoded[0][others], x[0][others]) < 0.011
    # Other pages are not touched at all.
    assert torch.equal(decoded[:, :, 64:], roundtrip(clean, fmt)[:, :, 64:])


def test_a_page_of_nothing_finite():
    x = torch.full((1, 1, 64, 64), float("nan"))
    x[:, :, 32:] = normal(1, 1, 32, 64)
    for centred in (False, True):
        decoded = roundtrip(x, PackedFormat(64, 3, centred))
        assert decoded[:, :, :32].isnan().all() and torch.isfinite(decoded[:, :, 32:]).all()


def test_overflow_of_the_rotation_stays_in_its_vector():
    x = normal(1, 1, 32, 64)
    x[:, :, 9] = 3e38
    fmt = PackedFormat(64, 4, False)
    page = encode_pages(x, head_rows(torch.zeros(1, 1, 32, 64), fmt), fmt)
    scales = page[0, 0, 0, fmt.scales_offset : fmt.scales_offset + PAGE_TOKENS]
    assert scales[9] == SCALE_NAN and (scales != SCALE_NAN).sum() == 31
    decoded = roundtrip(x, fmt)
    assert (
        nmse(torch.cat([decoded[:, :, :9], decoded[:, :, 10:]], 2), torch.cat([x[:, :, :9], x[:, :, 10:]], 2)) < 0.011
    )


def test_short_vectors_beside_a_long_one_err_by_a_small_part_of_it():
    x = normal(1, 1, 32, 64) * torch.logspace(-6, 0, 32).unsqueeze(-1)
    error = (roundtrip(x, PackedFormat(64, 4, False)) - x).norm(dim=-1)
    assert (error <= x.norm(dim=-1) * 0.12 + x.norm(dim=-1).max() / 230).all()


@pytest.mark.parametrize("centred", [False, True])
def test_encoding_by_pages_equals_encoding_at_once(centred, monkeypatch):
    x = normal(2, 3, 320, 64)
    fmt = PackedFormat(64, 3, centred)
    head = head_rows(x[:, :, :PAGE_TOKENS], fmt)
    whole = encode_pages(x, head, fmt)
    assert whole.shape == (2, 3, 10, fmt.page_bytes)
    parts = [encode_pages(part, head, fmt) for part in x.split(PAGE_TOKENS, dim=2)]
    assert torch.equal(torch.cat(parts, dim=2), whole)
    monkeypatch.setattr(quantizer, "_CHUNK_ELEMENTS", 1)
    assert torch.equal(encode_pages(x, head, fmt), whole)


def test_encoding_ignores_strides():
    x = normal(1, 64, 3, 64).transpose(1, 2)
    fmt = PackedFormat(64, 4, True)
    head = head_rows(x[:, :, :PAGE_TOKENS], fmt)
    assert torch.equal(encode_pages(x, head, fmt), encode_pages(x.contiguous(), head, fmt))


@pytest.mark.parametrize("bits", range(1, 9))
def test_scale_is_the_one_of_least_squared_error(bits):
    """Norm correction: the error is orthogonal to the decoded vector, up to the step of the stored scale."""
    x = normal(1, 1, 64, 128)
    decoded = roundtrip(x, PackedFormat(128, bits, False))
    projection = (x * decoded).sum(-1) / decoded.square().sum(-1)
    assert (projection.log2().abs() <= 0.51 / 32).all()


class LargestTemporary(TorchDispatchMode):
    """Records the size of the largest tensor that any op makes; views of `given` do not count."""

    def __init__(self, given):
        super().__init__()
        self.given = given.untyped_storage().data_ptr()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("bits", [2, 8])
def test_temporaries_are_bounded_by_a_chunk(bits, monkeypatch):
    """No comparison against all levels at once, and no float32 copy of a whole cache."""
    monkeypatch.setattr(quantizer, "_CHUNK_ELEMENTS", 1 << 15)
    x = normal(1, 2, 4096, 64).bfloat16()
    fmt = PackedFormat(64, bits, True)
    head = head_rows(x[:, :, :PAGE_TOKENS], fmt)
    with LargestTemporary(x) as largest:
        pages = encode_pages(x, head, fmt)
    # Codes are int64 for a moment.
    assert 0 < largest.bytes <= max(8 * (1 << 15), pages.nbytes)
    assert 8 * (1 << 15) < x.nbytes
