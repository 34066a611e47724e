"""Where the time of a decode step goes, at several contexts: one stacked bar each.

    python benchmarks/cpu/step_profile.py                       256, 4,096 and 8,000 tokens, float32, default preset

The embedded model decodes by `generate`. Attention, append and the rest of the model ("weights": matrix-vector products
with what Inductor fused around them) are timed where they are called; what a forward call takes beyond these is the
framework's (dynamo's guards, wrapping, calls), and what a token takes beyond its forward call is generate's own Python.
Rows go to benchmarks/results/step_profile.json, the plot to step_profile.png beside it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from transformers import DynamicCache

from tqc.execute import chains, regions
from tqc.models import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envelope

matplotlib.use("Agg")
PARTS = ("weights", "attention", "append", "framework", "generate")


class Clock:
    """Seconds spent in wrapped functions since the last `take`, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[name] += time.perf_counter() - begin
            return result

        return timed

    def take(self) -> dict[str, float]:
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


def instrument(clock: Clock) -> None:
    """Time chains inside, by their own clock, and the regions beside them."""
    run = chains.CompiledChain.__call__

    def timed_chain(chain: chains.CompiledChain, *args: Any) -> Any:
        chain.seconds()
        result = run(chain, *args)
        for name, seconds in zip(("weights", "attention", "append"), chain.seconds(), strict=True):
            clock.seconds[name] += seconds
        return result

    chains.CompiledChain.__call__ = timed_chain  # type: ignore[method-assign]
    regions.Region.forward = clock.wrap("weights", regions.Region.forward)  # type: ignore[method-assign]


def profile(model: torch.nn.Module, ids: torch.Tensor, clock: Clock, tokens: int) -> dict[str, float]:
    """Median milliseconds a token of each part, behind a prompt of `ids`."""
    steps: list[dict[str, float]] = []
    compiled = model._compiled_call_impl

    def step(*args: Any, **kwargs: Any) -> Any:
        clock.take()
        begin = time.perf_counter()
        out = compiled(*args, **kwargs)
        end = time.perf_counter()
        steps.append({"forward": end - begin, "end": end, **clock.take()})
        return out

    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    model._compiled_call_impl = step
    try:
        model.generate(ids, past_key_values=cache, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    finally:
        model._compiled_call_impl = compiled
    rows = []
    for before, now in zip(steps[3:], steps[4:], strict=False):
        kernels = {name: now.get(name, 0.0) for name in ("weights", "attention", "append")}
        whole = now["end"] - before["end"]
        rows.append(
            {**kernels, "framework": now["forward"] - sum(kernels.values()), "generate": whole - now["forward"]}
        )
    return {part: 1e3 * statistics.median(row[part] for row in rows) for part in PARTS}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    names, bottom = [f"{row['context']:,}" for row in rows], [0.0] * len(rows)
    for part in PARTS:
        heights = [row[part] for row in rows]
        axes.bar(names, heights, bottom=bottom, label=part, width=0.6)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set(xlabel="tokens in the cache", ylabel="milliseconds a token")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 4096, 8000])
    parser.add_argument("--tokens", type=int, default=40)
    arguments = parser.parse_args()
    import pydoc_data.topics

    model, tokenizer = load(None, "float32")
    ids = tokenizer("\n".join(pydoc_data.topics.topics.values()), return_tensors="pt")["input_ids"]
    clock = Clock()
    instrument(clock)
    model.compile(backend="tqai")
    rows = []
    with torch.no_grad():
        for warm_up in (64, 128):
            profile(model, ids[:, :warm_up], clock, 8)
        for context in arguments.contexts:
            parts = profile(model, ids[:, :context], clock, arguments.tokens)
            rows.append({"context": context, **{part: round(value, 3) for part, value in parts.items()}})
            print(rows[-1], flush=True)
    written = envelope.write("step_profile", rows)
    plot(rows, written.with_suffix(".png"))
    print("written to", written)


if __name__ == "__main__":
    main()
