"""Decoding speed, prefill speed and peak memory of the embedded model on the CPU: tqc beside every other way to run it.

    python benchmarks/cpu/generate_peers.py                          all, into benchmarks/results/generate_peers.json
    python benchmarks/cpu/generate_peers.py --only "llama.cpp q8_0"  these rows again; each has its own date
    python benchmarks/cpu/generate_peers.py --prepare                only set up, convert and compile: not to be timed

Every row is a fresh process in the peer's own environment (`peers/setup.py`), two threads, the same text: a prefill of
each context and then decoding one token at a time through the cache. Results are written after each row. A peer that
cannot be installed or run has the reason in its row. Some peers read the file's 4-bit weights and some those weights in
float32: between these only the increase from the shortest to the longest context can be compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
import envelope
import setup

NAME = "generate_peers"
THREADS = 2


@dataclass(frozen=True)
class Peer:
    """A row.

    Attributes:
        environment: of `peers/setup.py`; "" is this one.
        runner: peers/run_RUNNER.py.
        settings: what the runner is told beyond what it tells all.
        weights: as they are read while decoding.
        cache: how it holds keys and values.
    """

    name: str
    environment: str
    runner: str
    settings: dict[str, Any]
    weights: str
    cache: str


def _torch(name: str, environment: str, kind: str, backend: str | None, cache: str, **settings: Any) -> Peer:
    settings = {"cache": kind, "backend": backend, **settings}
    return Peer(name, environment, "transformers", settings, "float32", cache)


# What the others' predictions are compared with; measured first, so that it is there.
REFERENCE = _torch("eager, DynamicCache", "", "dynamic", None, "float32")
PEERS = (
    REFERENCE,
    _torch("tqc default", "", "dynamic", "tqai", "3 bits", options={"preset": "default"}),
    _torch("tqc kv-only", "", "dynamic", "tqai", "4 and 2 bits", options={"preset": "kv-only"}),
    _torch("Inductor, DynamicCache", "", "dynamic", "inductor", "float32"),
    _torch("Inductor, StaticCache", "", "static", "inductor", "float32"),
    _torch("transformers hqq", "hqq", "hqq", None, "4 bits"),
    _torch("transformers quanto", "quanto", "quanto", None, "4 bits"),
    _torch("tqai 0.6.1", "tqai", "tqai", None, "4 and 2 bits, decoded to float32"),
    *(
        Peer(
            f"llama.cpp {cache}, {weights}",
            "llama.cpp",
            "llama_cpp",
            {"cache": cache, "weights": weights},
            {"file": "4 bits", "f32": "float32"}[weights],
            cache,
        )
        for weights, caches in (("f32", ("f16", "q8_0")), ("file", ("f16", "q8_0", "q4_0")))
        for cache in caches
    ),
    *(
        Peer(f"OpenVINO {kind}", "openvino", "openvino", {"cache": kind}, "4 bits", kind)
        for kind in ("f32", "u8", "u4")
    ),
    Peer("vLLM", "vllm", "vllm", {"cache": "auto"}, "float32", "float32"),
)


@dataclass
class Results:
    """benchmarks/results/generate_peers.json, written whenever a row is added."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, row: dict[str, Any]) -> None:
        file = envelope.RESULTS / f"{NAME}.json"
        if file.exists():  # read anew: another process may have added to it
            self.rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
        self.rows[row["name"]] = row
        reference = self.rows.get(REFERENCE.name, {}).get("predictions", {})
        for context, own in row.get("predictions", {}).items():
            other = reference.get(context, [])
            if own and len(own) == len(other):
                row[f"same_{context}"] = round(sum(a == b for a, b in zip(own, other, strict=True)) / len(own), 3)
        if row["name"] != REFERENCE.name:
            row.pop("predictions", None)
        rows = [self.rows[peer.name] for peer in PEERS if peer.name in self.rows]
        notes = [
            "Times of decoding are medians over the steps. Peak memory is that of the whole process, so for torch it "
            "holds torch itself and float32 weights. The increase is that of the time of a token from the shortest to "
            "the longest context: between rows whose weights differ it is what to compare. Same tokens: how often the "
            "prediction is that of the eager dense run, fed the same text."
        ]
        envelope.write(NAME, rows, notes)


