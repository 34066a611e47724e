"""Orthogonal rotations that make the coordinates of any key or value look alike (TurboQuant, arXiv 2504.19874)."""

from functools import lru_cache

import numpy as np
import torch
from scipy import fft, linalg

ROTATIONS = ("hadamard", "haar")


@lru_cache(maxsize=None)
def rotation(head_dim: int, kind: str = "hadamard", seed: int = 0) -> torch.Tensor:
    """Orthogonal matrix R, float32 [head_dim, head_dim]; a vector x is rotated as R @ x.

    `hadamard`: random signs, then a Hadamard matrix; where head_dim = m * 2**k with m odd, the Kronecker product of
    the Hadamard matrix of order 2**k and an orthonormal DCT of order m, so that every output mixes every input.
    `haar`: uniform over the orthogonal group (QR of a Gaussian matrix, signs fixed).

    Raises:
        ValueError: if `kind` is unknown.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    if kind == "hadamard":
        m = head_dim
        while m % 2 == 0:
            m //= 2
        order = head_dim // m
        matrix = np.kron(linalg.hadamard(order) / np.sqrt(order), fft.dct(np.eye(m), axis=0, norm="ortho"))
        matrix = matrix * rng.choice([-1.0, 1.0], size=head_dim)
    elif kind == "haar":
        q, r = np.linalg.qr(rng.standard_normal((head_dim, head_dim)))
        matrix = q * np.sign(np.diag(r))
    else:
        raise ValueError(f"rotation must be one of {', '.join(ROTATIONS)}; got {kind!r}")
    return torch.from_numpy(np.ascontiguousarray(matrix)).float()
