"""How far compressed caches move a model's predictions from its dense ones, whether they lose what a text says far
back, and how many bits they take.

Everything is measured by decoding through the cache (`tqc.evaluate.decode`): the model compiled with backend "tqai"
and a plain DynamicCache.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from rich.table import Table

from tqc.cache.io import cache_bytes
from tqc.config import PRESETS, Config
from tqc.evaluate.decode import (
    BITS_LENGTH,
    Decoder,
    Scores,
    all_in_bits,
    decode_in_step,
    elements,
    first_line,
    layer_shapes,
    measured_bits,
)
from tqc.evaluate.needles import NUMBERS, HiddenNumbers, hide_numbers
from tqc.widths import Widths

DENSE, OURS, PEER = "dense", "tqc", "peer"
BACKENDS = ("torch", "onnx")
# Tokens that questions about a text take behind it, for which an exported model must have room.
ROOM = 256


@dataclass
class Row:
    """What was found for one cache. Numbers are None where it could not run; `reason` says why.

    Attributes:
        kind: "dense", "tqc" or "peer".
        options: of the backend, for "tqc".
        perplexity: exp of the mean negative log-likelihood; `perplexity_increase` is relative to dense.
        kl_mean, kl_median, kl_p99: KL(dense || this) of the next-token distributions over all scored positions, nats.
        top1_agreement: share of positions with the dense run's most likely token.
        numbers_nll: mean negative log-likelihood of the tokens of the hidden numbers when they are asked for, nats.
        numbers_found: of `Evaluation.numbers`, how many greedy decoding says right.
        bits: all-in bits per element at the end of the text, in the model's dtype: every byte that the cache holds
            times 8, over the numbers it stands for.
        bits_4096: the same for a bfloat16 cache of 4,096 tokens.
        cache_bytes: at the end of the text.
        packed_layers: how many layers were packed there.
    """

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    perplexity: float | None = None
    perplexity_increase: float | None = None
    kl_mean: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    numbers_nll: float | None = None
    numbers_found: int | None = None
    bits: float | None = None
    bits_4096: float | None = None
    cache_bytes: int | None = None
    packed_layers: int | None = None
    reason: str = ""


@dataclass
class Evaluation:
    """The result of `evaluate`. Prints as a table with rich.

    Attributes:
        tokens: length of the text; predictions are scored from position `score_from` on.
        numbers: how many were hidden in a text of the same length, and asked for.
    """

    model: str
    dtype: str
    tokens: int
    score_from: int
    numbers: int
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Table:
        title = f"{self.model}, {self.dtype}: {self.tokens:,} tokens decoded, scored from {self.score_from:,} on"
        table = Table(title=title, title_justify="left", caption_justify="left")
        table.add_column("cache")
        columns = [f"bits at {BITS_LENGTH:,}", "KL mean", "99 %", "same top-1", "perplexity"]
        for column in columns + ["NLL of hidden numbers", "found"] * bool(self.numbers):
            table.add_column(column, justify="right")
        for row in self.rows:
            if row.reason:
                table.caption = "\n".join(filter(None, [str(table.caption or ""), f"{row.name}: {row.reason}"]))
                continue
            table.add_row(
                row.name,
                _text(row.bits_4096, ".2f"),
                *(_text(value, ".2g") for value in (row.kl_mean, row.kl_p99)),
                _text(row.top1_agreement, ".1%"),
                _text(row.perplexity, ".2f") if row.kind == DENSE else _text(row.perplexity_increase, "+.1%"),
                *((_text(row.numbers_nll, ".3f"), f"{row.numbers_found} of {self.numbers}") if self.numbers else ()),
            )
        return table


def parse_setting(setting: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and backend options of a setting: options as they are, or a preset or widths with further parts.

    "default", "k4v2", "k3v3:w128:s8", "small:w64:haar:seed1": `w` is the residual window, `s` the sink tokens.

    Raises:
        ValueError, TypeError: naming what cannot be read or is not allowed.
    """
    if not isinstance(setting, str):
        options = dict(setting)
        config = Config.from_options(options)
        if config.groups:
            parts = [f"{config.groups.name} {config.groups.tiers_text}", str(config.groups.scorer)]
            bits = [] if config.tiers or config.budget_bits else [f"k{config.bits_k}v{config.bits_v}"]
            return " ".join([*bits, *parts, f"w{config.residual_window}"]), options
        widths = f"{config.widths.bits:.4g}-bits" if isinstance(config.widths, Widths) else None
        name = f"{widths or f'k{config.bits_k}v{config.bits_v}'}:w{config.residual_window}:s{config.sink_tokens}"
        return options.get("preset", name) if len(options) <= 1 else name, options
    head, *parts = setting.split(":")
    options = {}
    if match := re.fullmatch(r"k(\d+)v(\d+)", head):
        options = {"bits_k": int(match[1]), "bits_v": int(match[2])}
    elif head in PRESETS:
        options = {"preset": head}
    else:
        raise ValueError(f"setting {setting!r} begins with neither a preset ({', '.join(PRESETS)}) nor bits like k4v2")
    for part in parts:
        if part in ("hadamard", "haar"):
            options["rotation"] = part
        elif match := re.fullmatch(r"(w|s|seed)(\d+)", part):
            option = {"w": "residual_window", "s": "sink_tokens", "seed": "seed"}[match[1]]
            options[option] = int(match[2])
        else:
            raise ValueError(f"part {part!r} of setting {setting!r} is none of w64, s4, seed0, hadamard, haar")
    Config.from_options(options)
    return setting, options


