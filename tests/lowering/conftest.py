"""Where the Triton kernels run in a test, and at which level those of the CPU."""

from __future__ import annotations

import os

import pytest
import torch

from tests.lowering.common import CPU_LEVELS
from tqc.lowering.cpu import kernels


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request: pytest.FixtureRequest) -> str:
    """The device of the tensors: a GPU if there is one, else the CPU, and Triton interprets the kernels."""
    pytest.importorskip("triton")
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("needs a GPU" if request.param == "cuda" else "there is a GPU")
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture(scope="module")
def few_threads():
    """Threads that wait for each other make small work slow where the cores are busy; OMP_NUM_THREADS asks for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=CPU_LEVELS)
def provider(request, monkeypatch):
    """The provider at one level, its products of integers off: they are tested by their error."""
    monkeypatch.setenv("TQC_CPU_LEVEL", request.param)
    module = kernels.loaded()
    module.use_int8(False)
    yield kernels
    module.use_int8(True)
    monkeypatch.undo()
    kernels.loaded()
