"""The Triton kernels compiled ahead of time for NVIDIA GPUs: what benchmarks/gpu/compile_table.py finds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"
TABLE = json.loads((FOLDER / "compile_table.json").read_text())["rows"]
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


def check(row):
    assert row["registers"] <= 255 and row["shared_bytes"] <= SHARED_LIMIT[row["arch"]]
    if row["case"].startswith(("chunk", "read")):
        return  # they may spill, and do: the table says how much
    # Decoding spills a few words around its loop, to have three programs on a multiprocessor.
    assert row["local_bytes"] <= 64, "registers are spilled"
    if "loop" in row:
        assert row["loop"]["matrix"] > 0
        # Nobody has a Blackwell GPU here to tell whether its few are worth the third program.
        assert row["loop"]["local"] <= (4 if row["arch"] == "sm_100" else 0)
    if row["case"].startswith("decode") and "loop" in row:
        # 64 bits a lane where two lanes share a token's row of 16 bytes.
        assert max(int(bits) for bits in row["loop"]["load_bits"]) >= (128 if "k4" in row["case"] else 64)
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
        calls = {row["case"].rsplit(" ", 2)[0] for row in TABLE if row["arch"] == arch}
        assert {"decode", "append 1", "append 512"} <= calls
    for row in TABLE:
        check(row)


def test_decoding_compiles_for_hopper(tmp_path):
    rows = compiled(90, "decode d64 k4v2", tmp_path)
    assert [row["kernel"] for row in rows] == ["attend_kernel", "merge_kernel"]
    assert "loop" in rows[0]
    for row in rows:
        check(row)


@pytest.mark.slow
@pytest.mark.parametrize("arch,case", [(80, "decode d128 k4v2"), (100, "decode d128 k4v2"), (90, "append 1 d64 k4v2")])
def test_other_kernels_compile(arch, case, tmp_path):
    for row in compiled(arch, case, tmp_path):
        check(row)


@pytest.mark.parametrize(
    "broken",
    [
        {"local_bytes": 65},
        {"shared_bytes": 1 << 20},
        {"loop": {"matrix": 0, "local": 0, "load_bits": {"128": 1}}},
        {"loop": {"matrix": 1, "local": 5, "load_bits": {"128": 1}}},
        {"loop": {"matrix": 1, "local": 0, "load_bits": {"32": 1}}},
        {"bytes_per_token": 1000.0},
    ],
)
def test_the_rules_can_be_broken(broken):
    row = next(row for row in TABLE if row["case"].startswith("decode") and "loop" in row)
    check(row)
    with pytest.raises(AssertionError):
        check(row | broken)
