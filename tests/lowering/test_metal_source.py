"""The text of the generated kernels: golden files, limits of Metal, and what other compilers say of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lowering.common import drawn
from tqc.format import PackedFormat

pytest.importorskip("mlx.core")

from benchmarks import metal_table  # noqa: E402
from tests.golden.generate_metal import FOLDER, texts  # noqa: E402
from tests.lowering.metal_texts import as_cuda, as_metal, as_opencl, kernels  # noqa: E402

ROWS = json.loads(metal_table.RESULTS.read_text())["rows"]
PAIRS = [
    (PackedFormat(128, 4, True), PackedFormat(128, 2, False), "float16", 4),
    (PackedFormat(80, 3, True), PackedFormat(72, 7, True, rotation="haar"), "bfloat16", 1),
    (PackedFormat(64, 1, True), PackedFormat(256, 8, False, folded=True), "float32", 8),
    (PackedFormat(96, 5, False), PackedFormat(64, 6, False), "float16", 2),
]
NAMES = [f"{k.head_dim}-{v.head_dim}" for k, v, *_ in PAIRS]


def test_golden_files():
    """`python tests/golden/generate_metal.py` writes them anew; read the difference before it is committed."""
    assert texts() == {path.name: path.read_text() for path in FOLDER.iterdir()}


def test_table_of_docs():
    """docs/metal.md has the table of the results, and their threadgroup memory is that of the kernels now."""
    assert metal_table.table(ROWS) in (metal_table.RESULTS.parents[1] / "docs" / "metal.md").read_text()
    for row in ROWS:
        made = metal_table.kernels(row["head_dim"], row["k_bits"], row["v_bits"], row["rows"])
        assert {name: row[name]["threadgroup_bytes"] for name in made} == {
            name: kernel.threadgroup_bytes for name, kernel in made.items()
        }


formats = st.builds(
    PackedFormat,
    st.sampled_from([64, 80, 96, 128, 256]) | st.integers(1, 128).map(lambda n: 8 * n),
    st.integers(1, 8),
    st.booleans(),
    rotation=st.sampled_from(["hadamard", "haar"]),
    folded=st.booleans(),
)


@drawn
@given(k=formats, v=formats, rows=st.integers(1, 40))
def test_limits_of_metal(k, v, rows):
    """32 KiB of threadgroup memory, 31 buffers, 1,024 threads."""
    for kernel in kernels(k, v, "float32", rows):
        assert kernel.threadgroup_bytes <= 32768, kernel.name
        shapes = sum(f"{name}_shape" in kernel.body for name in kernel.inputs)
        assert len(kernel.inputs) + shapes + len(kernel.outputs) <= 31
        assert 32 * kernel.simdgroups <= 1024


def test_threadgroup_memory_is_counted_whole():
    """Against the figures of ptxas for sm_90."""
    found = {kernel.name: kernel.threadgroup_bytes for kernel in kernels(*PAIRS[0])}
    assert found["tqc_attend_d128_k4_v2_r4_none_share"] == 6976
    assert found["tqc_encode_d128_b4_centred"] == 5312


@pytest.mark.parametrize("pair", PAIRS, ids=NAMES)
def test_mlx_adds_the_shapes_that_are_named(pair):
    """It looks for NAME_shape anywhere in the text, so no name may end in another one's."""
    for kernel in kernels(*pair):
        text = as_metal(kernel)
        named = set(re.findall(r"\w+_shape\b", kernel.body))
        assert named == set(re.findall(r"const constant int\* (\w+_shape) ", text))
        assert named <= {f"{name}_shape" for name in kernel.inputs}
        assert not re.search(r"template\b|_strides|_ndim", text)


@pytest.mark.parametrize("pair", PAIRS, ids=NAMES)
def test_address_spaces(pair, tmp_path):
    """By clang, which checks types and address spaces of OpenCL's C++ as Metal's compiler does its own."""
    if not shutil.which("clang-tidy"):
        pytest.skip("needs clang-tidy (on PyPI)")
    paths = []
    for kernel in kernels(*pair):
        paths.append(tmp_path / f"{kernel.name}.cl")
        paths[-1].write_text(as_opencl(as_metal(kernel)))
    flags = ["--", "-x", "clcpp", "-Wall", "-Wno-unused-function", "-Wno-unused-variable"]
    command = ["clang-tidy", "--checks=-*", "--allow-no-checks", "--quiet", "--warnings-as-errors=*", *paths, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.extended
@pytest.mark.parametrize("pair", PAIRS, ids=NAMES)
def test_cuda_compiles(pair, tmp_path):
    """By nvcc, for sm_80 and sm_90."""
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    source = tmp_path / "kernels.cu"
    # Each kernel in a namespace of its own; headers first, which know none.
    parts = [as_cuda(kernel).split("#include <cuda_bf16.h>\n") for kernel in kernels(*pair)]
    spaces = [f"namespace of_{i} {{\n{text}\n}}\n" for i, (_, text) in enumerate(parts)]
    source.write_text(f"{parts[0][0]}#include <cuda_bf16.h>\n{''.join(spaces)}")
    architectures = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in (80, 90)]
    command = ["nvcc", "-std=c++17", *architectures, "-fatbin", source, "-o", tmp_path / "kernels"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
