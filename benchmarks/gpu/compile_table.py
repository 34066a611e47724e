"""What the compiler makes of the CUDA provider's kernels, for sm_80, sm_90 and sm_100: no GPU is needed.

For sm_89 and sm_120, which have less shared memory, it compiles what takes most of it: the largest head_dim.

    python benchmarks/gpu/compile_table.py                      all cases; writes compile_table.json beside this file
    python benchmarks/gpu/compile_table.py --show               print the table of that file
    python benchmarks/gpu/compile_table.py --arch 90 --case "decode d128"

`bytes/token` is what one turn of the decode loop loads, by its tile; `format` is what the format stores for a token.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from compiled import ARCHITECTURES, compiling, resources

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.lowering.triton import kernels, tuning

TABLE = Path(__file__).with_name("compile_table.json")
HEADS, GROUP, CAPACITY = 8, 4, 32768
# Streaming multiprocessors of an A100, an RTX 4090, an H100, a B200 and an RTX 5090: the host code splits by them.
MULTIPROCESSORS = {80: 108, 89: 128, 90: 132, 100: 148, 120: 170}
# Little shared memory, otherwise as sm_80: what needs most is compiled for them.
SMALL = (89, 120)
HEAD_DIMS = (64, 80, 96, 128, 256)
WIDTHS = ((4, 2), (4, 4), (3, 3), (2, 2), (8, 8))
DTYPES = {"": torch.bfloat16, " float16": torch.float16, " float32": torch.float32}


def _parts(fmt: PackedFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(1, HEADS, CAPACITY // PAGE_TOKENS, fmt.page_bytes, dtype=torch.uint8, device="meta"),
        torch.empty(1, HEADS, fmt.dense_rows, fmt.head_dim, dtype=dtype, device="meta"),
        torch.empty(3, dtype=torch.int64, device="meta"),
    )


def _new(heads: int, count: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """As a model makes them: a transposed view."""
    return torch.empty(1, count, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)


Call = Callable[[PackedFormat, PackedFormat, torch.dtype], None]


def _attend(rows: int) -> Call:
    def call(k_fmt: PackedFormat, v_fmt: PackedFormat, dtype: torch.dtype) -> None:
        kernels.attend(
            _new(HEADS * GROUP, rows, k_fmt.head_dim, dtype), *_parts(k_fmt, dtype), *_parts(v_fmt, dtype),
            _new(HEADS, rows, k_fmt.head_dim, dtype), _new(HEADS, rows, v_fmt.head_dim, dtype),
            None, None, None, k_fmt.head_dim**-0.5, 0.0, True, k_fmt.spec, v_fmt.spec,
        )  # fmt: skip

    return call


def _append(count: int) -> Call:
    def call(k_fmt: PackedFormat, v_fmt: PackedFormat, dtype: torch.dtype) -> None:
        key, value = _new(HEADS, count, k_fmt.head_dim, dtype), _new(HEADS, count, v_fmt.head_dim, dtype)
        kernels.append_pair(*_parts(k_fmt, dtype), key, *_parts(v_fmt, dtype), value, None, k_fmt.spec, v_fmt.spec)

    return call


def _read(k_fmt: PackedFormat, v_fmt: PackedFormat, dtype: torch.dtype) -> None:
    kernels.read(*_parts(k_fmt, dtype), 4096, k_fmt.spec)


CALLS = {
    "decode": _attend(1),
    "few": _attend(4),
    "chunk": _attend(256),
    "append 1": _append(1),
    "append 512": _append(512),
    "read": _read,
}


# (call, dtype): widths and head dims. Kernels of bfloat16 and float16 differ in how dense tokens are loaded alone.
CASES = {
    ("decode", ""): (WIDTHS, HEAD_DIMS),
    ("decode", " float16"): (WIDTHS[:1], (128,)),
    ("decode", " float32"): (WIDTHS[:1], HEAD_DIMS),
    ("few", ""): (WIDTHS[:1], (64, 128, 256)),
    ("chunk", ""): (WIDTHS[::4], HEAD_DIMS),
    ("chunk", " float32"): (WIDTHS[:1], (128, 256)),
    ("append 1", ""): (WIDTHS[:1], HEAD_DIMS),
    ("append 1", " float32"): (WIDTHS[:1], (128, 256)),
    ("append 512", ""): (WIDTHS[:1], (128, 256)),
    ("read", ""): (WIDTHS[:1], HEAD_DIMS),
}


def cases() -> list[tuple[str, str, PackedFormat, PackedFormat, torch.dtype]]:
    """(name, call, formats, dtype) of each case."""
    result = []
    for (call, suffix), (widths, head_dims) in CASES.items():
        for head_dim in head_dims:
            for k_bits, v_bits in widths:
                k_fmt, v_fmt = PackedFormat(head_dim, k_bits, True), PackedFormat(head_dim, v_bits, False)
                result.append((f"{call} d{head_dim} k{k_bits}v{v_bits}{suffix}", call, k_fmt, v_fmt, DTYPES[suffix]))
    return result


def compile_case(
    arch: int, name: str, call: str, k_fmt: PackedFormat, v_fmt: PackedFormat, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """One row for each kernel that the call launches."""
    real = tuning.multiprocessors, tuning.architecture
    tuning.multiprocessors = lambda device: MULTIPROCESSORS[arch]  # type: ignore[assignment]
    tuning.architecture = lambda device: ARCHITECTURES[arch]  # type: ignore[assignment]
    try:
        with compiling(arch) as launches:
            CALLS[call](k_fmt, v_fmt, dtype)
    finally:
        tuning.multiprocessors, tuning.architecture = real
    rows = []
    for launch in launches:
        row = {"case": name, "arch": ARCHITECTURES[arch], "grid": launch.grid, **resources(launch)}
        if call == "decode" and "loop" in row:
            tile = tuning.choose(ARCHITECTURES[arch], GROUP, k_fmt, v_fmt, dtype == torch.float32).tile
            row["bytes_per_token"] = row["loop_bytes"] / tile
            row["format_bytes_per_token"] = (k_fmt.page_bytes + v_fmt.page_bytes) / PAGE_TOKENS
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    titles = ("case", "kernel", "arch", "warps", "regs", "local", "shared", "SASS", "loop", "mma", "permute", "float")
    titles += ("loads (bits: count)", "bytes/token", "format")
    lines = [titles]
    for row in rows:
        loop = row.get("loop", {})
        loads = loop.get("load_bits", row["load_bits"])
        lines.append(
            (
                row["case"], row["kernel"], row["arch"], row["num_warps"], row["registers"],
                row["local_bytes"] + row["local_instructions"], row["shared_bytes"], row["instructions"],
                loop.get("instructions", "-"), loop.get("matrix", row["matrix_instructions"]),
                loop.get("permute", "-"), loop.get("float", "-"),
                " ".join(f"{bits}:{count}" for bits, count in loads.items()),
                f"{row['bytes_per_token']:.1f}" if "bytes_per_token" in row else "-",
                f"{row['format_bytes_per_token']:.1f}" if "format_bytes_per_token" in row else "-",
            )
        )  # fmt: skip
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(titles))]
    for line in lines:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--case", default="", help="only the cases whose names start so")
    parser.add_argument("--out", type=Path, help="file to write; without it, the table itself if it is complete")
    parser.add_argument("--show", action="store_true", help="print the file, compile nothing")
    arguments = parser.parse_args()
    if arguments.show:
        show(json.loads(TABLE.read_text())["rows"])
        return
    from envelope import envelope, text

    complete = not arguments.case and arguments.arch == list(ARCHITECTURES)
    out = arguments.out or (TABLE if complete else None)
    notes = ["Compiled, never run: no figure here is a time."]
    rows = []
    for name, *case in cases():
        for arch in arguments.arch:
            if name.startswith(arguments.case) and (arch not in SMALL or case[1].head_dim == max(HEAD_DIMS)):
                rows += compile_case(arch, name, *case)
                print(f"{ARCHITECTURES[arch]} {name}", file=sys.stderr, flush=True)
                if out:
                    out.write_text(text(envelope("compile_table", rows, notes, ["triton"])))
    show(rows)


if __name__ == "__main__":
    main()
