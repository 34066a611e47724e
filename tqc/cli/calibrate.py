"""`tqc calibrate`: find the widths of a model's layers, with a bar, and show them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tqc.evaluate.calibration import calibrate
from tqc.widths import Widths


def find_widths(
    model: Any,
    tokenizer: Any,
    budget_bits: float,
    widths: Sequence[int],
    text: str | None,
    tokens: int,
    name: str,
    console: Console,
) -> Widths:
    """`tqc.evaluate.calibration.calibrate` with a bar on `console`."""
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("calibrating", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return calibrate(model, tokenizer, budget_bits, widths, text, tokens, name, show)


def to_dict(widths: Widths) -> dict[str, Any]:
    layers = [
        {"layer": number, "bits_k": bits_k, "bits_v": bits_v}
        for number, (bits_k, bits_v) in zip(widths.shapes[:, 0].tolist(), widths.of_rows(), strict=True)
    ]
    expected = widths.expected_error()
    return {**widths.about, "bits": widths.bits, "expected_kl_nats": expected, "layers": layers}


def table(widths: Widths) -> Table:
    """Layers of equal widths in a row."""
    title = f"{widths.bits:.3g} code bits an element, expected KL {widths.expected_error():.2g} nats"
    shown = Table("layers", "K", "V", title=title, title_justify="left")
    rows = zip(widths.shapes[:, 0].tolist(), widths.of_rows(), strict=True)
    for (bits_k, bits_v), group in itertools.groupby(rows, lambda row: row[1]):
        numbers = [number for number, _ in group]
        layers = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        shown.add_row(layers, str(bits_k), str(bits_v))
    return shown
