"""Bytes of short packed caches over those of dense ones: each preset, batch 1 and 64, in one call and token by token.

    python benchmarks/cpu/short_caches.py --write

One layer of SmolLM2-135M: 3 key and value heads of 64. Memory does not depend on what is stored, so no kernel runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from tqc.cache.packed_tensor import extend, pack
from tqc.config import PRESETS, Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envelope

HEADS, HEAD_DIM, LONGEST = 3, 64, 400
LENGTHS = (8, 16, 32, 64, 101, 128, 256, 400)


def no_kernel(*_: Any) -> None:
    pass


def ratios(preset: str, dtype: torch.dtype, batch: int, step: bool) -> list[float]:
    """Bytes of keys and values over those of dense ones, at lengths 1 to LONGEST."""
    formats = Config.from_options({"preset": preset}).formats(HEAD_DIM, HEAD_DIM)
    new = torch.zeros(batch, HEADS, LONGEST, HEAD_DIM, dtype=dtype)
    held, result = [pack(new[:, :, :0], fmt, no_kernel) for fmt in formats], []
    for length in range(1, LONGEST + 1):
        if step:
            held = [extend(x, new[:, :, length - 1 : length], no_kernel) for x in held]
        else:
            held = [pack(new[:, :, :length], fmt, no_kernel) for fmt in formats]
        result.append(sum(x.packed_nbytes() for x in held) / (2 * new[:, :, :length].nbytes))
    return result


def row(preset: str, dtype: torch.dtype, batch: int) -> dict[str, Any]:
    both = [ratios(preset, dtype, batch, step) for step in (False, True)]
    most = [max(pair) for pair in zip(*both, strict=True)]
    found = {"preset": preset, "dtype": str(dtype).removeprefix("torch."), "batch": batch}
    found |= {f"{length}_tokens": round(most[length - 1], 3) for length in LENGTHS}
    for start in (8, 64):
        worst = max(range(start, LONGEST + 1), key=lambda length: most[length - 1])
        found |= {f"most_from_{start}": round(most[worst - 1], 3), f"most_from_{start}_at": worst}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/short_caches.json")
    presets = [name for name in PRESETS if name != "off"]
    dtypes = (torch.float32, torch.bfloat16)
    write = parser.parse_args().write
    rows = [row(preset, dtype, batch) for dtype in dtypes for preset in presets for batch in (1, 64)]
    for found in rows:
        print(found)
    if write:
        notes = ["Bytes over those of a dense cache, the larger of one call and token by token; all bytes counted."]
        envelope.write("short_caches", rows, notes)


if __name__ == "__main__":
    main()
