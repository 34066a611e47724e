"""What the kernels of MLX take: threadgroup memory by their text; registers as ptxas gives them to the CUDA form.

    python benchmarks/metal_table.py             print the table of docs/metal.md from the results
    python benchmarks/metal_table.py --write     make the results anew: needs nvcc, no GPU; a minute

No compiler for Apple's GPUs is at hand: the registers of another machine are the nearest thing to a figure.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.lowering.metal_texts import as_cuda
from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.lowering.metal.attend_source import attend_kernel, rows_at_once
from tqc.lowering.metal.encode_source import encode_kernel
from tqc.lowering.metal.language import Kernel
from tqc.lowering.metal.read_source import read_kernel

RESULTS = Path(__file__).with_name("metal_table.json")
# head_dim, bits of keys and of values, query rows.
SHAPES = (
    *((64, 3, 3, 4), (64, 4, 4, 4), (80, 4, 4, 1), (96, 4, 4, 4)),
    *((128, 2, 2, 4), (128, 3, 3, 4), (128, 4, 2, 1), (128, 4, 2, 4), (128, 4, 2, 8), (128, 4, 4, 4), (128, 8, 8, 4)),
    (256, 4, 4, 4),
)


def kernels(head_dim: int, k_bits: int, v_bits: int, rows: int) -> dict[str, Kernel]:
    k, v = PackedFormat(head_dim, k_bits, True), PackedFormat(head_dim, v_bits, False)
    rows = rows_at_once(rows, head_dim)
    return {
        "attend": attend_kernel(k, v, "float16", rows, "none", True),
        "encode": encode_kernel(k, "float16"),
        "read": read_kernel(k, "float16"),
    }


def resources(kernel: Kernel) -> dict[str, int]:
    """Registers of a thread and bytes that it spills, by ptxas for sm_90."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.cu"
        source.write_text(as_cuda(kernel))
        command = ["nvcc", "-std=c++17", "-arch=sm_90", "-cubin", "-Xptxas", "-v", source, "-o", f"{source}bin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, spilled = (re.search(what, said) for what in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    assert registers and spilled, said
    return {"registers": int(registers[1]), "spilled": int(spilled[1])}


def measured(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    head_dim, k_bits, v_bits, rows = shape
    formats = PackedFormat(head_dim, k_bits, True), PackedFormat(head_dim, v_bits, False)
    row: dict[str, Any] = {"head_dim": head_dim, "k_bits": k_bits, "v_bits": v_bits, "rows": rows}
    row["bytes_a_token"] = sum(fmt.page_bytes for fmt in formats) / PAGE_TOKENS
    for name, kernel in kernels(*shape).items():
        row[name] = {"threads": 32 * kernel.simdgroups, "threadgroup_bytes": kernel.threadgroup_bytes}
        row[name] |= resources(kernel)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| head_dim | K / V bits | query rows | bytes a token | of float16 | attend | encode | read |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row[name]['threadgroup_bytes'] / 1024:.1f} KiB, {row[name]['registers']}"
            for name in ("attend", "encode", "read")
        ]
        part = row["bytes_a_token"] / (4 * row["head_dim"])
        head = [row["head_dim"], f"{row['k_bits']} / {row['v_bits']}", row["rows"], f"{row['bytes_a_token']:g}"]
        lines.append(f"| {' | '.join(map(str, [*head, f'{part:.2f}', *cells]))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        version = re.findall(r"V[\d.]+", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)
        results = {"nvcc": version[0], "architecture": "sm_90", "rows": [measured(shape) for shape in SHAPES]}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())["rows"]))


if __name__ == "__main__":
    main()
