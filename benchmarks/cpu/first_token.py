"""How long `tqc run` takes to its first token, from the command on: with empty caches, with warm ones, and dense.

    python benchmarks/cpu/first_token.py                   the embedded model, float32

One token is asked for: the text of a longer answer shows only once a word is whole, a token or two later. "Empty"
means that neither a converted model, nor a built kernel, nor compiled code is in the user's cache folder. The commands
run one after the other in processes of their own. Rows go to benchmarks/results/first_token.json.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envelope


def first_token_s(caches: Path, *options: str) -> float:
    """Seconds from the start of `tqc run` to the first text on its standard output."""
    environment = {**os.environ, "TQC_CACHE_DIR": str(caches / "own"), "TORCHINDUCTOR_CACHE_DIR": str(caches / "code")}
    command = [sys.executable, "-m", "tqc", "run", "What is gravity?", "--max-tokens", "1", *options]
    begin = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, cwd=caches
    ) as process:
        assert process.stdout
        first = process.stdout.read(1)
        elapsed = time.perf_counter() - begin
        process.stdout.read()
    if process.returncode or not first:
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return elapsed


def main() -> None:
    rows = []
    for name, options in (("packed, default preset", ()), ("dense, Inductor", ("--dense",))):
        with tempfile.TemporaryDirectory(prefix="tqc-bench-") as folder:
            cold, warm = (round(first_token_s(Path(folder), *options), 1) for _ in range(2))
        rows.append({"name": name, "empty_caches_s": cold, "warm_caches_s": warm})
        print(rows[-1], flush=True)
    print("written to", envelope.write("first_token", rows))


if __name__ == "__main__":
    main()
