"""Orthogonal rotations that make the coordinates of any key or value look alike (TurboQuant, arXiv 2504.19874).

Files hold a rotation's kind and seed, not its matrix, so the matrix must come out the same for ever. Random numbers are
therefore drawn by SplitMix64, defined here: numpy promises stable streams for its bit generators only, not for what
`Generator` makes of them.
"""

from functools import cache

import numpy as np
import torch
from scipy import linalg

ROTATIONS = ("hadamard", "haar")


@cache
def rotation(head_dim: int, kind: str = "hadamard", seed: int = 0) -> torch.Tensor:
    """Orthogonal matrix R, float32 [head_dim, head_dim]; a vector x is rotated as R @ x.

    `hadamard`: random signs, then a Hadamard matrix; where head_dim = m * 2**k with m odd, the Kronecker product of
    the Hadamard matrix of order 2**k and the Hartley matrix of order m, which has no zero for odd m, so that every
    output mixes every input. Input i is negated where the i-th random number is odd.
    `haar`: uniform over the orthogonal group (QR of a Gaussian matrix, signs fixed). Equal up to rounding wherever it
    is computed; `hadamard` with a power of two is equal bit for bit.

    Raises:
        ValueError: if `kind` is unknown or `head_dim` is not positive.
    """
    if head_dim < 1:
        raise ValueError(f"head_dim must be positive, got {head_dim}")
    if kind == "hadamard":
        m = head_dim
        while m % 2 == 0:
            m //= 2
        order = head_dim // m
        angle = 2 * np.pi / m * (np.outer(np.arange(m), np.arange(m)) % m)
        hartley = (np.cos(angle) + np.sin(angle)) / np.sqrt(m)
        signs = np.array([-1.0 if bits & 1 else 1.0 for bits in _splitmix64(seed, head_dim)])
        matrix = np.kron(linalg.hadamard(order) / np.sqrt(order), hartley) * signs
    elif kind == "haar":
        # Box and Muller's pairs, from uniform numbers in (0, 1) of 52 bits.
        uniform = np.array([((bits >> 12) + 0.5) / 2**52 for bits in _splitmix64(seed, 2 * head_dim * head_dim)])
        radius, turn = np.sqrt(-2 * np.log(uniform[0::2])), 2 * np.pi * uniform[1::2]
        q, r = np.linalg.qr((radius * np.cos(turn)).reshape(head_dim, head_dim))
        matrix = q * np.sign(np.diag(r))
    else:
        raise ValueError(f"rotation must be one of {', '.join(ROTATIONS)}; got {kind!r}")
    return torch.from_numpy(np.ascontiguousarray(matrix)).float()


def _splitmix64(seed: int, count: int) -> list[int]:
    """The first `count` numbers, of 64 bits, of the SplitMix64 generator started at `seed`."""
    mask, state, numbers = 2**64 - 1, seed & (2**64 - 1), []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        numbers.append(z ^ (z >> 31))
    return numbers
