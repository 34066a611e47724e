"""Decode speed and cache bytes of the exported embedded model in plain onnxruntime: packed against dense.

    python benchmarks/onnx_export.py                        contexts of 1,024, 4,096 and 8,000 tokens, float32
    python benchmarks/onnx_export.py --contexts 256 --steps 8 --profile
    python benchmarks/onnx_export.py --folder build/onnx    exports are kept there, and taken from there

Both are exported by the same road (`compress=False` for the dense one, whose cache grows by concatenation), filled with
the same tokens in chunks, and stepped in turn, one token each, so that a change of the machine's speed meets all. Cache
bytes are those of all tensors at a capacity of the context. `--profile` prints where a step's time goes, by operator.
`--write` puts rows and machine into benchmarks/results/onnx.json.
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
from tqc.format import PackedFormat
from tqc.lowering.onnx.layout import parts_of
from tqc.models import load

sys.path.insert(0, str(Path(__file__).resolve().parent))
import envelope

CHUNK = 256
SPARE = 64  # tokens of the capacity behind the longest context


def fill(generator: OnnxGenerator, ids: np.ndarray) -> float:
    """Seconds that the tokens behind those that are there took, in chunks."""
    begin = time.perf_counter()
    for at in range(generator.length, ids.shape[1], CHUNK):
        generator.step(ids[:, at : at + CHUNK])
    return time.perf_counter() - begin


def step(generator: OnnxGenerator, token: int) -> float:
    begin = time.perf_counter()
    generator.step(np.array([[token]]))
    return time.perf_counter() - begin


def cache_bytes(generator: OnnxGenerator, context: int) -> int:
    """Of a cache with room for `context` tokens."""
    total = 0
    for cache in generator.metadata["packed"]:
        fmt, heads = PackedFormat.parse(cache["spec"]), cache["parts"]["window"][1]
        for part in parts_of(fmt, heads, context):
            total += int(np.prod(part.shape)) * np.dtype(part.dtype or cache["dtype"]).itemsize
    for cache in generator.metadata["dense"]:
        tokens = min(context, cache["window"] or context)
        total += tokens * cache["heads"] * cache["head_dim"] * np.dtype(cache["dtype"]).itemsize
    return total


def profile(folder: Path, ids: np.ndarray, steps: int) -> Counter[str]:
    """Milliseconds of a step by operator."""
    generator = OnnxGenerator(folder)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    generator.session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    generator.reset(1)
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


def export(model: Any, folder: Path, name: str, capacity: int) -> float | None:
    """Seconds that it took; None for what is there already."""
    if folder.is_dir():
        return None
    how = {"compress": False} if name == "dense" else {"preset": name}
    begin = time.perf_counter()
    tqc.export_onnx(model, folder, max_cache_len=capacity, **how)
    return time.perf_counter() - begin


def measure(generators: dict[str, OnnxGenerator], ids: np.ndarray, context: int, steps: int) -> dict[str, Any]:
    row: dict[str, Any] = {"context": context}
    for name, generator in generators.items():
        row[f"{name}_fill_s"] = fill(generator, ids[:, :context])
        step(generator, 5)
    times: dict[str, list[float]] = {name: [] for name in generators}
    for _ in range(steps):
        for name, generator in generators.items():
            times[name].append(step(generator, 5))
    for name, generator in generators.items():
        row[f"{name}_step_ms"] = 1e3 * statistics.median(times[name])
        row[f"{name}_tokens_per_s"] = 1 / statistics.median(times[name])
        row[f"{name}_cache_bytes"] = cache_bytes(generator, context)
        row[f"{name}_speed"] = row["dense_step_ms"] / row[f"{name}_step_ms"]
        row[f"{name}_memory"] = row[f"{name}_cache_bytes"] / row["dense_cache_bytes"]
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 8000])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--presets", nargs="+", default=["default"])
    parser.add_argument("--model", default=None)
    parser.add_argument("--folder", type=Path, help="of exports that are kept")
    parser.add_argument("--export-only", action="store_true", help="measure nothing")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/onnx.json")
    arguments = parser.parse_args()

    model, _ = load(arguments.model, "float32")
    vocabulary = model.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, max(arguments.contexts)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        names = ["dense", *arguments.presets]
        for name in names:
            seconds = export(model, folder / name, name, max(arguments.contexts) + SPARE)
            print(name, "was there" if seconds is None else f"exported in {seconds:.1f} s", flush=True)
        if arguments.export_only:
            return
        del model
        generators = {name: OnnxGenerator(folder / name) for name in names}
        rows = []
        for context in sorted(arguments.contexts):
            rows.append(measure(generators, ids, context, arguments.steps))
            print(rows[-1], flush=True)
        generators.clear()
        if arguments.profile:
            for name in names:
                spent = profile(folder / name, ids, 4)
                print(name, {kind: round(ms, 2) for kind, ms in spent.most_common(14)}, flush=True)
    if arguments.write:
        print("written to", envelope.write("onnx", rows, packages=["onnx", "onnxruntime"]))


if __name__ == "__main__":
    main()
