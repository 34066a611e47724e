"""Strategies, searched plans and diffusers' own caches on the trained DiT: benchmarks/results/diffusion.json.

    python benchmarks/diffusion/digits.py --out build/digits            trains it, once
    python benchmarks/diffusion/strategies.py --model build/digits      all rows (--quick: a few, and no file)

Rows that the file has are not run again.

A row is one way to generate 20 images in 30 steps of DDIM with guidance, from the same noise: operations (a multiply
and an add are two; attention's are its two products, those of queries, keys, values and outputs count in the total),
seconds of the whole call, PSNR of the images in [0, 1] against those of the full run, and how many a classifier of real
digits takes for what was asked. Plans compute some steps and forecast all blocks in the others; which steps is searched
on other noise.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import tqc
from tqc.diffusion.dispatcher import dispatcher_of
from tqc.diffusion.plan import Cell, Plan, Schedule

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import envelope
from digits import load_pipeline
from hooks import Hooked, calibrate, settings

STEPS, EACH, GUIDANCE = 30, 2, 3.0
EAGER = {"rest": "eager"}
F = torch.nn.functional


class Operations(TorchFunctionMode):
    """Counts them where torch functions are called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter(attention=0, total=0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, key = given["query"], given["key"]
            count = 4 * query.numel() * key.shape[-2]
            self.counts.update(attention=count, total=count)
        elif func is F.linear:
            self.counts.update(total=2 * out.numel() * args[1].shape[1])
        elif func is torch.conv2d:
            self.counts.update(total=2 * out.numel() * math.prod(args[1].shape[1:]))
        return out


class Runs:
    """Generates with the trained pipeline, and compares with its full run."""

    def __init__(self, folder: Path, writes: bool, timed: bool) -> None:
        self.folder, self.timed = folder, timed
        self.pipe, self.classifier = load_pipeline(folder)
        self.labels = list(range(10)) * EACH
        with Operations() as operations:
            self.full = self.draw()
        self.operations = dict(operations.counts)
        self.writes = writes
        path = envelope.RESULTS / "diffusion.json"
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if writes and path.exists() else []

    def draw(self, seed: int = 0, labels: list[int] | None = None) -> Tensor:
        found = self.pipe(
            labels or self.labels, guidance_scale=GUIDANCE, num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(seed), output_type="np",
        ).images  # fmt: skip
        return torch.from_numpy(found).permute(0, 3, 1, 2)

    def note(self, who: str, method: str, setting: str, images: Tensor, counts: Any, seconds: float) -> None:
        error = float((images - self.full).square().mean())
        right = self.classifier(images * 2 - 1).argmax(1) == torch.tensor(self.labels)
        row = {
            "who": who,
            "method": method,
            "setting": setting,
            "attention": round(counts["attention"] / self.operations["attention"], 4),
            "total": round(counts["total"] / self.operations["total"], 4),
            **({"seconds": round(seconds, 3)} if self.timed else {}),
            "psnr_db": round(10 * math.log10(1 / max(error, 1e-12)), 2),
            "right": round(float(right.float().mean()), 3),
        }
        self.rows.append(row)
        print(*row.values(), sep="\t", flush=True)
        if self.writes:
            envelope.write("diffusion", sorted(self.rows, key=_order), packages=("diffusers", "scikit-learn"))

    def has(self, *key: str) -> bool:
        return any((row["who"], row["method"], row["setting"]) == key for row in self.rows)

    def ours(self, method: str, setting: str, **how: Any) -> None:
        tqc.compile_pipeline(self.pipe, options=EAGER, **how)
        try:
            if self.timed:
                self.pipe(self.labels, guidance_scale=GUIDANCE, num_inference_steps=STEPS)  # compiles
            dispatcher: Any = dispatcher_of(self.pipe.transformer)
            called: Counter[Any] = Counter()
            variant_of = dispatcher._variant

            def counting(row: Any) -> Any:
                called[row] += 1
                return variant_of(row)

            dispatcher._variant = counting
            begin = time.perf_counter()
            images = self.draw()
            seconds = time.perf_counter() - begin
            counts: Counter[str] = Counter()
            for row, times in called.items():
                counts.update({what: times * n for what, n in variant_of(row)[0].flops.items()})
        finally:
            tqc.decompile_pipeline(self.pipe)
            torch._dynamo.reset()
        self.note("tqc", method, setting, images, counts, seconds)

    def theirs(self, method: str, setting: str, apply: Any) -> None:
        pipe, _ = load_pipeline(self.folder)
        hooked = Hooked(pipe.transformer)
        pipe.transformer, hooked.pipe = hooked, pipe
        own, self.pipe = self.pipe, pipe
        try:
            apply(hooked)
            begin = time.perf_counter()
            with Operations() as operations:
                images = self.draw()
            seconds = time.perf_counter() - begin
        finally:
            self.pipe = own
        self.note("diffusers", method, setting, images, operations.counts, seconds)

    def ratios(self) -> list[float]:
        pipe, _ = load_pipeline(self.folder)
        hooked = Hooked(pipe.transformer)
        pipe.transformer, hooked.pipe = hooked, pipe
        return calibrate(hooked, lambda: pipe(list(range(10)), GUIDANCE, num_inference_steps=STEPS), STEPS)


def _order(row: dict[str, Any]) -> tuple[str, str]:
    return row["who"], row["method"]


def own_settings() -> list[tuple[str, str, dict[str, Any]]]:
    found: list[tuple[str, str, dict[str, Any]]] = [("full", "", {}), ("cfg_sharing", "", {"cfg_sharing": True})]

    def add(strategy: str, setting: str, more: dict[str, Any] | None = None, **kwargs: Any) -> None:
        found.append((strategy, setting, {"strategy": strategy, "strategy_kwargs": kwargs, **(more or {})}))

    for order in (1, 2):
        for every in (2, 3, 4):
            add("taylor", f"blocks, every {every}, order {order}", every=every, order=order, blocks=True)
        for threshold in (0.2, 0.4, 0.8):
            add("first_block", f"threshold {threshold}, order {order}", threshold=threshold, order=order)
    add("first_block", "threshold 0.2, order 0", threshold=0.2)
    for every in (2, 3, 4):
        add("share", f"every {every}", every=every)
        add("share", f"blocks, every {every}", every=every, blocks=True)
    add("share", "every 2, with cfg_sharing", {"cfg_sharing": True}, every=2)
    for bits in (8, 4, 2):
        add("share", f"every 2, state of {bits} bits", {"state_bits": bits}, every=2)
    add("taylor", "every 2, order 1", every=2)
    add("taylor", "every 2, order 1, state of 4 bits", {"state_bits": 4}, every=2)
    for name in ("delta2", "delta"):
        for blocks in (True, False):
            for threshold in (0.1, 0.2):
                setting = f"{'blocks, ' if blocks else ''}threshold {threshold}"
                add(name, setting, threshold=threshold, blocks=blocks)
        add(name, "blocks, threshold 0.2, snr", {"scorer": "snr"}, threshold=0.2, blocks=True)
    for every in (2, 3, 4):
        add("window", f"every {every}, 25 %", every=every, share=0.25)
    add("window", "every 4, 50 %", every=4, share=0.5)
    for order, every in ((1, 3), (1, 4), (2, 2), (2, 3), (2, 4)):
        add("taylor", f"every {every}, order {order}", every=every, order=order)
    return found


# Computed steps of plans whose other steps are forecast in a line: where they start from.
STARTS = (
    {0, 1, 2, *range(4, 30, 3)},
    {0, 1, *range(4, 30, 3)},
    {0, 1, *range(5, 30, 4)},
    {0, 1, *range(6, 30, 5)},
    {0, 1, *range(7, 30, 6)},
)


def step_plan(computed: set[int]) -> Plan:
    rows = [(Cell() if step in computed else Cell("block_linear"),) * 8 for step in range(STEPS)]
    return Plan("DiTTransformer2DModel", tuple(rows))


def moved(runs: Runs, computed: set[int]) -> set[int]:
    """Computed steps moved one by one while images of other noise come nearer to those of the full run."""
    labels, seed = list(range(10)), 100
    full = runs.draw(seed, labels)
    tqc.compile_pipeline(runs.pipe, plan=step_plan(computed), options=EAGER)
    dispatcher: Any = dispatcher_of(runs.pipe.transformer)

    def error(steps: set[int]) -> float:
        dispatcher.schedule = Schedule(8, plan=step_plan(steps))
        return float((runs.draw(seed, labels) - full).square().mean())

    best = error(computed)
    for step in sorted(computed)[1:]:
        for other in (step - 1, step + 1):
            tried = (computed - {step}) | {other}
            if 0 < other < STEPS and len(tried) == len(computed) and (found := error(tried)) < best:
                computed, best = tried, found
                break
    tqc.decompile_pipeline(runs.pipe)
    return computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the folder that digits.py filled")
    parser.add_argument("--quick", action="store_true", help="every seventh setting, and no file")
    parser.add_argument("--timed", action="store_true", help="seconds too, for a machine that does nothing else")
    parser.add_argument("--only", default="", help="settings whose method has this in its name")
    arguments = parser.parse_args()
    runs, every = Runs(arguments.model, not arguments.quick, arguments.timed), 7 if arguments.quick else 1
    ratios = runs.ratios()
    if not runs.has("diffusers", "full", ""):
        runs.theirs("full", "", lambda hooked: None)
    for method, setting, apply in list(settings(ratios, STEPS))[::every]:
        if arguments.only in method and not runs.has("diffusers", method, setting):
            try:
                runs.theirs(method, setting, apply)
            except Exception as error:  # of theirs; the row says it
                runs.rows.append({"who": "diffusers", "method": method, "setting": setting, "reason": repr(error)})
    for method, setting, how in own_settings()[::every]:
        if arguments.only in method and not runs.has("tqc", method, setting):
            runs.ours(method, setting, **how)
    for start in STARTS if arguments.only in "plan" else ():
        if not any(row["method"] == "plan" and f"of {len(start)} " in row["setting"] for row in runs.rows):
            steps = moved(runs, start)
            runs.ours("plan", f"of {len(start)} computed steps: {', '.join(map(str, sorted(steps)))}",
                      plan=step_plan(steps))  # fmt: skip


if __name__ == "__main__":
    main()
