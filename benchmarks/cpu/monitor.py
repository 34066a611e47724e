"""What a monitor costs a step: benchmarks/results/monitor.json.

    python benchmarks/cpu/monitor.py [--context 1024] [--steps 64] [--monitors fidelity stability lyapunov]

SmolLM2, float32, default preset, Inductor. Steps of the unwatched model and of each watched one take turns on caches of
the same length; of each the median is compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from tqc.models import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envelope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--monitors", nargs="+", default=["fidelity"])
    parser.add_argument("--rest", default="inductor", help="eager to try the script")
    arguments = parser.parse_args()
    model, _ = load(None, "float32")
    ids = torch.randint(0, 1000, (1, arguments.context), generator=torch.Generator().manual_seed(0))
    runs: dict[str | None, Any] = {}
    caches: dict[str | None, Any] = {}
    times: dict[str | None, list[float]] = {name: [] for name in (None, *arguments.monitors)}
    with torch.no_grad():
        for name in times:
            options = {"rest": arguments.rest, "monitor": name}
            runs[name] = torch.compile(model, backend="tqai", options=options)
            caches[name] = DynamicCache(config=model.config)
            runs[name](ids, past_key_values=caches[name], logits_to_keep=1)
            for _ in range(4):
                runs[name](ids[:, :1], past_key_values=caches[name], logits_to_keep=1)
        for step in range(arguments.steps):
            for name in times:
                begin = time.perf_counter()
                runs[name](ids[:, step : step + 1], past_key_values=caches[name], logits_to_keep=1)
                times[name].append(time.perf_counter() - begin)
    plain = statistics.median(times[None])
    rows = [{"monitor": "none", "context": arguments.context, "step_ms": 1e3 * plain}]
    for name in arguments.monitors:
        paired = [after / before - 1 for after, before in zip(times[name], times[None], strict=True)]
        row = {"monitor": name, "context": arguments.context, "step_ms": 1e3 * statistics.median(times[name])}
        rows.append(row | {"cost_percent": 100 * statistics.median(paired)})
    for row in rows:
        print(row)
    note = "Medians of steps that take turns; the cost is the median over pairs of steps."
    envelope.write("monitor", rows, [note])


if __name__ == "__main__":
    main()