def default_text() -> str:
    """English text that every Python carries: the topics of its documentation, in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def evaluate(
    model: Any,
    tokenizer: Any,
    settings: Sequence[str | Mapping[str, Any]],
    text: str | None = None,
    tokens: int = 2048,
    score_from: int = 256,
    numbers: int = NUMBERS,
    seed: int = 0,
    peers: bool = False,
    on_step: Callable[[str], None] | None = None,
    backend: str = "torch",
) -> Evaluation:
    """Compare caches of `settings` with the dense cache, all on the same text, in one run.

    Args:
        model: a causal language model of transformers, as it was loaded (not compiled); or one of mlx-lm, in an
            `tqc.mlx_trace.as_torch.AsTorch`.
        settings: see `parse_setting`.
        text: what is decoded; `default_text()` if None. Numbers are hidden in it too.
        tokens: how many tokens of it, fewer if it is shorter.
        score_from: first position whose prediction is scored.
        numbers: how many are hidden in a text of `tokens` tokens and asked for; 0 leaves that out.
        seed: which numbers, and whose.
        peers: also evaluate caches of other projects, as far as they are installed.
        on_step: called with a line about what is being done.
        backend: what runs the settings' caches: "torch" (MLX for a model of mlx-lm), or "onnx", for which the model is
            exported with each.

    Raises:
        ValueError: for a setting that cannot be read, a text that is too short, a tokenizer that does not tell
            numbers apart or a compiled model.
    """
    report = on_step or (lambda line: None)
    if getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod"):
        raise ValueError("model is compiled already: give it as it was loaded")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if tokens < score_from + 2:
        raise ValueError(f"tokens must be at least {score_from + 2}, as scores start at {score_from}; got {tokens}")
    parsed = [parse_setting(setting) for setting in settings]
    names = [name for name, _ in parsed]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"setting {sorted(twice)[0]!r} is given twice")
    if not callable(tokenizer):
        raise ValueError(f"tokenizer must be that of the model; got {tokenizer!r}")
    text = default_text() if text is None else text
    # A token is seldom more than 16 characters; encoding all of a long text would take longer than the rest.
    ids = tokenizer(text[: 16 * tokens], return_tensors="pt").input_ids[:, :tokens].to(model.device)
    if ids.shape[1] < score_from + 2:
        raise ValueError(f"text has {ids.shape[1]} tokens, fewer than score_from={score_from} and two more")
    hidden = hide_numbers(tokenizer, text, tokens, numbers, seed, model.device) if numbers else None

    dense, decoders, rows = _decoders(model, parsed, peers, None if backend == "torch" else tokens + ROOM)
    failed: dict[str, str] = {}
    alive = [decoder for decoder in decoders if not rows[decoder.name].reason]
    # Each setting has its own few graphs of one model.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=8 * (len(alive) + 1)):
        # Others apart from ours: their chunks must not end where our pages do.
        ours, others = ([d for d in alive if d.optional == optional] for optional in (False, True))
        scores = decode_in_step(dense, ours, ids, score_from, lambda line: report(f"decoding: {line}"), failed)
        if others:
            scores |= decode_in_step(dense, others, ids, score_from, lambda line: report(f"peers: {line}"), failed)
        for decoder in (dense, *alive):
            if decoder.name in failed:
                rows[decoder.name].reason = failed[decoder.name]
            else:
                report(f"measuring the cache of {decoder.name}")
                _fill(rows[decoder.name], scores, decoder, dense)
        for decoder in (dense, *alive):
            if hidden and not rows[decoder.name].reason:
                _ask(hidden, decoder, rows[decoder.name], model, report)
    return Evaluation(
        model=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        tokens=ids.shape[1],
        score_from=score_from,
        numbers=numbers,
        rows=list(rows.values()),
    )


def _decoders(
    model: Any, parsed: Sequence[tuple[str, dict[str, Any]]], peers: bool, exported: int | None
) -> tuple[Decoder, list[Decoder], dict[str, Row]]:
    """The dense decoder, all others, and an empty row for each; those that cannot run have a reason. `exported` is how
    many tokens those of ours shall have room for in onnxruntime; None for the model's own framework."""
    new_cache, compiled, held = _ways(model)
    dense = Decoder(DENSE, model, new_cache, held=held)
    decoders, rows = [], {DENSE: Row(DENSE, DENSE)}
    for name, options in parsed:
        config = Config.from_options(options)
        # Neither head_dim nor width has a say in which tokens are packed.
        formats = () if config.off else config.formats(64, 64)
        if exported is None or config.off:
            decoders.append(Decoder(name, compiled(options), new_cache, formats, held=held))
        else:
            from tqc.evaluate.onnx import onnx_decoder

            decoders.append(onnx_decoder(name, model, options, formats, exported))
        rows[name] = Row(name, OURS, options)
    if peers:
        from tqc.evaluate.peers import PEERS

        for peer in PEERS:
            row = rows[peer.name] = Row(peer.name, PEER, reason=peer.missing() or "")
            if row.reason:
                continue
            try:
                decoders.append(Decoder(peer.name, model, partial(peer.new_cache, model), optional=True))
            except Exception as error:
                row.reason = first_line(error)
    return dense, decoders, rows


