"""The command line: `tqc run`, `compare`, `explain`, `eval`, `calibrate`, `search`, `plugins`, `export` and `info`.

torch and transformers take seconds to import, so each command imports what it needs; `tqc --help` needs neither.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tqc.cli.inputs import (
    BadInput,
    fitting_options,
    fitting_widths,
    flag,
    given_options,
    load,
    load_with_prompt,
    text_of,
    ways_of,
)
from tqc.cli.onnx import is_exported
from tqc.cli.options import (
    Backend,
    BitsK,
    BitsV,
    BudgetBits,
    Config,
    Dtype,
    EvalBackend,
    Json,
    Keep,
    MaxTokens,
    Model,
    Monitor,
    Preset,
    Prompt,
    ResidualWindow,
    Scorer,
    ScorerKwargs,
    SinkTokens,
    SkipLayers,
    Strategy,
    Tiers,
    Widths,
    bits_range,
    count,
    positive,
)
from tqc.cli.search import search

if TYPE_CHECKING:
    from rich.status import Status


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compressed KV caches for any transformer, by compiling it.",
)


EXPLAIN_PROMPT = "What is gravity?"


def main() -> None:
    """Entry point: an error in the input is one line on stderr and exit code 2."""
    # The bar over GGUF tensors obeys nothing else, and tqdm reads this when torch imports it.
    os.environ.setdefault("TQDM_DISABLE", "1")
    if isinstance(sys.stdout, TextIOWrapper):  # a model writes what not every locale can show
        sys.stdout.reconfigure(errors="replace")
    usage_error: Any = typer.BadParameter.__base__
    try:
        code = app(standalone_mode=False)
    except usage_error as error:
        message = " ".join(error.format_message().split())
        if message:  # none if the help was printed instead
            typer.echo(f"tqc: {message}", err=True)
        code = 2
    except typer.Abort:
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


@app.command()
def run(
    prompt: Prompt,
    model: Model = None,
    bits_k: BitsK = None,
    bits_v: BitsV = None,
    preset: Preset = None,
    sink_tokens: SinkTokens = None,
    residual_window: ResidualWindow = None,
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
    max_tokens: MaxTokens = 200,
    dtype: Dtype = "auto",
    dense: Annotated[bool, typer.Option("--dense", help="Compile with Inductor alone: no compression.")] = False,
    backend: Backend = "torch",
    as_json: Json = False,
) -> None:
    """Generate text through a compressed cache."""
    options = given_options(
        *(bits_k, bits_v, preset, sink_tokens, residual_window, widths, budget_bits, strategy, scorer, keep),
        skip_layers=skip_layers,
        tiers=tiers,
        scorer_kwargs=scorer_kwargs,
        monitor=monitor,
        config=config,
    )
    if dense and options:
        raise BadInput(f"--dense compresses nothing, so it takes no {flag(next(iter(options)))}")
    if is_exported(model):
        if backend != "torch":
            raise BadInput(f"{model} is an exported model, which onnxruntime runs, so it takes no --backend {backend}")
        _run_exported(str(model), prompt, max_tokens, as_json, {**options, **({"dense": True} if dense else {})})
        return
    with _status("loading the model") as status:
        loaded, tokenizer, inputs = load_with_prompt(model, dtype, prompt, backend)
        ways = ways_of(backend)
        with fitting_widths(), fitting_options(backend):
            ways.compile_model(loaded, None if dense else options)
        status.update("compiling (cached for the next time)")

        def show(text: str) -> None:
            status.stop()
            if not as_json:
                print(text, end="", flush=True)

        with fitting_widths():
            result = ways.generate(loaded, tokenizer, inputs, max_tokens, show)
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        from tqc.cli.show import summary

        print(flush=True)
        _stderr().print(summary(result), style="dim", highlight=False, soft_wrap=True)


@app.command()
def compare(
    prompt: Prompt,
    model: Model = None,
    bits_k: BitsK = None,
    bits_v: BitsV = None,
    preset: Preset = None,
    sink_tokens: SinkTokens = None,
    residual_window: ResidualWindow = None,
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
    max_tokens: MaxTokens = 200,
    dtype: Dtype = "auto",
    backend: Backend = "torch",
    as_json: Json = False,
) -> None:
    """Generate with a dense and a compressed cache, and say how they differ."""
    options = given_options(
        *(bits_k, bits_v, preset, sink_tokens, residual_window, widths, budget_bits, strategy, scorer, keep),
        skip_layers=skip_layers,
        tiers=tiers,
        scorer_kwargs=scorer_kwargs,
        monitor=monitor,
        config=config,
    )
    with _status("loading the model") as status:
        loaded, tokenizer, inputs = load_with_prompt(model, dtype, prompt, backend)
        with fitting_widths(), fitting_options(backend):
            result = ways_of(backend).compare(loaded, tokenizer, inputs, max_tokens, options, status.update)
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        from rich.console import Console

        from tqc.cli.show import comparison

        console = Console()
        console.print(*comparison(result, console.width), sep="\n")


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(help="Text that the model is traced with.")] = EXPLAIN_PROMPT,
    model: Model = None,
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
    dtype: Dtype = "auto",
    graphs: Annotated[
        bool, typer.Option("--graphs", help="Also the graphs as text, before the passes and behind each.")
    ] = False,
    backend: Backend = "torch",
    as_json: Json = False,
) -> None:
    """Say which caches of a model get packed, with which kernels, and why others stay dense."""
    options = given_options(
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
    with _status("loading the model") as status:
        loaded, _, inputs = load_with_prompt(model, dtype, prompt, backend)
        import tqc

        status.update("tracing")
        given = {"tokens": inputs["input_ids"].numpy()} if backend == "mlx" else inputs
        with fitting_widths(), fitting_options(backend):
            explained = loaded.model if backend == "mlx" else loaded
            report = tqc.explain(explained, options=options, **given, graphs=graphs)
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        from rich.console import Console

        Console().print(report, crop=False)  # a line of a graph is as long as it is


@app.command("eval")
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
        with _status("loading the model") as status:
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


app.command("benchmark", help="The same as `tqc eval`, by tqai's name for it; --html writes a report.")(evaluate)


@app.command()
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
    with _status("loading the model"):
        loaded, tokenizer = load(model, dtype)
    from tqc.cli.calibrate import find_widths, table, to_dict
    from tqc.models import EMBEDDED_NAME

    name = Path(model).name if model else EMBEDDED_NAME
    try:
        found = find_widths(loaded, tokenizer, budget_bits, widths, content, tokens, name, _stderr())
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


app.command()(search)


@app.command("plugins")
def list_plugins(as_json: Json = False) -> None:
    """The plugins there are: kind, name, paper, parameters."""
    from tqc.cli.plugins import described, table

    found = described()
    if as_json:
        print(json.dumps({"plugins": found}))
    else:
        from rich import print as rich_print

        rich_print(table(found))


@app.command()
def export(
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="Folder to write, empty or new.")],
    model: Model = None,
    bits_k: BitsK = None,
    bits_v: BitsV = None,
    preset: Preset = None,
    sink_tokens: SinkTokens = None,
    residual_window: ResidualWindow = None,
    widths: Widths = None,
    budget_bits: BudgetBits = None,
    max_cache_len: Annotated[int, count("Most tokens of a sequence.", positive)] = 4096,
    inline: Annotated[bool, typer.Option("--inline", help="No functions: operators of ONNX alone.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="An error where a cache stays dense.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Leave all caches dense.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Run it beside torch and print the differences.")] = False,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Write a model with its compressed cache as ONNX, for `tqc run -m DIR` and any host of onnxruntime."""
    options = given_options(bits_k, bits_v, preset, sink_tokens, residual_window, widths, budget_bits)
    if dense and options:
        raise BadInput(f"--dense compresses nothing, so it takes no {flag(next(iter(options)))}")
    with _status("loading the model") as status:
        loaded, tokenizer = load(model, dtype)
        import tqc
        from tqc.models import EMBEDDED_NAME

        try:
            with fitting_widths():
                tqc.export_onnx(
                    loaded.cpu(),
                    out,
                    tokenizer=tokenizer,
                    name=model or EMBEDDED_NAME,
                    max_cache_len=max_cache_len,
                    inline=inline,
                    strict=strict,
                    compress=not dense,
                    on_step=status.update,
                    **options,
                )
        except ValueError as error:
            raise BadInput(str(error)) from None
        facts: dict[str, Any] = {"path": out}
        if check:
            from tqc.cli.onnx import check as run_check

            status.update("comparing with torch")
            facts |= run_check(loaded, out, None if dense else options, max_cache_len)
    if as_json:
        print(json.dumps(facts))
    else:
        print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))


