"""Codebooks: optimal for the marginal of a rotated unit vector, by independent integration and search."""

import numpy as np
import pytest
import torch
from scipy import integrate

from tqc.format import codebook

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
WIDTHS = range(1, 9)

# Distortion of the Gaussian's optimal quantizer (Max 1960).
GAUSSIAN = {
    1: 0.363380,
    2: 0.117482,
    3: 0.034548,
    4: 0.009501,
    5: 0.0025047,
    6: 0.00064424,
    7: 0.00016348,
    8: 0.00004119,
}
# Books in use elsewhere, as measured on Gaussian coordinates: their Lloyd iteration stopped early.
UNCONVERGED = {6: 0.000892, 8: 0.0000790}


def marginal_density(head_dim):
    """Density of one coordinate of a vector on the sphere of radius sqrt(head_dim), normalized by quadrature."""
    radius = np.sqrt(head_dim)

    def shape(t):
        return max(1.0 - t * t / head_dim, 0.0) ** ((head_dim - 3) / 2)

    total, _ = integrate.quad(shape, -radius, radius, points=[-3.0, 0.0, 3.0])
    return lambda t: shape(t) / total


def test_tables_are_symmetric_ascending_and_interleaved():
    for head_dim in HEAD_DIMS:
        for bits in WIDTHS:
            levels, edges = codebook.levels(head_dim, bits), codebook.boundaries(head_dim, bits)
            assert levels.shape == (2**bits,) and edges.shape == (2**bits - 1,)
            assert levels.dtype == edges.dtype == torch.float32
            assert torch.equal(levels, -levels.flip(0)) and torch.equal(edges, -edges.flip(0))
            assert (levels.diff() > 0).all()
            assert (levels[:-1] < edges).all() and (edges < levels[1:]).all()
            assert levels.abs().max() < head_dim**0.5


@pytest.mark.parametrize("head_dim", [64, 96, 256])
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_each_level_is_the_mean_of_its_cell(head_dim, bits):
    density = marginal_density(head_dim)
    levels = codebook.levels(head_dim, bits).double().numpy()
    edges = np.concatenate([[-np.sqrt(head_dim)], (levels[1:] + levels[:-1]) / 2, [np.sqrt(head_dim)]])
    cells = range(2 ** (bits - 1), 2**bits) if bits < 6 else range(2 ** (bits - 1), 2**bits, 13)
    for cell in cells:
        low, high = edges[cell], edges[cell + 1]
        mass, _ = integrate.quad(density, low, high, epsrel=1e-10)
        moment, _ = integrate.quad(lambda t: t * density(t), low, high, epsrel=1e-10)
        assert levels[cell] == pytest.approx(moment / mass, abs=2e-6)


@pytest.mark.parametrize("bits", [1, 3, 5, 8])
def test_distortion_is_the_integral_of_the_squared_error(bits):
    density = marginal_density(64)
    levels = codebook.levels(64, bits).double().numpy()
    edges = np.concatenate([[0.0], (levels[1:] + levels[:-1])[2 ** (bits - 1) :] / 2, [8.0]])
    total = 0.0
    for cell, level in enumerate(levels[2 ** (bits - 1) :]):
        total += 2 * integrate.quad(lambda t, c=level: (t - c) ** 2 * density(t), edges[cell], edges[cell + 1])[0]
    assert codebook.distortion(64, bits) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_no_long_lloyd_run_on_a_grid_does_better(head_dim):
    """An independent search: Lloyd's iteration on a fine histogram, from levels spread evenly over the mass."""
    grid = (np.arange(200_000) + 0.5) / 200_000 * np.sqrt(head_dim)
    weight = (1 - grid**2 / head_dim) ** ((head_dim - 3) / 2)
    weight /= weight.sum()
    mass, moment, square = (np.concatenate([[0.0], np.cumsum(weight * grid**power)]) for power in (0, 1, 2))
    for bits in WIDTHS:
        half = 2 ** (bits - 1)
        # Evenly spread with respect to the cube root of the density, then iterated.
        spread = np.cumsum(weight ** (1 / 3))
        levels = grid[np.searchsorted(spread / spread[-1], (np.arange(half) + 0.5) / half)]
        for _ in range(3000):
            edges = np.concatenate([[0], np.searchsorted(grid, (levels[1:] + levels[:-1]) / 2), [len(grid)]])
            levels = np.diff(moment[edges]) / np.diff(mass[edges])
        found = np.sum(np.diff(square[edges]) - 2 * levels * np.diff(moment[edges]) + levels**2 * np.diff(mass[edges]))
        assert codebook.distortion(head_dim, bits) <= found * 1.001


@pytest.mark.parametrize("bits", WIDTHS)
def test_distortion_tends_to_the_gaussian_limit(bits):
    found = [codebook.distortion(head_dim, bits) for head_dim in (64, 128, 256, 1024, 65536)]
    assert found == sorted(found) and found[-1] <= GAUSSIAN[bits] * 1.001
    assert found[0] == pytest.approx(GAUSSIAN[bits], rel=0.06)
    assert found[2] == pytest.approx(GAUSSIAN[bits], rel=0.02)
    assert found[-1] == pytest.approx(GAUSSIAN[bits], rel=2e-3)


@pytest.mark.parametrize("bits", UNCONVERGED)
def test_wide_codebooks_are_converged(bits):
    for head_dim in (64, 128, 256):
        assert codebook.distortion(head_dim, bits) < GAUSSIAN[bits] * 1.01 < 0.75 * UNCONVERGED[bits]


def test_smallest_head_dim_and_a_large_one():
    for head_dim in (4, 5, 8, 4096):
        for bits in (1, 8):
            assert torch.isfinite(codebook.levels(head_dim, bits)).all()
            assert 0 < codebook.distortion(head_dim, bits) < 0.4


@pytest.mark.parametrize("table", [codebook.levels, codebook.boundaries])
@pytest.mark.parametrize(
    "head_dim, bits, named", [(64, 0, "bits"), (64, 9, "bits"), (64, -1, "bits"), (3, 4, "head_dim")]
)
def test_errors_name_argument_and_value(table, head_dim, bits, named):
    with pytest.raises(ValueError, match=rf"{named} must be .*got {bits if named == 'bits' else head_dim}"):
        table(head_dim, bits)


@pytest.mark.parametrize("head_dim, bits", [(64, 9), (2, 2)])
def test_distortion_checks_its_arguments(head_dim, bits):
    with pytest.raises(ValueError, match="must be"):
        codebook.distortion(head_dim, bits)
