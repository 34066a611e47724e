"""Programs of `tqc.compile_mlx` against mlx-lm's own models: benchmarks/results/mlx_overhead.json and mlx_memory.json.

    python -m benchmarks.mlx_decode             all, some minutes, on a machine that does nothing else
    python -m benchmarks.mlx_decode --quick     few tokens, printed only

overhead: a token of `mlx_lm.generate.generate_step` with preset="off", where programs do what the model does; a llama
of four small layers, and SmolLM2-135M in float32. Both decode in turns behind the same prompt.
memory: bytes of caches with random tokens, and the peak of memory of decode steps behind them (`mx.get_peak_memory`),
weights left out, for the model itself and packed to K4/V4.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache

from benchmarks import envelope
from tqc import compile_mlx, decompile_mlx
from tqc.mlx_trace.compile import copied
from tqc.mlx_trace.files import bytes_of
from tqc.models import load_mlx

ROUNDS, TOKENS, PROMPT = 5, 32, 128
HELD, STEPS = 8192, 3


def small(heads: int = 4, head_dim: int = 16, layers: int = 4) -> nn.Module:
    sizes = {"hidden_size": heads * head_dim, "intermediate_size": 2 * heads * head_dim, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": head_dim}
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs(model_type="llama", rms_norm_eps=1e-5, vocab_size=1000, **sizes))
    mx.eval(model.parameters())
    return model


def token_times(model: nn.Module, tokens: int) -> list[float]:
    """Seconds of each token behind a prompt."""
    mx.random.seed(1)
    steps: Iterator[Any] = generate_step(mx.random.randint(0, 1000, (PROMPT,)), model, max_tokens=tokens + 4)
    for _ in range(4):  # prompt, programs and buffers
        next(steps)
    made, begin = [], time.perf_counter()
    for _ in steps:
        now = time.perf_counter()
        made.append(now - begin)
        begin = now
    return made


def overhead(name: str, plain: nn.Module, rounds: int, tokens: int) -> dict[str, Any]:
    models = {"mlx-lm": plain, "tqc, off": compile_mlx(copied(plain), strict=True, preset="off")}
    for model in models.values():
        token_times(model, 4)
    medians: dict[str, list[float]] = {what: [] for what in models}
    for _ in range(rounds):
        for what, model in models.items():
            medians[what].append(statistics.median(token_times(model, tokens)))
    # What else the machine does makes a round slower, never faster.
    best = {what: min(found) for what, found in medians.items()}
    own, ours = best.values()
    rounds_ = {f"rounds of {what}, ms": [round(1e3 * held, 3) for held in found] for what, found in medians.items()}
    return {"what": "overhead", "model": name, "mlx-lm, ms": 1e3 * own, "tqc, ms": 1e3 * ours,
            "ratio": ours / own, **rounds_}  # fmt: skip


def memory(name: str, plain: nn.Module, held: int) -> Iterator[dict[str, Any]]:
    """Rows for the model itself, its programs, and packed caches."""
    before: dict[str, int] = {}
    for what, options in (("mlx-lm", None), ("tqc, off", {"preset": "off"}), ("tqc K4/V4", {"bits_k": 4, "bits_v": 4})):
        model = copied(plain)
        if options is not None:
            compile_mlx(model, strict=True, **options)
        caches = make_prompt_cache(model)
        fill(plain, caches, held - 1)
        step(model, caches)  # packs what was filled in
        size = bytes_of(caches)
        step(model, caches)
        mx.clear_cache()
        weights = mx.get_active_memory() - bytes_of(caches)
        mx.reset_peak_memory()
        for _ in range(STEPS):
            step(model, caches)
        peak, roomy = mx.get_peak_memory() - weights, bytes_of(caches)
        dense = 2 * held * len(caches) * numbers(plain)
        before.setdefault("peak", peak)
        yield {"what": "memory", "model": name, "cache": what, "tokens": held, "cache_bytes": size,
               "of float16": size / dense, "with room for more": roomy, "peak": peak,
               "peak of dense": peak / before["peak"]}  # fmt: skip
        decompile_mlx(model)
        del caches


def step(model: nn.Module, caches: list[Any]) -> None:
    mx.eval(model(mx.zeros((1, 1), mx.int32), cache=caches), [cache.state for cache in caches])


def numbers(model: nn.Module) -> int:
    """Keys and values of a token and layer."""
    attention = model.layers[0].self_attn
    return 2 * attention.n_kv_heads * (attention.k_proj.weight.shape[0] // attention.n_kv_heads)


def fill(model: nn.Module, caches: list[Any], count: int) -> None:
    """Random tokens in every cache, as a prompt would have left them, in the model's dtype."""
    dtype = model.layers[0].self_attn.k_proj.weight.dtype
    heads = model.layers[0].self_attn.n_kv_heads
    for cache in caches:
        cache.update_and_fetch(*(mx.random.normal((1, heads, count, numbers(model) // 2 // heads)).astype(dtype)
                                 for _ in range(2)))  # fmt: skip
    mx.eval([cache.state for cache in caches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a round of few tokens, and nothing written")
    parser.add_argument("--only", choices=("overhead", "memory"))
    given = parser.parse_args()
    rounds, tokens, held = (2, 12, 1024) if given.quick else (ROUNDS, TOKENS, HELD)
    packages = ("mlx", "mlx-lm")
    real = load_mlx(None, "float32")[0].model
    rows: list[dict[str, Any]] = []
    if given.only != "memory":
        for name, model in (("llama, 4 layers of 64", small()), ("SmolLM2-135M", real)):
            rows.append(overhead(name, model, rounds, tokens))
            print(rows[-1], flush=True)
        if not given.quick:
            notes = ["the least of the medians of all rounds; float32; ratio is tqc over mlx-lm"]
            envelope.write("mlx_overhead", rows, notes, packages)
    if given.only != "overhead":
        rows = []
        wide = small(heads=16, head_dim=128, layers=4)
        wide.set_dtype(mx.float16)
        real.set_dtype(mx.float16)
        for name, model in (("llama, 8 key heads of 128", wide), ("SmolLM2-135M", real)):
            for row in memory(name, model, held):
                print(row, flush=True)
                rows.append(row)
        if not given.quick:
            notes = ["bytes, float16, weights left out; room for more is a few tokens later"]
            envelope.write("mlx_memory", rows, notes, packages)


if __name__ == "__main__":
    main()
