"""The Triton kernels compiled ahead of time for NVIDIA GPUs: what benchmarks/gpu/compile_table.py finds."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
TABLE = json.loads((FOLDER / "compile_table.json").read_text())["rows"]
# What one program can ask for, bytes (CUDA C++ Programming Guide).
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
}
# 8 bits: scales. 32: pages' headers and centres, which are no whole 16 bytes.
HEADER_LOADS = {8: 4, 32: 5}


def check(row):
    assert row["registers"] <= 255 and row["shared_bytes"] <= SHARED_LIMIT[row["arch"]]
    # Known: on sm_120 attention in float32 spills a little around its loops at head_dim 256.
    known = row["arch"] == "sm_120" and row["kernel"] == "attend_kernel" and re.search(" d256 .*float32$", row["case"])
    if not (known and row["local_bytes"] <= 40):
        assert row["local_bytes"] == 0 and row["local_instructions"] == 0, "registers are spilled"
    name = re.fullmatch(r"(\w+(?: \d+)?) d(\d+) k(\d)v(\d) ?(\w*)", row["case"])
    call, head_dim, k_bits, v_bits, dtype = name.groups()
    if row["kernel"] != "attend_kernel":
        return
    assert row["loop"]["matrix"] > 0 and row["loop"]["local"] == 0
    # Whole 16 bytes to a token in the narrowest plane, by which planes are read. float32 looks levels up in memory.
    rows = [int(head_dim) * (int(bits) & -int(bits)) // 8 for bits in (k_bits, v_bits)]
    if call == "decode" and dtype != "float32" and all(size % 16 == 0 and size & (size - 1) == 0 for size in rows):
        loads = {int(bits): count for bits, count in row["loop"]["load_bits"].items()}
        wide = loads.pop(128 if SHARED_LIMIT[row["arch"]] > 99 * 1024 else max(loads))
        assert wide >= 2 and all(count <= HEADER_LOADS.get(bits, 0) for bits, count in loads.items())
        # Nothing is read twice and no more than the format stores; the header has spare bytes.
        assert 0.95 * row["format_bytes_per_token"] <= row["bytes_per_token"] <= row["format_bytes_per_token"]


def compiled(arch, case, tmp_path):
    """Rows of one case, compiled now. In a process of its own: here Triton is an interpreter."""
    out = tmp_path / "rows.json"
    command = [sys.executable, str(FOLDER / "compile_table.py"), "--arch", str(arch), "--case", case, "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())["rows"]


def test_the_committed_table_keeps_the_rules():
    for arch in SHARED_LIMIT:
        calls = {row["case"].split(" d")[0] for row in TABLE if row["arch"] == arch}
        assert {"decode", "few", "chunk", "append 1", "append 512", "read"} <= calls
        of_decode = [row["case"] for row in TABLE if row["arch"] == arch and row["case"].startswith("decode")]
        for head_dim in (256,) if SHARED_LIMIT[arch] == 99 * 1024 else (64, 80, 96, 128, 256):
            for case in ("k4v2", "k4v4", "k3v3", "k8v8", "k2v2", "k4v2 float32"):
                assert f"decode d{head_dim} {case}" in of_decode
    for row in TABLE:
        check(row)


@pytest.mark.parametrize("arch,case", [(90, "decode d128 k4v2"), (100, "decode d64 k4v2")])
def test_decoding_compiles(arch, case, tmp_path):
    rows = [row for row in compiled(arch, case, tmp_path) if row["case"] == case]
    assert [row["kernel"] for row in rows] == ["attend_kernel", "merge_kernel"]
    assert "loop" in rows[0]
    for row in rows:
        check(row)


@pytest.mark.extended
@pytest.mark.parametrize(
    "arch,case",
    [(80, "decode d128 k3v3"), (89, "decode d256 k4v4"), (90, "chunk d128 k4v2"), (80, "read d256 k4v2"),
     (90, "append 1 d64 k4v2"), (89, "chunk d256 k4v2 float32")],
)  # fmt: skip
def test_other_kernels_compile(arch, case, tmp_path):
    for row in compiled(arch, case, tmp_path):
        check(row)


@pytest.mark.parametrize(
    "broken",
    [
        {"local_bytes": 4},
        {"local_instructions": 1},
        {"shared_bytes": 1 << 20},
        {"loop": {"matrix": 0, "local": 0, "load_bits": {"128": 4}}},
        {"loop": {"matrix": 1, "local": 1, "load_bits": {"128": 4}}},
        {"loop": {"matrix": 1, "local": 0, "load_bits": {"64": 1, "128": 4}}},
        {"bytes_per_token": 1000.0},
    ],
)
def test_the_rules_can_be_broken(broken):
    row = next(row for row in TABLE if row["case"] == "decode d128 k4v2" and "loop" in row)
    check(row)
    with pytest.raises(AssertionError):
        check(row | broken)


@pytest.mark.parametrize(
    "broken",
    [
        *({"arch": arch} for arch in SHARED_LIMIT if arch != "sm_120"),
        {"case": "decode d128 k4v2 float32"},
        {"case": "decode d256 k4v2"},
        {"kernel": "merge_kernel"},
        {"local_bytes": 44},
    ],
)
def test_nothing_else_may_spill_as_sm_120_does(broken):
    rows = [row for row in TABLE if row["local_bytes"]]
    assert {row["case"] for row in rows} == {"decode d256 k4v2 float32", "chunk d256 k4v2 float32"}
    for row in rows:
        check(row)
        with pytest.raises(AssertionError, match="registers are spilled"):
            check(row | broken)
