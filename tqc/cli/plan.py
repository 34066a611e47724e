"""`tqc plan`: search what the layers of a diffusion transformer do in each step, with a bar, and show it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tqc.cli.inputs import BadInput
from tqc.cli.options import Json

if TYPE_CHECKING:
    from tqc.diffusion.plan import Plan


def plan(
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or name of a diffusers pipeline.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File of the plan; its picture is written beside it.")],
    max_error: Annotated[
        float | None, typer.Option(help="What a step's output may miss, relative to it (0.02 by default).")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Share of the operations that shall be left, instead of --max-error.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to search on; may be given several times.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps; the plan is for just as many.")] = 25,
    argument: Annotated[
        list[str] | None, typer.Option(help="Another argument of the pipeline's call, as class_labels=[1,2].")
    ] = None,
    cfg_sharing: Annotated[bool, typer.Option("--cfg-sharing", help="Branches may share self-attention.")] = False,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    as_json: Json = False,
) -> None:
    """Search a plan for a diffusion pipeline: what each layer computes or shares in each step."""
    call: dict[str, Any] = {"num_inference_steps": steps, **dict(map(_parse, argument or ()))}
    if prompt:
        call["prompt"] = list(prompt)
    if out.is_dir() or not out.parent.is_dir():
        raise BadInput(f"--out must be a file in a folder that exists, got {out}")
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with console.status("loading the pipeline"):
        pipe = _load(model)
    import tqc
    from tqc.diffusion.plot import plot_plan

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("searching", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        try:
            found = tqc.plan(
                pipe,
                call,
                max_error=max_error,
                budget=budget,
                cfg_sharing=cfg_sharing,
                seed=seed,
                path=out,
                progress=show,
            )
        except (ValueError, TypeError) as error:
            raise BadInput(str(error)) from None
    picture = out.with_suffix(".png")
    plot_plan(found, picture)
    facts = {"path": str(out), "picture": str(picture), "steps": found.steps, "layers": found.layers, **found.found}
    if as_json:
        print(json.dumps({**facts, "cells": _counts(found)}))
    else:
        cells = ", ".join(f"{count} {name}" for name, count in _counts(found).items())
        print(f"{out}: {found.found['total']:.1%} of the operations, {found.found['psnr_db']:.1f} dB on other noise")
        print(f"{found.steps} steps of {found.layers} layers: {cells}; {picture}")


def _counts(found: Plan) -> dict[str, int]:
    return dict(Counter(cell.step for row in found.rows for cell in row).most_common())


def _parse(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise BadInput(f"--argument must read as name=value, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _load(model: str) -> Any:
    try:
        import diffusers
    except ImportError:
        raise BadInput("plans are for diffusers' pipelines: pip install tqai-compiler[diffusion]") from None
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise BadInput(f"--model {model!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe
