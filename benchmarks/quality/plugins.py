"""Scorers and strategies on real models, losers included: benchmarks/results/plugins.json.

    python benchmarks/quality/plugins.py                          all rows
    python benchmarks/quality/plugins.py --scorers palm snapkv    some scorers
    python benchmarks/quality/plugins.py --tiers 1x4+1x1/2        some tiers; "evict" is half the tokens at 4 bits
    python benchmarks/quality/plugins.py --gemma FOLDER           Gemma-3-270m from there, and no other
    python benchmarks/quality/plugins.py --widths FILE            also widths that `tqc calibrate --widths 1..4` found

Rows that the file has are not run again. A row takes 15 to 30 s on one thread (see direct.py); the file is written
behind each. Bits are all-in, of a bfloat16 cache of 4,096 tokens: pages, places, scales, window, sinks, queries.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from direct import Bench

from tqc.config import Config
from tqc.evaluate.evaluation import parse_setting
from tqc.models import load
from tqc.plugins import plugins

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envelope

SMOLLM, GEMMA = "SmolLM2-135M", "Gemma-3-270m"
RESULT = "plugins"
UNIFORM = ("k8v8", "k2v2", "k2v2:w128", "k2v2:w160", "k3v2", "k3v3", "k4v4")
TIERS = ("evict", "1x4+2x2/4", "1x4+1x2+2x1/4", "1x4+3x2/4", "2x4+2x2/4")
BUDGETS = (2.0, 2.25, 2.75)  # of calibrated widths
PROMPTS = 2


def options_of(scorer: str, tiers: str) -> dict[str, Any]:
    """The backend's options of one row."""
    if tiers == "evict":
        return {"strategy": "evict", "keep": 0.5, "bits_k": 4, "bits_v": 4, "scorer": scorer}
    return {"strategy": "tiered", "tiers": tiers, "scorer": scorer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scorers = [name for name, plugin in plugins().items() if plugin.kind == "scorer"]
    parser.add_argument("--scorers", nargs="+", choices=scorers, default=scorers)
    parser.add_argument("--tiers", nargs="+", default=TIERS)
    parser.add_argument("--uniform", nargs="*", default=UNIFORM, help="settings without a strategy to compare with")
    parser.add_argument("--gemma", metavar="FOLDER")
    parser.add_argument("--widths", metavar="FILE")
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    settings: list[Any] = [*arguments.uniform]
    settings += [options_of(scorer, tiers) for tiers in arguments.tiers for scorer in arguments.scorers]
    notes = [
        f"{arguments.tokens:,} tokens of Python's documentation, decoded through each cache, float32, scored from "
        f"position 256 on. Hidden numbers: {PROMPTS} texts of as many tokens with 8 each, asked for through the cache; "
        "the negative log-likelihood is theirs. k8v8 stands for the dense cache."
    ]
    file = envelope.RESULTS / f"{RESULT}.json"
    old = json.loads(file.read_text()) if file.exists() else {"rows": [], "notes": notes}
    rows = old["rows"] if old["notes"] == notes else []
    model = GEMMA if arguments.gemma else SMOLLM
    done = {row["setting"] for row in rows if row["model"] == model}
    with torch.no_grad():
        bench = Bench(*load(arguments.gemma, "float32"), arguments.tokens, PROMPTS)
        named = [parse_setting(setting) for setting in settings]
        for bits in BUDGETS if arguments.widths else ():
            named.append((f"calibrated, {bits:g} code bits, w96", {"widths": arguments.widths, "budget_bits": bits}))
        for name, options in named:
            begin = time.monotonic()
            if name not in done:
                found = bench.row(Config.from_options(options))
                shown = options | ({"widths": "tqc calibrate --widths 1..4"} if "widths" in options else {})
                rows.append({"model": model, "setting": name, "options": shown} | found)
                envelope.write(RESULT, rows, notes)
                print(f"{time.monotonic() - begin:.0f} s", rows[-1], flush=True)


if __name__ == "__main__":
    main()
