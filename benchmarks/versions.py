"""Quick tests of models and caches on other versions of transformers than the installed one.

    python -m pip install --no-deps --target FOLDER transformers==5.0.0 ...
    python -m benchmarks.versions FOLDER [FOLDER ...] [--tests tests/test_cache_io.py ...]

Each FOLDER holds a transformers, and of what it needs the versions that it accepts; torch and all else are those
installed. A row is one version: how many tests pass, and which do not. Writes benchmarks/results/versions.json.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.envelope import ROOT, write

TESTS = (
    *("tests/models/test_generate.py", "tests/models/test_static_cache.py", "tests/models/test_encoder_decoder.py"),
    *("tests/test_cache_io.py", "tests/passes/test_layers_of_caches.py"),
)
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|error)")


def row_of(folder: Path, tests: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(folder.resolve())}
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    found = subprocess.run(version, env=environment, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"{folder} holds no transformers that can be imported:\n{found.stderr[-1000:]}")
    options = ["--tb=line", "-W", "ignore", "-m", "not extended", "-p", "no:cacheprovider", "-rf"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:]
    counts = {what: int(count) for count, what in COUNTS.findall(" ".join(last))}
    lines = [line.removeprefix("FAILED ")[:300] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    if not counts:
        raise SystemExit(f"the tests did not run on {folder}:\n{done.stdout[-1000:]}{done.stderr[-1000:]}")
    kinds = {what: counts.get(what, 0) for what in ("passed", "failed", "skipped")}
    return {"transformers": found.stdout.split()[-1], **kinds, "failures": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    arguments = parser.parse_args()
    rows = []
    for folder in arguments.folders:
        rows.append(row_of(folder, arguments.tests))
        print(rows[-1], flush=True)
        write("versions", rows)


if __name__ == "__main__":
    main()
