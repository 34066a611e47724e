"""The CPU kernels for 64-bit ARM, cross-compiled and run under an emulator."""

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lowering.common import check_int8, make_store
from tqc.format import PackedFormat, scale_table
from tqc.lowering.cpu import build
from tqc.ops import planes as ops

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
if not COMPILER or not EMULATOR:
    pytest.skip(
        "needs aarch64-linux-gnu-g++ and qemu-aarch64 (g++-aarch64-linux-gnu, qemu-user)", allow_module_level=True
    )

HEADS, GROUP, LENGTH = 2, 4, 500


@pytest.fixture(scope="module", params=["neon", "scalar"])
def binary(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("neon") / "kernels"
    flags = ["-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-w", "-static", f"-I{build.SOURCES}"]
    source = Path(__file__).with_name("neon_main.cpp")
    subprocess.run([COMPILER, *flags, *build.LEVELS[request.param].values(), str(source), "-o", str(path)], check=True)
    return path


def empty(fmt):
    pages, dense, state = make_store(1, HEADS, LENGTH, fmt, torch.float32)
    return pages.zero_(), dense, state


def describe(fmt):
    """A format as `Tensor` of neon_main.cpp reads it."""
    power_of_two = fmt.head_dim & (fmt.head_dim - 1) == 0
    planes = [number for plane in fmt.planes for number in plane]
    head = (
        fmt.head_dim,
        fmt.bits,
        fmt.centred,
        fmt.sink_tokens,
        fmt.residual_window,
        fmt.page_bytes,
        fmt.centre_offset,
    )
    numbers = struct.pack(
        f"<8if3i{len(planes)}i",
        *head,
        power_of_two,
        fmt.score_stretch,
        -1 if fmt.keep is None else fmt.keep,
        HEADS,
        len(fmt.planes),
        *planes,
    )
    return [np.frombuffer(numbers, np.uint8), fmt.levels(), fmt.boundaries(), fmt.rotation_matrix()]


@pytest.mark.parametrize("keep", [None, 300])
@pytest.mark.parametrize(
    "head_dim, k_bits, v_bits", [(128, 4, 2), (64, 3, 3), (64, 1, 1), (80, 2, 4), (128, 3, 5), (80, 6, 7), (128, 8, 8)]
)
def test_kernels_under_emulation(binary, tmp_path, head_dim, k_bits, v_bits, keep):
    generator = torch.Generator().manual_seed(head_dim + k_bits)
    formats = PackedFormat(head_dim, k_bits, True, keep=keep), PackedFormat(head_dim, v_bits, False, keep=keep)
    tokens = [torch.randn(1, HEADS, LENGTH, head_dim, generator=generator) for _ in formats]
    query = torch.randn(1, HEADS * GROUP, 1, head_dim, generator=generator)
    k, v = empty(formats[0]), empty(formats[1])
    arrays = [scale_table()]
    for fmt, new, store in zip(formats, tokens, (k, v), strict=True):
        arrays += [*describe(fmt), new, store[1].clone()]
        ops.append(*store, new, None, str(fmt))
        arrays += store
    with (tmp_path / "in").open("wb") as file:
        for array in (*arrays, query):
            data = np.ascontiguousarray(array).tobytes()
            file.write(struct.pack("<q", len(data)) + data)
    subprocess.run([EMULATOR, binary, tmp_path / "in", tmp_path / "out"], check=True, timeout=120)
    result = (tmp_path / "out").read_bytes()
    for store in (k, v):
        pages = torch.frombuffer(bytearray(result[: store[0].nbytes]), dtype=torch.uint8).view_as(store[0])
        assert (pages[:, :, :, 64:] == store[0][:, :, :, 64:]).float().mean() >= 0.99
        result = result[store[0].nbytes :]
    plain, int8 = torch.frombuffer(bytearray(result), dtype=torch.float32).view(2, *query.shape)

    rest = (None, None, None, None, None, head_dim**-0.5, 0.0, False, *map(str, formats))
    expected, _ = ops.attend(query, *k, *v, *rest)
    torch.testing.assert_close(plain, expected, atol=2e-5, rtol=0)
    keys, values = (new[:, :, formats[0].first_held(LENGTH) :] for new in tokens)
    exact = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    check_int8(int8, expected, exact)
