"""Options and arguments that several commands take, and how their texts are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer


def whole_number(text: str | int) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"must be a whole number; got {text!r}") from None


def positive(text: str | int) -> int:
    if (number := whole_number(text)) < 1:
        raise typer.BadParameter(f"must be at least 1; got {number}")
    return number


def bits_range(text: str) -> tuple[int, ...]:
    first, _, last = text.partition("..")
    try:
        low, high = int(first), int(last or first)
    except ValueError:
        low, high = 0, 0
    if not 1 <= low <= high <= 8:
        raise typer.BadParameter(f"must be a range of widths from 1 to 8, as 2..4; got {text!r}")
    return tuple(range(low, high + 1))


def count(help: str, parser: Callable[[str | int], int] = whole_number) -> Any:
    return typer.Option(parser=parser, metavar="N", help=help)


def one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise typer.BadParameter(f"must be {', '.join(names[:-1])} or {names[-1]}; got {text!r}")
        return text

    return parse


Prompt = Annotated[str, typer.Argument(help="Text to continue; a chat turn where the model has a chat template.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder, .gguf file or hub id; the embedded SmolLM2-135M if absent.")
]
BitsK = Annotated[int | None, count("Bits of a key code: 1 to 8, or 16 (with --bits-v 16) for dense.")]
BitsV = Annotated[int | None, count("Bits of a value code: 1 to 8, or 16 for dense.")]
Preset = Annotated[str | None, typer.Option(help="Named settings (see `tqc info`); other options override it.")]
SinkTokens = Annotated[int | None, count("Tokens at the start that stay dense.")]
ResidualWindow = Annotated[int | None, count("Recent tokens that stay dense at most, a multiple of 32.")]
Widths = Annotated[
    str | None, typer.Option(metavar="FILE", help="Widths of each layer, from `tqc calibrate`, in place of the bits.")
]
BudgetBits = Annotated[
    float | None, typer.Option(help="With --widths: choose anew, within so many code bits of an element.")
]
Strategy = Annotated[
    str | None,
    typer.Option(
        help="What becomes of tokens that leave the window: tiered, or evict, which forgets what nobody asked for yet."
    ),
]
Scorer = Annotated[str | None, typer.Option(help="With --strategy: which tokens stay (see `tqc plugins`).")]
ScorerKwargs = Annotated[
    str | None, typer.Option(metavar="NAME=VALUE,...", help="Parameters of --scorer, as ema_decay=0.95.")
]
Tiers = Annotated[
    str | None,
    typer.Option(help="With --strategy tiered: pages and bits of each tier, as 1x4+2x2/4; the rest evicted."),
]
Monitor = Annotated[
    str | None, typer.Option(metavar="NAME", help="Watch one head meanwhile: fidelity, stability, lyapunov.")
]
Config = Annotated[
    str | None, typer.Option(metavar="FILE", help="Options from `tqc search`; others that are given override them.")
]
Keep = Annotated[float | None, typer.Option(help="With --strategy evict: the share of tokens that stays.")]
SkipLayers = Annotated[str | None, typer.Option(metavar="N,N", help="Layers whose cache stays dense, as 0,1,-1.")]
MaxTokens = Annotated[int, count("Most tokens to generate.", positive)]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")]
Backend = Annotated[
    str, typer.Option(parser=one_of("torch", "mlx"), metavar="NAME", help="torch, or mlx for a model of mlx-lm.")
]
EvalBackend = Annotated[
    str,
    typer.Option(
        parser=one_of("torch", "mlx", "onnx"),
        metavar="NAME",
        help="torch, mlx for a model of mlx-lm, or onnx, for which the model is exported.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout and nothing else.")]
