"""Where the Triton kernels run in a test."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest) -> str:
    """The device of the tensors: a GPU if there is one, else the CPU, and Triton interprets the kernels."""
    pytest.importorskip("triton")
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("needs a GPU" if request.param == "cuda" else "there is a GPU")
    return "cuda" if request.param == "cuda" else "cpu"