def run(peer: Peer, given: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The lines that a runner printed, and why it stopped before its end, or ""."""
    script = Path(__file__).parent / "peers" / f"run_{peer.runner}.py"
    command = [str(setup.python(peer.environment)), str(script), json.dumps({**given, **peer.settings})]
    # Compiled code is kept, so that the process that measures does not compile.
    compiled = setup.FOLDER / f"inductor-{peer.settings.get('backend')}"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=given["limit_s"], env=environment)
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return _lines(output), f"stopped after {given['limit_s']} s"
    errors = [line.strip() for line in result.stderr.splitlines() if line.strip()] or [f"exit code {result.returncode}"]
    return _lines(result.stdout), errors[-1][:300] if result.returncode else ""


def _lines(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"context"')]


def read_bandwidth() -> float:
    """GB/s at which two threads read memory: says whether the machine was itself when a row was measured."""
    block, times = torch.ones(1 << 25, dtype=torch.int64), []
    for _ in range(10):
        begin = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - begin)
    return block.nbytes / min(times) / 1e9


def measure(peer: Peer, given: dict[str, Any]) -> dict[str, Any]:
    """The row of a peer."""
    row: dict[str, Any] = {
        "name": peer.name,
        "weights": peer.weights,
        "cache": peer.cache,
        "date": datetime.date.today().isoformat(),
        "read_gb_s": round(read_bandwidth(), 1),
    }
    found, reason = run(peer, given)
    if reason:
        row["reason"] = reason
    for line in found:
        context = line["context"]
        row[f"ms_{context}"] = round(line["step_ms"], 2)
        row[f"prefill_tokens_s_{context}"] = round(context / line["prefill_s"], 1)
        row[f"peak_mb_{context}"] = round(line["peak_mb"])
        row.setdefault("predictions", {})[str(context)] = line["tokens"]
        row["versions"] = line["versions"]
    if len(found) > 1 and not reason:
        row["increase_ms"] = round(found[-1]["step_ms"] - found[0]["step_ms"], 2)
    return row


def text_tokens(folder: Path) -> tuple[Path, str]:
    """A file with the token ids of Python's documentation, and the model's folder."""
    import pydoc_data.topics

    from tqc.models import load

    model, tokenizer = load(None, "float32")
    ids = tokenizer("\n".join(pydoc_data.topics.topics.values()))["input_ids"]
    file = folder / "tokens.json"
    file.write_text(json.dumps(ids[:16384]))
    return file, model.name_or_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[peer.name for peer in PEERS])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 1024, 4096, 8000])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--prepare", action="store_true", help="measure nothing")
    parser.add_argument("--prepared", action="store_true", help="the same machine ran --prepare before")
    parser.add_argument("--limit", type=int, default=1800, help="seconds that one process may take")
    arguments = parser.parse_args()
    del sys.argv[1:]  # the file holds the rows of all calls

    from tqc.models import embedded_gguf

    torch.set_num_threads(THREADS)
    setup.FOLDER.mkdir(parents=True, exist_ok=True)
    tokens, model = text_tokens(setup.FOLDER)
    given = {
        "contexts": arguments.contexts,
        "steps": arguments.steps,
        "threads": THREADS,
        "limit_s": arguments.limit,
        "folder": str(setup.FOLDER),
        "tokens": str(tokens),
        "model": model,
        "gguf": str(embedded_gguf()),
    }
    results = Results()
    for peer in PEERS:
        if arguments.only and peer.name not in arguments.only:
            continue
        reason = ""
        if not arguments.prepared:
            if peer.environment:
                reason = setup.set_up(peer.environment)["error"] or ""
            if not reason:
                _, reason = run(peer, {**given, "prepare": True})
            print("prepared", peer.name, reason, flush=True)
        if arguments.prepare:
            continue
        if reason:
            results.add({"name": peer.name, "weights": peer.weights, "cache": peer.cache, "reason": reason})
        else:
            row = measure(peer, {**given, "prepare": False})
            print({key: value for key, value in row.items() if key != "predictions"}, flush=True)
            results.add(row)


if __name__ == "__main__":
    main()
