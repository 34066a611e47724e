"""The commands that measure: `tqc eval` and `tqc calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tqc.cli.console import status_of, stderr
from tqc.cli.inputs import BadInput, fitting_widths, given_options, load, text_of
from tqc.cli.options import (
    BudgetBits,
    Config,
    Dtype,
    EvalBackend,
    Json,
    Keep,
    Model,
    Monitor,
    Scorer,
    ScorerKwargs,
    SkipLayers,
    Strategy,
    Tiers,
    Widths,
    bits_range,
    count,
    positive,
)


def evaluate(
    settings: Annotated[
        list[str] | None, typer.Argument(help="Presets, or bits like k4v2, with parts like k3v3:w128:s8; all presets.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="As for `tqc run`, and as often as there are models to evaluate."),
    ] = None,
    widths: Widths = None,
    budget_bits: BudgetBits = None,
    strategy: Strategy = None,
    scorer: Scorer = None,
    keep: Keep = None,
    skip_layers: SkipLayers = None,
    tiers: Tiers = None,
    scorer_kwargs: ScorerKwargs = None,
    monitor: Monitor = None,
    config: Config = None,
    text: Annotated[str | None, typer.Option(help="File to decode; Python's own documentation if absent.")] = None,
    tokens: Annotated[int, count("How many tokens of it.", positive)] = 2048,
    numbers: Annotated[int, count("How many numbers are hidden in it and asked for.")] = 8,
    peers: Annotated[bool, typer.Option("--peers", help="Also caches of other projects that are installed.")] = False,
    plot: Annotated[str | None, typer.Option(help="PNG to draw both losses over bits into.")] = None,
    html: Annotated[str | None, typer.Option(help="File for a report with its pictures in it.")] = None,
    dtype: Dtype = "auto",
    backend: EvalBackend = "torch",
    as_json: Json = False,
) -> None:
    """Measure how far compressed caches move a model's predictions, and whether it still finds numbers hidden in a
    text, decoding through each of them."""
    import torch

    from tqc import models
    from tqc.config import PRESETS
    from tqc.evaluate.evaluation import evaluate as run_evaluation
    from tqc.evaluate.evaluation import parse_setting

    calibrated = given_options(
        widths=widths,
        budget_bits=budget_bits,
        strategy=strategy,
        scorer=scorer,
        keep=keep,
        skip_layers=skip_layers,
        tiers=tiers,
        scorer_kwargs=scorer_kwargs,
        monitor=monitor,
        config=config,
    )
    compared: list[str | dict[str, Any]] = [*(settings or [name for name in PRESETS if name != "off"])]
    try:
        for setting in compared:
            parse_setting(setting)
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from None
    content = text_of(text)
    compared += [calibrated] if calibrated else []
    for option, file in (("plot", plot), ("html", html)):
        if file and not Path(file).parent.is_dir():
            raise BadInput(f"--{option} {file!r} cannot be written: no such folder")
    results = []
    try:
        for given in model or ():  # before the first takes minutes
            models.locate(given)
    except models.ModelError as error:
        raise BadInput(str(error)) from None
    names: list[str | None] = [*model] if model else [None]
    for name in names:
        with status_of("loading the model") as status:
            loaded, tokenizer = load(name, dtype, "mlx" if backend == "mlx" else "torch")
            try:
                with fitting_widths():
                    result = run_evaluation(
                        loaded,
                        tokenizer,
                        compared,
                        content,
                        tokens,
                        numbers=numbers,
                        peers=peers,
                        on_step=status.update,
                        backend="onnx" if backend == "onnx" else "torch",
                    )
            except ValueError as error:
                raise BadInput(f"{error}, with model {name!r}" if name else str(error)) from None
        torch.compiler.reset()  # graphs of one model do not count against the next
        result.model = name or models.EMBEDDED_NAME
        results.append(result)
        if not as_json:
            from rich import print as rich_print

            rich_print(result)
    if as_json:
        print(json.dumps({"evaluations": [result.to_dict() for result in results]}))
    if plot:
        from tqc.evaluate.plot import plot as draw

        try:
            draw(results, plot)
        except (OSError, ValueError) as error:
            raise BadInput(f"--plot {plot!r} cannot be written: {error}") from None
    if html:
        from tqc.cli.info import describe
        from tqc.evaluate.report import html as report

        try:
            facts = describe()
            about = {name: facts[name] for name in ("python", "platform")} | facts["packages"]
            Path(html).write_text(report(results, about), "utf-8")
        except (OSError, ImportError) as error:
            raise BadInput(f"--html {html!r} cannot be written: {error}") from None


def calibrate(
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="File to write the widths into.")],
    model: Model = None,
    budget_bits: Annotated[
        float, typer.Option(help="Most code bits of an element: the mean over layers of (K + V) / 2.")
    ] = 2.75,
    widths: Annotated[Any, typer.Option(parser=bits_range, metavar="A..B", help="Widths to choose from.")] = "2..4",
    text: Annotated[
        str | None, typer.Option(help="File of the text to look at; an essay of Python's if absent.")
    ] = None,
    tokens: Annotated[int, count("How many tokens of it.", positive)] = 768,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Find the width that each layer's keys and values need, for --widths and `options={"widths": FILE}`."""
    content = text_of(text)
    if Path(out).is_dir() or not Path(out).parent.is_dir():
        raise BadInput(
            f"--out {out!r} cannot be written: {'it is a folder' if Path(out).is_dir() else 'no such folder'}"
        )
    if not budget_bits >= widths[0]:
        raise BadInput(f"--budget-bits must be at least {widths[0]}, the least of the widths; got {budget_bits:g}")
    with status_of("loading the model"):
        loaded, tokenizer = load(model, dtype)
    from tqc.cli.calibrate import find_widths, table, to_dict
    from tqc.models import EMBEDDED_NAME

    name = Path(model).name if model else EMBEDDED_NAME
    try:
        found = find_widths(loaded, tokenizer, budget_bits, widths, content, tokens, name, stderr())
        found.save(out)
    except ValueError as error:
        raise BadInput(str(error)) from None
    except OSError as error:
        raise BadInput(f"--out {out!r} cannot be written: {error.strerror}") from None
    if as_json:
        print(json.dumps(to_dict(found)))
    else:
        from rich import print as rich_print

        rich_print(table(found))