def _ways(model: Any) -> tuple[Callable[[], Any], Callable[[dict[str, Any]], Any], Callable[[Any], Any]]:
    """What makes a cache of a model, what compiles it with options, and a cache as one of transformers."""
    if not isinstance(model, torch.nn.Module):
        return model.new_cache, model.compiled, model.held
    from transformers import DynamicCache

    def compiled(options: dict[str, Any]) -> Any:
        return torch.compile(model, backend="tqai", options={"rest": "eager", **options})

    return lambda: DynamicCache(config=model.config), compiled, lambda cache: cache


def _fill(row: Row, scores: Mapping[str, Scores], decoder: Decoder, dense: Decoder) -> None:
    """Enter scores and sizes, as the decoders stand at the end of the text."""
    summary, reference = scores[row.name].summary(), scores[DENSE].summary()
    for name, number in summary.items():
        setattr(row, name, number)
    row.perplexity_increase = summary["perplexity"] / reference["perplexity"] - 1
    held, dense_held = decoder.held(decoder.cache), dense.held(dense.cache)
    row.cache_bytes = cache_bytes(held)
    row.bits = row.cache_bytes * 8 / elements(dense_held)
    if row.kind == PEER:
        row.bits_4096 = measured_bits(decoder.new_cache, layer_shapes(dense_held)[0])
        return
    shapes, config = layer_shapes(held), Config.from_options(row.options)
    row.packed_layers = sum(shape.packed for shape in shapes)
    row.bits_4096 = all_in_bits(config, shapes)
    if row.kind == OURS and not config.off and not row.packed_layers:
        row.reason = "no layer's cache was packed; tqc.explain says why"


def _ask(hidden: HiddenNumbers, decoder: Decoder, row: Row, model: Any, report: Callable[[str], None]) -> None:
    # Logits of a whole prompt would take more memory than its cache.
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    try:
        nll, row.numbers_found = hidden.ask(decoder, lambda line: report(f"{decoder.name}: {line}"), **few)
        row.numbers_nll = nll.mean().item()
    except Exception as error:
        if not decoder.optional:
            raise
        row.reason = first_line(error)


def _text(number: float | None, spec: str) -> str:
    return "-" if number is None else format(number, spec)
