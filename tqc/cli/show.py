"""How the command line shows results."""

from __future__ import annotations

from collections.abc import Iterator

from rich.columns import Columns
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tqc.cli.generate import Comparison, Generation


def summary(result: Generation) -> str:
    """One line on a finished run."""
    count = len(result.tokens)
    speed = f" ({result.tokens_per_s:.1f} tokens/s once compiled)" if result.tokens_per_s else ""
    return (
        f"first token after {result.first_token_s:.1f} s, {count} tokens in {result.total_s:.1f} s{speed}, "
        f"cache {readable_bytes(result.cache_bytes)} for {result.prompt_tokens + count} tokens"
        + (f"\n{result.watched}" if result.watched else "")
    )


def comparison(result: Comparison, width: int) -> Iterator[RenderableType]:
    """Both texts side by side on a terminal of `width` columns, and the table below them."""
    dense, compressed = result.dense, result.compressed
    half = max(30, width // 2 - 1)
    yield Columns(
        [
            Panel(Text(dense.text), title="dense", width=half),
            Panel(Text(compressed.text), title="compressed", width=half),
        ],
        padding=(0, 1),
    )
    table = Table("", "dense", "compressed")
    table.add_row("tokens/s", *(f"{run.tokens_per_s:.1f}" if run.tokens_per_s else "-" for run in (dense, compressed)))
    ratio = f"{readable_bytes(result.cache_bytes)} (1/{result.cache_ratio:.2f})"
    table.add_row("cache", readable_bytes(dense.cache_bytes), ratio)
    table.add_row("bits per cached element", str(8 * result.dtype_bytes), f"{result.bits_per_element:.2f}")
    table.add_row("KL to dense, nats (mean)", "0", f"{result.kl:.2g}")
    steps = len(dense.tokens)
    table.add_row("same most likely next token", "", f"{result.same_next} of {steps}")
    table.add_row("same text for the first", "", f"{result.same_prefix} of {steps} tokens")
    yield table
    yield Text(
        "Cache, KL and next tokens: the dense run's tokens, decoded one by one through the compressed cache.",
        style="dim",
    )


def readable_bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
