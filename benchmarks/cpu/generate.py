"""Decode speed, compile time and memory of the embedded model: packed cache against Inductor with a dense DynamicCache.

    python benchmarks/cpu/generate.py                      contexts of 256, 4,096 and 8,000 tokens, float32
    python benchmarks/cpu/generate.py --contexts 256 --steps 16

Models are compiled, prefilled with the same tokens and stepped in turn, one token each, so that a change of the
machine's speed meets all. `dense` is plain Inductor; `dense_rows` is Inductor with the products of few rows written as
we do (`tqc.execute.matrix_vector`), which tells the cache's share of the gain from the weights'. Compile caches are
emptied first. Rows and machine go to benchmarks/results/generate.json.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="tqc-bench-"))

import torch
from torch._functorch import config as functorch_config
from torch._inductor.compile_fx import compile_fx
from transformers import DynamicCache

import tqc
from tqc.execute import matrix_vector
from tqc.models import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envelope


class Stepper:
    """One compiled model with its own cache."""

    def __init__(self, model: torch.nn.Module, **compile_options: Any) -> None:
        self.model = copy.deepcopy(model)
        self.model.compile(**compile_options)

    def prefill(self, ids: torch.Tensor) -> float:
        self.cache = DynamicCache(config=self.model.config)
        begin = time.perf_counter()
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = out.logits[:, -1:].argmax(-1)
        return time.perf_counter() - begin

    def step(self) -> float:
        begin = time.perf_counter()
        position = torch.tensor([[self.cache.get_seq_length()]])
        out = self.model(input_ids=self.token, position_ids=position, past_key_values=self.cache, use_cache=True)
        self.token = out.logits[:, -1:].argmax(-1)
        return time.perf_counter() - begin


def inductor_with_our_products(gm: torch.fx.GraphModule, examples: list[Any]) -> Any:
    with functorch_config.patch(enable_autograd_cache=False):  # its key does not hold the decompositions
        return compile_fx(gm, examples, decompositions=matrix_vector.decompositions())


def largest_temporary(step: Any) -> int:
    """Bytes of the largest allocation during one call of `step`."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)


def dense_bf16_bytes(stepper: Stepper) -> int:
    """Bytes of the same tokens in a dense cache of bfloat16."""
    return sum(2 * tensor.numel() for layer in stepper.cache.layers for tensor in (layer.keys, layer.values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 4096, 8000])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only-packed", action="store_true", help="leave the dense model out, to profile")
    arguments = parser.parse_args()

    torch._dynamo.config.recompile_limit = 64  # of one forward function, which all models here share
    model, tokenizer = load(None, arguments.dtype)
    import pydoc_data.topics

    text = "\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    models = {"packed": Stepper(model, backend="tqai", options={"preset": arguments.preset})}
    if not arguments.only_packed:
        models["dense"] = Stepper(model, backend="inductor")
        models["dense_rows"] = Stepper(model, backend=inductor_with_our_products)
    rows = []
    with torch.no_grad():
        warm_up = {}
        for name, stepper in models.items():
            begin = time.perf_counter()
            stepper.prefill(ids[:, :64])
            first = time.perf_counter() - begin
            for _ in range(6):
                stepper.step()
            warm_up[name] = {"first_token_s": first, "compile_s": time.perf_counter() - begin}
            print(name, warm_up[name], flush=True)
        for stepper in models.values():  # a second length: dynamo makes the graphs dynamic once
            stepper.prefill(ids[:, :128])
            stepper.step()
        for context in arguments.contexts:
            row: dict[str, Any] = {"context": context}
            for name, stepper in models.items():
                row[f"{name}_prefill_s"] = stepper.prefill(ids[:, :context])
                for _ in range(3):
                    stepper.step()
            times: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(arguments.steps):
                for name, stepper in models.items():
                    times[name].append(stepper.step())
            for name, stepper in models.items():
                row[f"{name}_step_ms"] = 1e3 * statistics.median(times[name])
                row[f"{name}_cache_bytes"] = tqc.cache_bytes(stepper.cache)
            row["largest_temporary_bytes"] = largest_temporary(models["packed"].step)
            row["dense_bf16_bytes"] = dense_bf16_bytes(models["packed"])
            if "dense" in times:
                row["speedup"] = row["dense_step_ms"] / row["packed_step_ms"]
                row["speedup_over_dense_rows"] = row["dense_rows_step_ms"] / row["packed_step_ms"]
                row["memory"] = row["packed_cache_bytes"] / row["dense_cache_bytes"]
            row = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
            rows.append(row)
            print(row, flush=True)
        for row in rows:
            row.update(
                {f"{name}_{key}": round(value, 2) for name, times in warm_up.items() for key, value in times.items()}
            )
    if not arguments.only_packed:
        name = "generate" if arguments.preset == "default" else f"generate_{arguments.preset}"
        print("written to", envelope.write(name if arguments.dtype == "float32" else f"{name}_{arguments.dtype}", rows))


if __name__ == "__main__":
    main()
