"""Caches of MLX against those of torch, the same model and text: benchmarks/results/mlx_quality.json.

    python benchmarks/quality/backends.py                    SmolLM2-135M-Instruct
    python benchmarks/quality/backends.py --gemma FOLDER     and Gemma-3-270m from there
    python benchmarks/quality/backends.py --resume           rows that the file does not have yet

What `tqc eval` and `tqc eval --backend mlx` measure: KL(dense || packed) of the next tokens, each backend against its
own dense run. Some ten minutes a model on one thread; the file is written behind each run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tqc.evaluate.evaluation import DENSE, evaluate
from tqc.models import load, load_mlx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envelope

SETTINGS = ("k2v2", "k3v3", "k4v4")
BACKENDS: dict[str, Callable[..., Any]] = {"torch": load, "mlx": load_mlx}


def measured(name: str, source: str | None, backend: str, tokens: int) -> list[dict[str, Any]]:
    model, tokenizer = BACKENDS[backend](source, "float32")
    torch.compiler.reset()
    found = evaluate(model, tokenizer, SETTINGS, tokens=tokens, numbers=0, on_step=lambda line: print(line, flush=True))
    return [
        {
            **{"model": name, "backend": backend, "setting": row.name, "tokens": found.tokens},
            **{"perplexity": row.perplexity, "kl_mean": row.kl_mean, "kl_p99": row.kl_p99, "reason": row.reason},
        }
        for row in found.rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemma", metavar="FOLDER", help="a folder with Gemma-3-270m")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has")
    given = parser.parse_args()
    file = envelope.RESULTS / "mlx_quality.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if given.resume else []
    for name, source in (("SmolLM2-135M", None), ("Gemma-3-270m", given.gemma)):
        if name.startswith("Gemma") and not source:
            continue
        for backend in BACKENDS:
            if any((row["model"], row["backend"]) == (name, backend) for row in rows):
                continue
            rows += measured(name, source, backend, given.tokens)
            for row in rows:
                same = {"model": row["model"], "setting": row["setting"], "backend": "torch"}
                other = next(held for held in rows if same.items() <= held.items())
                if row["backend"] == "mlx" and row["setting"] != DENSE:
                    row["kl_over_torch"] = row["kl_mean"] / other["kl_mean"]
            note = f"{given.tokens:,} tokens of Python's documentation, decoded through each cache, float32; KL in nats"
            envelope.write("mlx_quality", rows, [note], ("mlx", "mlx-lm"))


if __name__ == "__main__":
    main()
