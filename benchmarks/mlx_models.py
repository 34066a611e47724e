"""Which models of mlx-lm can be captured as graphs, and what of their attention the passes pack.

    python -m benchmarks.mlx_models                 all, some minutes
    python -m benchmarks.mlx_models llama gemma2    some, printed only

Each model is random and small. A prompt in two parts and four tokens run through captured programs and through the
model itself, each on caches of mlx-lm, and the logits are compared. A row says how many attention sites the decoding
graph has, how many are packed, and why the others are not; or what failed, in the model itself ("not built", "dense run
failed") or in ours ("not captured").
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib
import os
import pkgutil
import signal
import sys
import time
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

from benchmarks.envelope import write
from benchmarks.mlx_configs import OWN, SMALL, VARIATIONS

SECONDS, TOLERANCE = 120, 1e-3
LENGTHS = (24, 24, 1, 1, 1, 1)


def build(name: str, variation: dict[str, Any]) -> Any:
    import mlx.core as mx

    module = importlib.import_module(f"mlx_lm.models.{name}")
    fields = {field.name for field in dataclasses.fields(module.ModelArgs)}
    given = {**SMALL, **variation, **OWN.get(name, {}), "model_type": name}
    if "text_config" in fields:
        given["text_config"] = {**given, "model_type": f"{name}_text"}
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({key: held for key, held in given.items() if key in fields}))
    mx.eval(model.parameters())
    return model


def run(call: Any) -> list[Any]:
    """Logits of a prompt in two parts and of four tokens, evaluated."""
    import mlx.core as mx

    mx.random.seed(1)
    tokens, at, made = mx.random.randint(3, 128, (1, sum(LENGTHS))), 0, []
    for length in LENGTHS:
        made.append(call(tokens[:, at : at + length]))
        mx.eval(made[-1])
        at += length
    return made


def cell(name: str) -> dict[str, Any]:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from tqc.config import Config
    from tqc.mlx_trace.caches import leaves
    from tqc.mlx_trace.capture import capture
    from tqc.mlx_trace.execute import Unsupported
    from tqc.mlx_trace.graph import CaptureError
    from tqc.mlx_trace.pack import choose
    from tqc.mlx_trace.program import Program

    row: dict[str, Any] = {"model": name}
    failures: dict[str, str] = {}
    for variation in VARIATIONS:
        try:
            model = build(name, variation)
        except Exception as error:
            failures.setdefault("not built", _first_line(error))
            continue
        try:
            cache = make_prompt_cache(model)
            expected = run(lambda tokens, model=model, cache=cache: model(tokens, cache=cache))
            break
        except Exception as error:
            failures["dense run failed"] = _first_line(error)
    else:
        result, why = failures.popitem()
        return {**row, "result": result, "why": why}
    ours, programs, seconds = make_prompt_cache(model), {}, 0.0
    row["caches"] = dict(collections.Counter(type(cache).__name__ for cache in ours))

    def call(tokens: mx.array) -> mx.array:
        nonlocal seconds
        length = tokens.shape[1]
        empty = [getattr(cache, "cache", None) is not None and cache.empty() for cache in leaves(ours)]
        key = (length, *empty)
        if key not in programs:
            begin = time.time()
            captured = capture(model, ours, 1, length)
            seconds += time.time() - begin
            programs[key] = Program(captured)
        return programs[key](tokens, ours)

    try:
        actual = run(call)
    except (CaptureError, Unsupported) as error:
        return {**row, "result": "not captured", "why": _first_line(error)}
    largest = max(mx.abs(a - b).max().item() for a, b in zip(actual, expected, strict=True))
    row |= {"error": largest, "seconds": round(seconds, 2)}
    # As `compile_mlx` decides it: on caches that grow, with a window that is longer than what stays dense.
    choice = choose(model, make_prompt_cache(model), 1, 1, Config(sink_tokens=0, residual_window=32))
    row |= {"sites": len(choice.formats) + len(choice.reasons), "packed": len(choice.formats)}
    row["why"] = "; ".join(dict.fromkeys(choice.reasons.values()))
    return {**row, "result": "captured" if largest <= TOLERANCE * mx.abs(expected[-1]).max().item() else "WRONG"}


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]


def _isolated(name: str) -> dict[str, Any]:
    """A cell, cut off after `SECONDS`."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return cell(name)
    except BaseException as error:
        return {"model": name, "result": "FAILED", "why": _first_line(error)}
    finally:
        signal.alarm(0)


def names() -> list[str]:
    """Files of mlx-lm that hold a model."""
    spec = find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("mlx-lm is not installed: pip install 'mlx[cpu]' mlx-lm")
    folder = os.path.join(spec.submodule_search_locations[0], "models")
    found = []
    for module in pkgutil.iter_modules([folder]):
        with open(os.path.join(folder, f"{module.name}.py"), encoding="utf-8") as file:
            text = file.read()
        if "class Model(" in text and "class ModelArgs" in text:
            found.append(module.name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    begin, rows = time.time(), []
    # A process a cell, none of which inherits a running MLX.
    with get_context("fork").Pool(arguments.processes, maxtasksperchild=1) as pool:
        for row in pool.imap(_isolated, arguments.names or names()):
            print({key: held for key, held in row.items() if held not in ("", None)}, flush=True)
            rows.append(row)
    print(f"{dict(collections.Counter(row['result'] for row in rows))} in {time.time() - begin:.0f} s")
    if not arguments.names:
        write("mlx_models", rows, packages=("mlx", "mlx-lm"))
    if any(row["result"] in ("FAILED", "WRONG") for row in rows):
        sys.exit("some models failed")


if __name__ == "__main__":
    main()
