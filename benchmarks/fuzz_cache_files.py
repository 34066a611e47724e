"""Load mutated cache files: each is refused with CacheFileError or gives a cache that can be used.

python benchmarks/fuzz_cache_files.py [--count 10000] [--seed 0] [--write]

What a file is made of is in tests/mutated_files.py. Peak memory is the rise of the resident memory while a file loads;
it must stay below twice the file plus 64 MB. The exit code is 1 if a file breaks a rule; its number is printed, and
`--seed NUMBER --count 1` makes it again.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envelope

from tests.mutated_files import allowed, mutated, outcome, seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first file")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/fuzz_cache_files.json")
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    worst, most = 0, 0.0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        contents = [path.read_bytes() for path in seeds(Path(folder))]
        for content in contents:
            assert outcome(content, Path(folder) / "whole")[0] == "loaded"
        for number in range(arguments.seed, arguments.seed + arguments.count):
            r = random.Random(number)
            content = mutated(r.choice(contents), r)
            try:
                result, peak = outcome(content, Path(folder) / "mutated")
            except Exception:
                traceback.print_exc()
                result, peak = "failed", None
            if peak is not None:
                worst, most = max(worst, peak), max(most, peak / allowed(content))
            if result == "failed" or (peak or 0) >= allowed(content):
                print(f"file {number}: {result}, {peak} bytes, {allowed(content)} allowed", file=sys.stderr)
                counts["broken"] += 1
            counts[result] += 1
    row = {
        "files": arguments.count,
        "refused": counts["refused"],
        "loaded": counts["loaded"],
        "failed": counts["failed"],
        "peak_mb": round(worst / 2**20, 1),
        "peak_over_allowed": round(most, 3),
        "seconds": round(time.perf_counter() - start),
    }
    print(row)
    if arguments.write:
        envelope.write("fuzz_cache_files", [row], packages=["safetensors"])
    sys.exit(1 if counts["broken"] else 0)


if __name__ == "__main__":
    main()
