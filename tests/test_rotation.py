"""Rotations: orthogonal, mixing, and the same for ever."""

import hashlib

import pytest
import torch

from tqc.format.rotation import ROTATIONS, _splitmix64, rotation

HEAD_DIMS = (8, 16, 24, 40, 64, 80, 96, 112, 128, 192, 256)

# Files name a rotation by kind and seed: these values may never change. SHA-256 of the signs, row by row, a bit each.
GOLDEN_SIGNS = {
    (64, 0): "163793d8d10cb89ffc11fa96b2ceac0a6994dcc9375979dafab5eccb3df2db10",
    (64, 7): "39362df3c7ce26ece5c7fbf99277e27967db9bd778532880a1e9dc43091c0fe1",
    (96, 0): "7d43c87720712de01c11e9142af88b84ce2d01f68089af0e3f068137317f40f1",
    (128, 0): "351910fe1968145da808d6ccbd267fef76554257cb290422d4c36d901c1a3748",
    (256, 2**64 - 1): "af6548b6b69516d1d88cfe21f883f793566fd50ea86b38b2e5b004a32a5f8492",
}
# The corner R[0, :4] and the trace, to the rounding of float32.
GOLDEN_HAAR = {
    (64, 0): ([-0.0586873, 0.3299159, -0.0990756, 0.0181256], -0.540217),
    (96, 3): ([-0.0646304, 0.0838544, -0.130844, 0.1612458], -0.793630),
}


@pytest.mark.parametrize("kind", ROTATIONS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_orthogonal(head_dim, kind):
    matrix = rotation(head_dim, kind, seed=3).double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(head_dim, dtype=torch.float64), atol=3e-6)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_output_mixes_every_input(head_dim):
    matrix = rotation(head_dim, "hadamard", seed=0).abs() * head_dim**0.5
    assert matrix.min() > 0.07
    # A spike comes out spread: no coordinate holds more than twice its share of the energy.
    assert matrix.max() <= 2**0.5 + 1e-4
    if head_dim & (head_dim - 1) == 0:
        assert torch.allclose(matrix, torch.ones(()), atol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("kind", ROTATIONS)
def test_channels_of_unequal_size_come_out_alike(head_dim, kind):
    spread = torch.logspace(0, 3, head_dim)
    x = torch.randn(4096, head_dim, generator=torch.Generator().manual_seed(0)) * spread
    energy = (x @ rotation(head_dim, kind, seed=1).T).square().mean(0)
    assert (x.square().mean(0).max() / x.square().mean(0).median()) > 500
    assert energy.max() / energy.median() < 16


@pytest.mark.parametrize("kind", ROTATIONS)
def test_deterministic_by_seed(kind):
    first = rotation(64, kind, seed=5).clone()
    rotation.cache_clear()
    torch.manual_seed(1)
    assert torch.equal(rotation(64, kind, seed=5), first)
    assert not torch.equal(rotation(64, kind, seed=6), first)


def test_splitmix64_matches_its_published_sequence():
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert _splitmix64(0, 3) == expected


def sign_hash(matrix):
    bits = (matrix > 0).flatten().tolist()
    return hashlib.sha256(bytes(bits)).hexdigest()


@pytest.mark.parametrize("head_dim, seed", GOLDEN_SIGNS)
def test_hadamard_is_the_same_for_ever(head_dim, seed):
    assert sign_hash(rotation(head_dim, "hadamard", seed)) == GOLDEN_SIGNS[head_dim, seed]


@pytest.mark.parametrize("head_dim, seed", GOLDEN_HAAR)
def test_haar_is_the_same_for_ever(head_dim, seed):
    matrix = rotation(head_dim, "haar", seed)
    corner, trace = GOLDEN_HAAR[head_dim, seed]
    assert matrix[0, :4].tolist() == pytest.approx(corner, abs=1e-6)
    assert matrix.trace().item() == pytest.approx(trace, abs=1e-5)


def test_haar_has_no_preferred_sign():
    """Without fixing the signs of R in QR, the diagonal would be biased."""
    diagonal = torch.stack([rotation(8, "haar", seed).diagonal() for seed in range(400)])
    assert diagonal.mean().abs() < 4 / (400 * 8 * 8) ** 0.5


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rows_of_the_hadamard_kind_keep_signs_by_input(head_dim):
    """Two seeds differ by signs of the inputs alone, so a kernel may negate and then run one fast transform."""
    ratio = rotation(head_dim, "hadamard", 0) / rotation(head_dim, "hadamard", 1)
    assert torch.allclose(ratio.abs(), torch.ones(()), atol=1e-5)
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), atol=1e-5)


def test_errors_name_argument_and_value():
    with pytest.raises(ValueError, match="rotation must be one of hadamard, haar; got 'fourier'"):
        rotation(64, "fourier")
    with pytest.raises(ValueError, match="head_dim must be positive, got 0"):
        rotation(0)