def _run_exported(folder: str, prompt: str, max_tokens: int, as_json: bool, options: dict[str, Any]) -> None:
    if options:
        raise BadInput(f"--model {folder!r} was exported with its options, so it takes no {flag(next(iter(options)))}")
    if not prompt.strip():
        raise BadInput("PROMPT is empty: give some text")
    from tqc.cli.onnx import generate

    result = generate(folder, prompt, max_tokens, lambda text: None if as_json else print(text, end="", flush=True))
    if as_json:
        print(json.dumps(result))
    else:
        print(flush=True)
        speed = f" ({result['tokens_per_s']:.1f} tokens/s)" if result["tokens_per_s"] else ""
        line = (
            f"{result['new_tokens']} tokens in {result['total_s']:.1f} s{speed}, cache {result['cache_bytes']:,} bytes"
        )
        _stderr().print(line, style="dim", highlight=False, soft_wrap=True)


@app.command()
def info(
    folder: Annotated[str | None, typer.Argument(help="Folder of `tqc export`, to be shown instead.")] = None,
    as_json: Json = False,
) -> None:
    """Versions, kernels, presets and folders; or what an exported model is."""
    if folder is not None:
        from tqc.cli.onnx import describe, tables

        facts = describe(folder)
    else:
        from tqc.cli.info import describe as describe_installation
        from tqc.cli.info import tables as tables_of_installation

        facts, tables = describe_installation(), tables_of_installation
    if as_json:
        print(json.dumps(facts))
        return
    from rich.console import Console

    Console().print(*tables(facts), sep="\n")


def _stderr() -> Any:
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def _status(message: str) -> Iterator[Status]:
    with _stderr().status(message) as status:
        yield status


if __name__ == "__main__":
    main()
