"""The Triton provider before its kernels are loaded: what it takes, and that asking costs no import of Triton."""

import subprocess
import sys

import pytest
import torch

from tqc.format import PackedFormat
from tqc.lowering import select
from tqc.lowering.triton import PROVIDER

FMT = PackedFormat(64, 4, True)


@pytest.mark.parametrize(
    "k_fmt,v_fmt,dtype,device_type,words",
    [
        (FMT, FMT, torch.bfloat16, "cpu", "not on cpu"),
        (FMT, FMT, torch.float64, "cuda", "float64"),
        (FMT, PackedFormat(512, 4, True), torch.float32, "cuda", "head_dim"),
        (PackedFormat(8, 4, True), FMT, torch.float32, "cuda", "head_dim"),
        (FMT, PackedFormat(64, 4, True, 4, 96), torch.float32, "cuda", "residual_window"),
        (FMT, PackedFormat(64, 4, True, 8), torch.float32, "cuda", "sink_tokens"),
        (FMT, PackedFormat(64, 4, True, keep=64), torch.float32, "cuda", "one keep for keys and values"),
    ],
)
def test_what_it_cannot_take(k_fmt, v_fmt, dtype, device_type, words):
    assert words in PROVIDER.supports(k_fmt, v_fmt, dtype, device_type)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_it_takes(dtype):
    assert PROVIDER.supports(FMT, PackedFormat(256, 1, False), dtype, "cuda") is None


def test_it_is_preferred():
    assert select.providers()[0] is PROVIDER


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    assert "no CUDA device" in PROVIDER.unavailable()
    with pytest.raises(ValueError, match="no CUDA device"):
        select.choose(FMT, FMT, torch.bfloat16, "cuda", "triton")


@pytest.mark.parametrize(
    "capability,installed,words", [((7, 5), True, "capability 8.0"), ((9, 0), False, "pip install")]
)
def test_what_is_missing_is_named(monkeypatch, capability, installed, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr("tqc.lowering.triton.find_spec", lambda name: installed or None)
    assert words in PROVIDER.unavailable()


def test_finding_it_does_not_import_triton():
    code = "import sys; from tqc.lowering import select; select.providers(); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
