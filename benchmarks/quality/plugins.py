"""Scorers and strategies on real models, losers included: benchmarks/results/plugins.json.

    python benchmarks/quality/plugins.py                          all rows
    python benchmarks/quality/plugins.py --scorers palm snapkv    some scorers
    python benchmarks/quality/plugins.py --tiers 1x4+1x1/2        some tiers; "evict" is half the tokens at 4 bits
    python benchmarks/quality/plugins.py --gemma FOLDER           Gemma-3-270m from there too

Rows that the file has are not run again (--anew does). A row is one decoding of the text through the cache and eight
questions for hidden numbers, one to two minutes on one thread by the reference's kernels; the file is written behind
each batch of rows. Bits are all-in, of a bfloat16 cache of 4,096 tokens: pages, places, scales, window, sinks, queries.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tqc.evaluate.evaluation import evaluate, parse_setting
from tqc.models import load
from tqc.plugins import plugins

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envelope

SMOLLM, GEMMA = "SmolLM2-135M", "Gemma-3-270m"
RESULT = "plugins"
UNIFORM = ("k2v2", "k2v2:w128", "k3v2", "k3v3", "k4v4")
TIERS = ("evict", "1x4+2x2/4", "1x4+1x1/2", "1x3+1x2/2", "1x4+1x2+1x1/3", "1x4+3x2/4", "1x4+1x2/2")
BATCH = 4
FIELDS = ("bits_4096", "kl_mean", "kl_p99", "perplexity_increase", "numbers_nll", "numbers_found")


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
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--anew", action="store_true")
    arguments = parser.parse_args()
    settings: list[Any] = [*arguments.uniform]
    settings += [options_of(scorer, tiers) for tiers in arguments.tiers for scorer in arguments.scorers]
    notes = [
        f"{arguments.tokens:,} tokens of Python's documentation, decoded through each cache, float32. Hidden numbers: "
        "8, in a text of as many tokens, asked for through the cache; the negative log-likelihood is theirs."
    ]
    file = envelope.RESULTS / f"{RESULT}.json"
    old = json.loads(file.read_text()) if file.exists() and not arguments.anew else {"rows": [], "notes": notes}
    rows = old["rows"] if old["notes"] == notes else []
    models: dict[str, str | None] = {SMOLLM: None, **({GEMMA: arguments.gemma} if arguments.gemma else {})}
    for model, source in models.items():
        done = {row["setting"] for row in rows if row["model"] == model}
        left = [setting for setting in settings if parse_setting(setting)[0] not in done]
        for first in range(0, len(left), BATCH):
            begin = time.monotonic()
            torch.compiler.reset()
            loaded, tokenizer = load(source, "float32")
            found = evaluate(loaded, tokenizer, left[first : first + BATCH], tokens=arguments.tokens)
            for row in found.rows:
                if row.name in done:
                    continue
                done.add(row.name)
                named = {"model": model, "setting": row.name, "options": row.options}
                rows.append(named | {name: asdict(row)[name] for name in FIELDS} | {"reason": row.reason})
                print(rows[-1], flush=True)
            envelope.write(RESULT, rows, notes)
            print(f"{model}: {first + BATCH} of {len(left)}, {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
