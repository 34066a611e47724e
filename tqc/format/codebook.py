"""Lloyd-Max codebooks for one coordinate of a randomly rotated unit vector.

A vector drawn uniformly from the sphere of radius sqrt(d) in R^d has coordinates with the density
f(t) ~ (1 - t^2/d)^((d-3)/2) on |t| <= sqrt(d): variance 1, and N(0, 1) as d grows (TurboQuant, arXiv 2504.19874,
lemma 1). The levels returned here minimize the mean squared error of that density, for 1 to 8 bits.
"""

from functools import cache

import numpy as np
import torch
from scipy import linalg, special

MAX_BITS = 8


@cache
def _lloyd_max(head_dim: int, bits: int) -> np.ndarray:
    """Positive half of the optimal levels, float64, ascending; the codebook is symmetric about 0."""
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be between 1 and {MAX_BITS}, got {bits}")
    if head_dim < 4:
        raise ValueError(f"head_dim must be at least 4, got {head_dim}")
    d = float(head_dim)
    a = (d - 1) / 2
    radius = np.sqrt(d)
    # Integral of (1 - t^2)^(a - 1) over -1..1, which is 2^(2a - 1) B(a, a).
    norm = np.exp((2 * a - 1) * np.log(2) + special.betaln(a, a))

    def cdf(t: np.ndarray) -> np.ndarray:
        return special.betainc(a, a, np.clip((1 + t / radius) / 2, 0.0, 1.0))

    def first_moment(t: np.ndarray) -> np.ndarray:
        """Integral of t f(t) from -radius to t, with f normalized."""
        return -radius / (2 * a) * np.clip(1 - t**2 / d, 0.0, 1.0) ** a / norm

    def density(t: np.ndarray) -> np.ndarray:
        return np.clip(1 - t**2 / d, 0.0, 1.0) ** (a - 1) / (norm * radius)

    half = 2 ** (bits - 1)
    # High-resolution theory puts the levels at the quantiles of f^(1/3), itself a density of this family.
    u = 0.5 + (np.arange(half) + 0.5) / (2 * half)
    levels = radius * (2 * special.betaincinv((d + 3) / 6, (d + 3) / 6, u) - 1)
    edges = np.empty(half + 1)
    edges[0], edges[-1] = 0.0, radius
    for step in range(200):
        edges[1:-1] = (levels[1:] + levels[:-1]) / 2
        mass = np.diff(cdf(edges))
        moment = np.diff(first_moment(edges))
        if step < 20:  # Lloyd's iteration, until Newton's is sure to converge
            new = moment / mass
        else:
            coupling = density(edges[1:-1]) * np.diff(levels) / 4
            banded = np.zeros((3, half))
            banded[0, 1:] = banded[2, :-1] = -coupling
            banded[1] = mass
            banded[1, :-1] -= coupling
            banded[1, 1:] -= coupling
            new = levels - linalg.solve_banded((1, 1), banded, mass * levels - moment)
        moved = np.max(np.abs(new - levels))
        levels = new
        if moved < 1e-13:
            break
    return levels


@cache
def levels(head_dim: int, bits: int) -> torch.Tensor:
    """Optimal reconstruction levels, float32 [2**bits], ascending, for coordinates of unit variance.

    Raises:
        ValueError: if `bits` is not in 1..8 or `head_dim` is smaller than 4.
    """
    half = _lloyd_max(head_dim, bits)
    return torch.from_numpy(np.concatenate([-half[::-1], half])).float()


@cache
def boundaries(head_dim: int, bits: int) -> torch.Tensor:
    """Midpoints between neighbouring `levels`, float32 [2**bits - 1]: the code of t is the number of them below t."""
    table = levels(head_dim, bits).double()
    return ((table[1:] + table[:-1]) / 2).float()


def distortion(head_dim: int, bits: int) -> float:
    """Mean squared error per coordinate of unit variance that `levels` reaches, by exact integration."""
    half = _lloyd_max(head_dim, bits)
    d = float(head_dim)
    a = (d - 1) / 2
    edges = np.concatenate([[0.0], (half[1:] + half[:-1]) / 2, [np.sqrt(d)]])
    mass = np.diff(special.betainc(a, a, np.clip((1 + edges / np.sqrt(d)) / 2, 0.0, 1.0)))
    # At a fixed point each level is the mean of its cell, so the error is the variance minus that of the levels.
    return float(1.0 - 2 * np.sum(mass * half**2))
