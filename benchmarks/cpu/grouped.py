"""What groups of tokens cost and gain on the CPU: benchmarks/results/grouped.json.

    python benchmarks/cpu/grouped.py [--quick]

Attention of one decode step at 8,192 tokens, ours interleaved with 4 bits for all tokens; and a step of SmolLM2 decoded
behind a prompt with and without a strategy, the steps in which a group leaves the window included. Of attention the
least time of a call, both threads.
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

from tqc.cache.packed_tensor import pack
from tqc.config import Config
from tqc.lowering.select import choose
from tqc.models import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envelope

TOKENS = 8192
UNIFORM: dict[str, Any] = {"bits_k": 4, "bits_v": 4}
STRATEGIES: dict[str, dict[str, Any]] = {
    "evict half, 4 bits": {**UNIFORM, "strategy": "evict", "keep": 0.5, "scorer": "keydiff"},
    "tiered 1x4+2x2/4": {"strategy": "tiered", "tiers": "1x4+2x2/4", "scorer": "palm"},
    "tiered 1x4+3x2/4": {"strategy": "tiered", "tiers": "1x4+3x2/4", "scorer": "palm"},
}
SHAPES = {"SmolLM2 (9 heads on 3 of 64)": (9, 3, 64), "Llama 3 8B (32 heads on 8 of 128)": (32, 8, 128)}


def attention(options: dict[str, Any], shape: tuple[int, int, int], tokens: int) -> tuple[Any, int]:
    """A call of one step's attention, and the bytes of its cache."""
    query_heads, heads, dim = shape
    generator = torch.Generator().manual_seed(0)
    made = []
    score = torch.rand(1, heads, tokens, generator=generator)
    for fmt in Config.from_options(options).formats(dim, dim, repeats=query_heads // heads):
        provider, _ = choose(fmt, fmt, torch.float32, "cpu")
        x = torch.randn(1, heads, tokens, dim, generator=generator)
        made.append(pack(x, fmt, provider.kernels.append, None, (score, None) if fmt.groups else ()))
    keys, values = made
    query, key, value = (torch.randn(1, n, 1, dim, generator=generator) for n in (query_heads, heads, heads))
    parts = (keys.pages, keys.dense, keys.state, values.pages, values.dense, values.state)
    rest = (key, value, None, None, None, dim**-0.5, 0.0, False, keys.fmt.spec, values.fmt.spec)
    size = keys.packed_storage.nbytes + values.packed_storage.nbytes
    return lambda: provider.kernels.attend(query, *parts, *rest), size


def least_seconds(calls: list[Any], rounds: int) -> list[float]:
    """Of each call, all of them in turn."""
    spent: list[list[float]] = [[] for _ in calls]
    for index in range(rounds + 5):
        for call, found in zip(calls, spent, strict=True):
            begin = time.perf_counter()
            call()
            if index >= 5:
                found.append(time.perf_counter() - begin)
    return [min(found) for found in spent]


def attention_rows(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for name, shape in SHAPES.items():
        for strategy, options in STRATEGIES.items():
            (plain, plain_bytes), (ours, ours_bytes) = (attention(o, shape, TOKENS) for o in (UNIFORM, options))
            base, spent = least_seconds([plain, ours], rounds)
            rows.append(
                {"what": f"attention of a step at {TOKENS} tokens", "shape": name, "setting": strategy}
                | {"us": round(spent * 1e6, 1), "us_uniform_4_bits": round(base * 1e6, 1)}
                | {"ratio": round(spent / base, 3), "bytes_ratio": round(ours_bytes / plain_bytes, 3)}
            )
            print(rows[-1], flush=True)
    return rows


def decode_rows(prompt: int, steps: int) -> list[dict[str, Any]]:
    model, _ = load(None, "float32")
    ids = torch.randint(0, 49152, (1, prompt), generator=torch.Generator().manual_seed(0))
    settings = {"k3v3": {}, "palm, tiered 1x4+3x2/4": STRATEGIES["tiered 1x4+3x2/4"]}
    times: dict[str, list[float]] = {name: [] for name in settings}
    caches = {name: DynamicCache(config=model.config) for name in settings}
    compiled = {name: torch.compile(model, backend="tqai", options=options) for name, options in settings.items()}
    one = torch.tensor([[7]])
    with torch.no_grad():
        for name in settings:
            for _ in range(2):  # a graph is compiled at its second call
                caches[name] = DynamicCache(config=model.config)
                compiled[name](ids, past_key_values=caches[name], use_cache=True, logits_to_keep=1)
                for _ in range(3):
                    compiled[name](one, past_key_values=caches[name], use_cache=True)
        for _ in range(steps):
            for name in settings:
                begin = time.perf_counter()
                compiled[name](one, past_key_values=caches[name], use_cache=True)
                times[name].append(time.perf_counter() - begin)
    base = statistics.fmean(times["k3v3"])
    return [
        {"what": f"step of SmolLM2 behind {prompt} tokens", "setting": name, "steps": steps}
        | {"mean_ms": round(statistics.fmean(found) * 1e3, 2), "median_ms": round(statistics.median(found) * 1e3, 2)}
        | {"slowest_ms": round(max(found) * 1e3, 1), "ratio_of_means": round(statistics.fmean(found) / base, 3)}
        for name, found in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing written")
    quick = parser.parse_args().quick
    rows = attention_rows(5 if quick else 200)
    rows += decode_rows(300, 4 if quick else 256)
    print(*rows, sep="\n")
    if not quick:
        envelope.write("grouped", rows)


if __name__ == "__main__":
    main()
