"""Decode speed and cache bytes of the exported embedded model in plain onnxruntime: packed against dense.

    python benchmarks/onnx_export.py                        contexts of 1,024, 4,096 and 8,000 tokens, float32
    python benchmarks/onnx_export.py --contexts 256 --steps 8 --profile

Both are exported by the same road (`compress=False` for the dense one, whose cache grows by concatenation), filled with
the same tokens in chunks, and stepped in turn, one token each, so that a change of the machine's speed meets all. Cache
bytes are those of all tensors, at a capacity of the context and the steps. `--profile` prints where the packed steps'
time goes, by operator. `--write` puts rows and machine into benchmarks/results/onnx.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

import tqc
from tqc.export.generator import OnnxGenerator
from tqc.models import load

sys.path.insert(0, str(Path(__file__).resolve().parent))
import envelope

CHUNK = 256


def fill(generator: OnnxGenerator, ids: np.ndarray) -> float:
    """Seconds that the tokens took, in chunks."""
    generator.reset(1)
    begin = time.perf_counter()
    for at in range(0, ids.shape[1], CHUNK):
        generator.step(ids[:, at : at + CHUNK])
    return time.perf_counter() - begin


def step(generator: OnnxGenerator, token: int) -> float:
    begin = time.perf_counter()
    generator.step(np.array([[token]]))
    return time.perf_counter() - begin


def profile(folder: Path, ids: np.ndarray, steps: int) -> Counter[str]:
    """Milliseconds of a packed step by operator."""
    generator = OnnxGenerator(folder)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    generator.session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    fill(generator, ids)
    first = len(range(0, ids.shape[1], CHUNK))
    for _ in range(steps):
        step(generator, 5)
    events = json.loads(Path(generator.session.end_profiling()).read_text())
    runs = sorted(event["ts"] for event in events if event["name"] == "model_run")
    spent: Counter[str] = Counter()
    for event in events:
        if event["name"].endswith("_kernel_time") and event["ts"] >= runs[first]:
            spent[event["args"]["op_name"]] += event["dur"] / 1e3 / steps
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 8000])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--presets", nargs="+", default=["default"])
    parser.add_argument("--model", default=None)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/onnx.json")
    arguments = parser.parse_args()

    model, _ = load(arguments.model, "float32")
    vocabulary = model.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, max(arguments.contexts)))
    rows = []
    for context in arguments.contexts:
        row: dict[str, Any] = {"context": context}
        with tempfile.TemporaryDirectory() as folder:
            generators = {}
            for name in ("dense", *arguments.presets):
                how = {"compress": False} if name == "dense" else {"preset": name}
                begin = time.perf_counter()
                out = tqc.export_onnx(model, Path(folder) / name, max_cache_len=context + arguments.steps + 8, **how)
                row[f"{name}_export_s"] = time.perf_counter() - begin
                begin = time.perf_counter()
                generators[name] = OnnxGenerator(out)
                row[f"{name}_load_s"] = time.perf_counter() - begin
            for name, generator in generators.items():
                row[f"{name}_prefill_s"] = fill(generator, ids[:, :context])
                for _ in range(3):
                    step(generator, 5)
            times: dict[str, list[float]] = {name: [] for name in generators}
            for _ in range(arguments.steps):
                for name, generator in generators.items():
                    times[name].append(step(generator, 5))
            for name, generator in generators.items():
                row[f"{name}_step_ms"] = 1e3 * statistics.median(times[name])
                row[f"{name}_cache_bytes"] = generator.cache_bytes
            for name in arguments.presets:
                row[f"{name}_speed"] = row["dense_step_ms"] / row[f"{name}_step_ms"]
                row[f"{name}_memory"] = row[f"{name}_cache_bytes"] / row["dense_cache_bytes"]
            generators.clear()
            if arguments.profile:
                for name in arguments.presets:
                    spent = profile(Path(folder) / name, ids[:, :context], 4)
                    print(name, {kind: round(ms, 2) for kind, ms in spent.most_common(14)}, flush=True)
        rows.append({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
        print(rows[-1], flush=True)
    if arguments.write:
        print("written to", envelope.write("onnx", rows, packages=["onnx", "onnxruntime"]))


if __name__ == "__main__":
    main()
