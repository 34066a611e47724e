"""`tqc search`: options of least loss within a budget, for `--config FILE`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tqc.cli.inputs import BadInput, load, text_of
from tqc.cli.options import Dtype, Json, Model, count, positive


def search(
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="File to write the best options into.")],
    model: Model = None,
    budget_bits: Annotated[float, typer.Option(help="Most all-in bits of an element at 4,096 tokens.")] = 3.0,
    trials: Annotated[int, count("How many in all, those of FILE.journal included.", positive)] = 60,
    text: Annotated[str | None, typer.Option(help="File to decode; Python's own documentation if absent.")] = None,
    tokens: Annotated[int, count("How many tokens of it.", positive)] = 1024,
    seed: Annotated[int, count("Of the draws.")] = 0,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Search options for least KL, bits and time of a token. It writes each trial to FILE.journal and goes on from
    there."""
    content = text_of(text)
    if Path(out).is_dir() or not Path(out).parent.is_dir():
        raise BadInput(f"--out {out!r} cannot be written: no such folder, or it is one")
    from rich.console import Console
    from rich.progress import Progress

    from tqc.evaluate.search import Measured
    from tqc.evaluate.search import search as run_search
    from tqc.models import EMBEDDED_NAME

    loaded, tokenizer = load(model, dtype)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("searching", total=trials)

        def show(done: int, total: int, line: str) -> None:
            progress.update(task, completed=done, total=total)
            progress.console.print(f"trial {done}: {line}", style="dim", highlight=False)

        try:
            found = run_search(
                *(Measured(loaded, tokenizer, content, tokens), trials, f"{out}.journal", budget_bits),
                seed=seed,
                on_trial=show,
            )
        except (ValueError, ModuleNotFoundError) as error:
            raise BadInput(str(error)) from None
    front: list[dict[str, Any]] = [{"options": one.options, **one.measures} for one in found]
    result: dict[str, Any] = {"model": model or EMBEDDED_NAME, "budget_bits": budget_bits, **front[0], "front": front}
    Path(out).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if as_json:
        print(json.dumps(result))
        return
    from rich import print as rich_print
    from rich.table import Table

    table = Table("KL", "bits", "ms", "options", title=f"the best of {trials} trials", title_justify="left")
    for row in front:
        measures = (f"{row['kl_mean']:.2g}", f"{row['bits_4096']:.2f}", f"{row['ms']:.1f}")
        table.add_row(*measures, ", ".join(f"{name}={value}" for name, value in row["options"].items()))
    rich_print(table)
