"""`tqc export`, and `tqc run` of what it wrote."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from tqc.cli.console import status_of, stderr
from tqc.cli.inputs import BadInput, fitting_widths, flag, given_options, load
from tqc.cli.options import (
    BitsK,
    BitsV,
    BudgetBits,
    Dtype,
    Json,
    Model,
    Preset,
    ResidualWindow,
    SinkTokens,
    Widths,
    count,
    positive,
)


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
    with status_of("loading the model") as status:
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


def run_exported(folder: str, prompt: str, max_tokens: int, as_json: bool, options: dict[str, Any]) -> None:
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
        stderr().print(line, style="dim", highlight=False, soft_wrap=True)
