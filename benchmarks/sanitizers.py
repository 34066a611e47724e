"""Run the tests of the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer, at each level of this machine.

python benchmarks/sanitizers.py [--levels scalar,avx2] [--write]

The kernels are compiled with g++ and both sanitizers into build/sanitized; a report makes its test fail. With one
thread, and with four. The exit code is 1 if anything is reported or fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envelope

from tqc.lowering.cpu import build

TESTS = "tests/lowering/test_cpu.py"
CACHE = envelope.ROOT / "build" / "sanitized"
COMPILER = CACHE / "compiler"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1"
REPORT = re.compile(r"ERROR: AddressSanitizer: .*|runtime error: .*")


def environment(threads: int) -> dict[str, str]:
    """Python itself has no sanitizer in it, so their libraries are loaded first; what it never frees is no leak."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        **os.environ,
        "CXX": str(COMPILER),
        "TQC_CACHE_DIR": str(CACHE),
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": str(threads),
    }


def run(level: str, threads: int) -> dict[str, Any]:
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", TESTS, "-k", level]
    done = subprocess.run(command, capture_output=True, text=True, cwd=envelope.ROOT, env=environment(threads))
    text = done.stdout + done.stderr
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", text)}
    reports = REPORT.findall(text)
    if done.returncode:
        lines = text.splitlines()
        first = next((i for i, line in enumerate(lines) if REPORT.search(line)), len(lines) - 40)
        print(*lines[first : first + 40], sep="\n", file=sys.stderr)
    return {
        "level": level,
        "threads": threads,
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0) + (done.returncode not in (0, 1)),
        "reports": len(reports),
        "seconds": round(time.perf_counter() - start),
    }


def main() -> None:
    able = [name for name, needs in build.LEVELS.items() if needs.keys() <= build.cpu_features()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", default=",".join(able))
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/sanitizers.json")
    arguments = parser.parse_args()
    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    COMPILER.write_text(f'#!/bin/sh\nexec g++ "$@" {FLAGS}\n')  # behind those of the build, of which it changes -O3
    COMPILER.chmod(0o700)
    rows = []
    for level in arguments.levels.split(","):
        for threads in (1, 4):
            rows.append(run(level, threads))
            print(rows[-1], flush=True)
    if arguments.write:
        compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout.splitlines()[0]
        envelope.write("sanitizers", rows, notes=[f"{TESTS}, compiled by {compiler} with {FLAGS}."])
    sys.exit(any(not row["passed"] or row["failed"] or row["reports"] for row in rows))


if __name__ == "__main__":
    main()
