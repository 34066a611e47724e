"""The command line: `tqc run`, `compare`, `explain`, `eval`, `calibrate`, `search`, `plan`, `plugins`, `export`...

torch and transformers take seconds to import, so each command imports what it needs; `tqc --help` needs neither.
"""

from __future__ import annotations

import json
import os
import sys
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from tqc.cli.console import status_of, stderr
from tqc.cli.export import export, run_exported
from tqc.cli.inputs import (
    BadInput,
    fitting_options,
    fitting_widths,
    flag,
    given_options,
    load_with_prompt,
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
)
from tqc.cli.plan import plan
from tqc.cli.quality import calibrate, evaluate
from tqc.cli.search import search

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
        run_exported(str(model), prompt, max_tokens, as_json, {**options, **({"dense": True} if dense else {})})
        return
    with status_of("loading the model") as status:
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
        stderr().print(summary(result), style="dim", highlight=False, soft_wrap=True)


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
    with status_of("loading the model") as status:
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
    with status_of("loading the model") as status:
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


app.command("eval")(evaluate)
app.command()(calibrate)
app.command("benchmark", help="The same as `tqc eval`, by tqai's name for it; --html writes a report.")(evaluate)
app.command()(search)
app.command()(plan)


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


app.command()(export)


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


if __name__ == "__main__":
    main()
