"""`tqc.plan`: a plan for a pipeline, searched on calls of it and checked on others."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tqc.diffusion.pipeline import TRANSFORMERS, blocks_of, compile_pipeline, decompile_pipeline, generations_of
from tqc.diffusion.plan import Cell, Plan
from tqc.diffusion.search import Notes, Search
from tqc.plugins.plugin import nearest
from tqc.plugins.step_strategy import CELLS, FULL

PASSES = 7  # of a search for a budget: each halves the range of errors, in powers
LEAST_ERROR, MOST_ERROR = 1e-3, 0.5


def plan(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    check: Mapping[str, Any] | None = None,
    max_error: float | None = None,
    budget: float | None = None,
    cells: Iterable[str] = CELLS[1:],
    cfg_sharing: bool = False,
    window: float = 0.25,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Search what each layer of a pipeline's transformer shall do in each step, as `compile_pipeline(plan=)` takes it.

    A greedy search along one generation (DiTFastAttn): each layer does the cheapest by which the transformer's output
    misses no more than `max_error` of what it would be in full, relative to it. The pipeline is as it was behind it.

    Args:
        pipe: of diffusers, with one transformer.
        call: keyword arguments of the pipeline's call to search on, its steps among them; several prompts are better.
        check: those of a call that the plan is checked on, by default `call` with another seed.
        max_error: 0.02 by default.
        budget: the share of all floating point operations that shall be left, in place of `max_error`.
        cells: what layers may do, of those that `Cell` names.
        cfg_sharing: whether the branches of guidance may share self-attention.
        window: share of the tokens that a query sees where a layer has a window.
        seed: of the noise.
        path: of the plan's file, and, while the search runs, of a file beside it that it goes on from.
        progress: is told how many of how many steps are done.

    Returns:
        The plan; `found` says the error and the operations that are left, and `psnr_db` of the checked call.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    settings = _settings(max_error, budget, cells, cfg_sharing, window)
    transformer = _transformer(pipe)
    blocks = blocks_of(transformer)
    if not blocks:
        raise ValueError(f"{type(transformer).__name__} has no list of blocks with attention in them")
    call = _fitting(pipe, "call", call)
    check = _fitting(pipe, "check", check if check is not None else call)
    notes = Notes(path, {**settings, "seed": seed, "model": type(transformer).__name__, "call": repr(sorted(call))})

    def run(error: float) -> Search:
        def done(step: int) -> None:
            notes.rows = list(search.rows)
            notes.write()
            if progress is not None:
                of_pass = len(pipe.scheduler.timesteps)
                total = of_pass * (PASSES if budget is not None else 1)
                progress(min(of_pass * len(notes.passes) + step + 1, total), total)

        allowed = tuple(settings["cells"])
        search = Search(transformer, blocks, error, window, allowed, cfg_sharing, notes.rows, done)
        decompile_pipeline(pipe)
        search.install()
        try:
            with generations_of(pipe, call):
                pipe(**call, **_noise(pipe, seed))
        finally:
            search.remove()
        return search

    rows, found = _search(run, notes, settings)
    made = Plan(type(transformer).__name__, tuple(rows), window, {**settings, **found})
    made = Plan(made.model, made.rows, window, {**made.found, **_checked(pipe, made, check, seed + 1)})
    notes.remove()
    if path is not None:
        made.save(path)
    return made


def _search(run: Callable[[float], Search], notes: Notes, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    if settings["budget"] is None:
        search = run(settings["max_error"])
        return search.rows, _left(search)
    best: dict[str, Any] | None = None
    low, high = LEAST_ERROR, MOST_ERROR
    for number in range(PASSES):
        error = math.sqrt(low * high)
        if number == len(notes.passes):
            search = run(error)
            notes.passes.append({"max_error": error, "rows": search.rows, **_left(search)})
            notes.rows = []
            notes.write()
        found = notes.passes[number]
        if found["total"] <= settings["budget"]:
            best, high = found, error
        else:
            low = error
    if best is None:
        least = min(found["total"] for found in notes.passes)
        raise ValueError(f"budget must be at least {least:.3f}, which the search came to; got {settings['budget']}")
    rows = [tuple(Cell(*cell) for cell in row) for row in best["rows"]]
    return rows, {name: value for name, value in best.items() if name != "rows"}


def _left(search: Search) -> dict[str, float]:
    """Shares of the operations that are left."""
    return {name: search.spent[name] / max(search.full[name], 1) for name in ("attention", "total")}


def _checked(pipe: Any, made: Plan, call: Mapping[str, Any], seed: int) -> dict[str, Any]:
    full = _result(pipe(**call, **_noise(pipe, seed)))
    compile_pipeline(pipe, plan=made, options={"rest": "eager"})
    try:
        planned = _result(pipe(**call, **_noise(pipe, seed)))
    finally:
        decompile_pipeline(pipe)
    peak = float(full.max() - full.min())
    return {"psnr_db": 10 * math.log10(peak**2 / max(float((full - planned).square().mean()), 1e-20))}


def _result(output: Any) -> Tensor:
    found = output[0]
    return torch.as_tensor(found if not isinstance(found, list) else found[0]).float()


def _noise(pipe: Any, seed: int) -> dict[str, Any]:
    takes = inspect.signature(type(pipe).__call__).parameters
    given: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)} if "generator" in takes else {}
    if "output_type" in takes:
        given["output_type"] = "latent" if _gives_latents(pipe) else "np"
    return given


def _gives_latents(pipe: Any) -> bool:
    original = getattr(type(pipe), "_tqc_original", type(pipe)).__call__
    return '"latent"' in inspect.getsource(inspect.unwrap(original))


def _fitting(pipe: Any, name: str, call: Mapping[str, Any]) -> dict[str, Any]:
    takes = list(inspect.signature(type(pipe).__call__).parameters)[1:]
    for argument in call:
        if argument in ("generator", "output_type"):
            raise ValueError(f"{name} must leave {argument} to the search, got {call[argument]!r}")
        if argument not in takes:
            raise ValueError(f"{type(pipe).__name__} takes no {argument!r}{nearest(argument, takes)}")
    return dict(call)


def _transformer(pipe: Any) -> torch.nn.Module:
    found = [getattr(pipe, name, None) for name in TRANSFORMERS]
    if not isinstance(found[0], torch.nn.Module):
        raise ValueError(f"pipe must have a transformer, and {type(pipe).__name__} has none")
    if found[1] is not None:
        raise ValueError("a plan is for one transformer, and this pipeline has two: give compile_pipeline a strategy")
    return found[0]


def _settings(max_error: Any, budget: Any, cells: Iterable[str], cfg_sharing: Any, window: Any) -> dict[str, Any]:
    if max_error is not None and budget is not None:
        raise ValueError(f"max_error and budget cannot both be given, got {max_error!r} and {budget!r}")
    max_error = 0.02 if max_error is None and budget is None else max_error
    for name, value, most in (("max_error", max_error, math.inf), ("budget", budget, 1), ("window", window, 1)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < most
        ):
            raise ValueError(
                f"{name} must be a number above 0{f' and below {most}' if most == 1 else ''}, got {value!r}"
            )
    cells = list(cells)
    for cell in cells:
        if cell not in CELLS or cell == FULL:
            raise ValueError(f"cells must be of {', '.join(CELLS[1:])}; got {cell!r}{nearest(cell, CELLS[1:])}")
    if not isinstance(cfg_sharing, bool):
        raise TypeError(f"cfg_sharing must be True or False, got {cfg_sharing!r}")
    return {"max_error": max_error, "budget": budget, "cells": cells, "cfg_sharing": cfg_sharing, "window": window}
