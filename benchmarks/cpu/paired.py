"""Another version of this project against this one: two processes that take turns, call by call, on SmolLM2.

    python benchmarks/cpu/paired.py FOLDER [--contexts 256 4096 8192] [--rounds 6] [--prefills 6]

FOLDER holds a package `tqc` of the other version: its `tqc` with `passes`, `lowering` and `mlx_trace` inside. Times are
float32, the default preset. A ratio is this version's over the other's, the median over pairs of calls that followed
each other; what disturbs the machine disturbs both. Each process has a folder for compiled regions of its own, empty.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OTHER, THIS = NAMES = ("other", "this")


class Worker:
    """One version in a process: what `work` answers."""

    def __init__(self, path: str) -> None:
        environment = {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp()}
        command = [sys.executable, str(Path(__file__).resolve()), "--work", path]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def ask(self, *command: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise SystemExit(f"a process ended with {self._process.wait()}")


def work() -> None:
    from pydoc_data.topics import topics

    import torch
    from transformers import DynamicCache

    import tqc
    from tqc.models import load

    torch._dynamo.config.recompile_limit = 64
    model, tokenizer = load(None, "float32")
    ids = tokenizer("\n".join(topics.values()), return_tensors="pt")["input_ids"]
    model.compile(backend="tqai", options={"preset": "default"})
    cache = DynamicCache(config=model.config)
    token = ids[:, :1]

    def prefill(count: int) -> float:
        nonlocal cache, token
        cache = DynamicCache(config=model.config)
        begin = time.perf_counter()
        logits = model(input_ids=ids[:, :count], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
        return time.perf_counter() - begin

    def steps(count: int) -> list[float]:
        nonlocal token
        times = []
        for _ in range(count):
            begin = time.perf_counter()
            positions = torch.tensor([[cache.get_seq_length()]])
            logits = model(input_ids=token, position_ids=positions, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            times.append(time.perf_counter() - begin)
        return times

    def first() -> float:
        """Seconds until prompts and steps are compiled."""
        begin = time.perf_counter()
        prefill(64)
        steps(6)
        prefill(128)
        steps(1)
        return time.perf_counter() - begin

    def memory() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    functions = {"prefill": prefill, "steps": steps, "first": first, "memory": memory, "file": lambda: tqc.__file__}
    with torch.no_grad():
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print("@" + json.dumps(functions[name](*arguments)), flush=True)


def compared(name: str, times: dict[str, list[float]], unit: str) -> dict[str, Any]:
    ratios = [this / other for other, this in zip(times[OTHER], times[THIS], strict=True)]
    low, middle, high = (
        statistics.quantiles(ratios, n=4) if len(ratios) > 3 else (min(ratios), statistics.median(ratios), max(ratios))
    )
    medians = {key: float(f"{statistics.median(times[key]):.4g}") for key in NAMES}
    row = {"what": name, "unit": unit, **medians, "ratio": round(middle, 4)}
    return {**row, "quarters": f"{low:.3f} to {high:.3f}", "pairs": len(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=6, help="of eight steps each, a context")
    parser.add_argument("--prefills", type=int, default=6, help="of 256 tokens; fewer of longer prompts")
    parser.add_argument("--write", action="store_true", help="benchmarks/results/paired.json")
    arguments = parser.parse_args()
    if arguments.work is not None:
        work()
        return
    if arguments.folder is None or not (arguments.folder / "tqc" / "__init__.py").is_file():
        parser.error(f"FOLDER holds no package tqc; got {arguments.folder}")
    workers = dict(zip(NAMES, (Worker(str(arguments.folder)), Worker("")), strict=True))
    for name, worker in workers.items():
        print(name, worker.ask("file"), flush=True)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        print(row, flush=True)
        rows.append(row)

    def in_turn(times: int, *command: Any) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in NAMES}
        for turn in range(times):
            for name in NAMES if turn % 2 == 0 else NAMES[::-1]:
                answer = workers[name].ask(*command)
                found[name] += answer if isinstance(answer, list) else [answer]
        return found

    add(compared("compile", in_turn(1, "first"), "s"))
    for context in arguments.contexts:
        count = max(1, arguments.prefills * 256 // context)
        add(compared(f"prefill of {context:,} tokens", in_turn(count, "prefill", context), "s"))
        in_turn(1, "steps", 3)
        add(compared(f"step at {context:,} tokens", in_turn(arguments.rounds, "steps", 8), "s"))
    add(compared("peak memory", in_turn(1, "memory"), "MiB"))
    if arguments.write:
        sys.path.insert(0, str(ROOT))
        from benchmarks.envelope import write

        write("paired", rows)


if __name__ == "__main__":
    main()
