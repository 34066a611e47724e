"""Check and measure the CUDA provider on this machine's GPU: one command, under 8 minutes on an H100 or H200.

    python benchmarks/gpu/run.py --out benchmarks/results/gpu.json
    python benchmarks/gpu/run.py --quick --out smoke.json
    TRITON_INTERPRET=1 python benchmarks/gpu/run.py --device cpu --quick --sections numerics --out smoke.json

Each section runs in a process of its own and writes its rows as it goes: an error, a crash of the GPU or the end of its
time costs the rest of that section only, and is recorded. The exit status is 1 if any section failed or any check did
not pass.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Seconds for each section; the last ones get what the others leave.
BUDGETS = {"compile": 90, "numerics": 60, "decode": 150, "append": 40, "generate": 120}
STARTING_SECONDS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--sections", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: Triton's interpreter")
    parser.add_argument("--quick", action="store_true", help="a few small points of each section")
    parser.add_argument("--worker", choices=BUDGETS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments)
        return
    _refuse(parser, arguments)

    from envelope import command
    from measure import environment

    results: dict[str, Any] = {"command": command(), "environment": environment(arguments.device), "sections": {}}
    spare = 0.0
    for section in arguments.sections:
        begin = time.monotonic()
        budget = BUDGETS[section] + spare
        results["sections"][section] = _run(section, arguments, budget)
        spare = max(0.0, budget - (time.monotonic() - begin))
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    failed = {name: section["error"] for name, section in results["sections"].items() if section["error"]}
    wrong = [row for section in results["sections"].values() for row in section["rows"] if row.get("passed") is False]
    for name, error in failed.items():
        print(f"{name}: {error.strip().splitlines()[-1]}")
    print(f"{arguments.out}: {len(failed)} sections failed, {len(wrong)} checks did not pass")
    sys.exit(1 if failed or wrong else 0)


def _refuse(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if arguments.device == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("--device cpu needs TRITON_INTERPRET=1 in the environment")
        if arguments.sections != ["numerics"]:
            parser.error("--device cpu can run `--sections numerics` only: an interpreter is not timed")
    if not arguments.out.resolve().parent.is_dir():
        parser.error(f"--out: there is no folder {arguments.out.resolve().parent}")


def _run(section: str, arguments: argparse.Namespace, budget: float) -> dict[str, Any]:
    """Run one section in a process and collect its rows, whatever becomes of it."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "rows.jsonl")
        command = [sys.executable, __file__, "--worker", section, "--out", str(part), "--device", arguments.device]
        command += ["--quick"] if arguments.quick else []
        environment = {**os.environ, "TQC_BENCH_SECONDS": str(budget)}
        error = None
        begin = time.monotonic()
        try:
            done = subprocess.run(
                command, env=environment, stderr=subprocess.PIPE, text=True, timeout=budget + STARTING_SECONDS
            )
            if done.returncode:
                error = done.stderr[-2000:] or f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            error = f"stopped after {budget + STARTING_SECONDS:.0f} s"
        rows = [json.loads(line) for line in part.read_text().splitlines()] if part.exists() else []
    print(f"{section}: {len(rows)} rows in {time.monotonic() - begin:.0f} s", flush=True)
    return {"rows": rows, "error": error, "seconds": time.monotonic() - begin}


def _work(arguments: argparse.Namespace) -> None:
    """One section, in this process: a row to a line of the file."""
    deadline = time.monotonic() + float(os.environ["TQC_BENCH_SECONDS"])
    from sections import SECTIONS

    with arguments.out.open("w") as file:
        try:
            for row in SECTIONS[arguments.worker](
                arguments.device, arguments.quick, lambda: deadline - time.monotonic()
            ):
                file.write(json.dumps(row) + "\n")
                file.flush()
        except Exception:
            traceback.print_exc()
            sys.exit(1)


if __name__ == "__main__":
    main()
