"""How far compressed caches move a model's predictions from its dense ones, and how many bits they take.

Everything is measured by decoding through the cache (`tqc.evaluate.decode`): the model compiled with backend "tqai"
and a plain DynamicCache.
"""

from __future__ import annotations

import os
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
    PASSKEY_DEPTHS,
    Decoder,
    Passkey,
    Scores,
    all_in_bits,
    decode_in_step,
    elements,
    layer_shapes,
    measured_bits,
    passkeys,
)
from tqc.widths import Widths

DENSE, OURS, PEER = "dense", "tqc", "peer"


@dataclass
class Row:
    """What was found for one cache. Numbers are None where it could not run; `reason` says why.

    Attributes:
        kind: "dense", "tqc" or "peer".
        options: of the backend, for "tqc".
        perplexity: exp of the mean negative log-likelihood; `perplexity_increase` is relative to dense.
        kl_mean, kl_median, kl_p99: KL(dense || this) of the next-token distributions over all scored positions, nats.
        top1_agreement: share of positions with the dense run's most likely token.
        passkeys_found: of `Evaluation.passkeys`.
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
    passkeys_found: int | None = None
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
        passkeys: how many numbers were asked for in texts of `passkey_tokens` tokens.
    """

    model: str
    dtype: str
    tokens: int
    score_from: int
    passkeys: int
    passkey_tokens: int
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Table:
        title = f"{self.model}, {self.dtype}: {self.tokens:,} tokens decoded, scored from {self.score_from:,} on"
        table = Table(title=title, title_justify="left", caption_justify="left")
        table.add_column("cache")
        for column in (f"bits at {BITS_LENGTH:,}", "KL mean", "median", "99 %", "same top-1", "perplexity", "passkeys"):
            table.add_column(column, justify="right")
        for row in self.rows:
            if row.reason:
                table.caption = "\n".join(filter(None, [str(table.caption or ""), f"{row.name}: {row.reason}"]))
                continue
            table.add_row(
                row.name,
                _text(row.bits_4096, ".2f"),
                *(_text(value, ".2g") for value in (row.kl_mean, row.kl_median, row.kl_p99)),
                _text(row.top1_agreement, ".1%"),
                _text(row.perplexity, ".2f") + (f" ({row.perplexity_increase:+.1%})" if row.kind != DENSE else ""),
                f"{row.passkeys_found} of {self.passkeys}" if self.passkeys else "-",
            )
        return table

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw mean KL over all-in bits at 4,096 tokens as a PNG.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("matplotlib is not installed: pip install matplotlib") from None
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for kind, marker in ((OURS, "o"), (PEER, "x")):
            points = [
                (row.bits_4096, row.kl_mean, row.name)
                for row in self.rows
                if row.kind == kind and row.bits_4096 is not None and row.kl_mean
            ]
            if not points:
                continue
            axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], marker=marker, label=kind)
            for x, y, name in points:
                axes.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
        axes.set_yscale("log")
        axes.set_xlabel(f"all-in bits per element at {BITS_LENGTH:,} tokens, bfloat16")
        axes.set_ylabel("KL to the dense model, nats (mean)")
        axes.set_title(self.model)
        axes.grid(True, which="both", alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        figure.savefig(path, format="png", dpi=150)


def parse_setting(setting: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and backend options of a setting: options as they are, or a preset or widths with further parts.

    "default", "k4v2", "k3v3:w128:s8", "small:w64:haar:seed1": `w` is the residual window, `s` the sink tokens.

    Raises:
        ValueError, TypeError: naming what cannot be read or is not allowed.
    """
    if not isinstance(setting, str):
        options = dict(setting)
        config = Config.from_options(options)
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
    passkey_tokens: int = 1024,
    peers: bool = False,
    on_step: Callable[[str], None] | None = None,
) -> Evaluation:
    """Compare caches of `settings` with the dense cache, all on the same text, in one run.

    Args:
        model: a causal language model of transformers, as it was loaded (not compiled).
        settings: see `parse_setting`.
        text: what is decoded; `default_text()` if None. Passkeys are hidden in it too.
        tokens: how many tokens of it, fewer if it is shorter.
        score_from: first position whose prediction is scored.
        passkey_tokens: length of the texts that hide a number; 0 leaves passkeys out.
        peers: also evaluate caches of other projects, as far as they are installed.
        on_step: called with a line about what is being done.

    Raises:
        ValueError: for a setting that cannot be read, a text that is too short or a compiled model.
    """
    report = on_step or (lambda line: None)
    if getattr(model, "_compiled_call_impl", None) is not None or hasattr(model, "_orig_mod"):
        raise ValueError("model is compiled already: give it as it was loaded")
    if tokens < score_from + 2:
        raise ValueError(f"tokens must be at least {score_from + 2}, as scores start at {score_from}; got {tokens}")
    parsed = [parse_setting(setting) for setting in settings]
    names = [name for name, _ in parsed]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"setting {sorted(twice)[0]!r} is given twice")
    text = default_text() if text is None else text
    # A token is seldom more than 16 characters; encoding all of a long text would take longer than the rest.
    ids = tokenizer(text[: 16 * tokens], return_tensors="pt").input_ids[:, :tokens].to(model.device)
    if ids.shape[1] < score_from + 2:
        raise ValueError(f"text has {ids.shape[1]} tokens, fewer than score_from={score_from} and two more")

    dense, decoders, rows = _decoders(model, parsed, peers)
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
        cases = passkeys(tokenizer, text, passkey_tokens, model.device) if passkey_tokens else []
        for decoder in (dense, *alive):
            if cases and not rows[decoder.name].reason:
                rows[decoder.name].passkeys_found = _ask(cases, decoder, tokenizer, report)
    return Evaluation(
        model=type(model).__name__,
        dtype=str(model.dtype).removeprefix("torch."),
        tokens=ids.shape[1],
        score_from=score_from,
        passkeys=len(PASSKEY_DEPTHS) if passkey_tokens else 0,
        passkey_tokens=passkey_tokens,
        rows=list(rows.values()),
    )


def _decoders(
    model: Any, parsed: Sequence[tuple[str, dict[str, Any]]], peers: bool
) -> tuple[Decoder, list[Decoder], dict[str, Row]]:
    """The dense decoder, all others, and an empty row for each; those that cannot run have a reason."""
    from transformers import DynamicCache

    def new_cache() -> Any:
        return DynamicCache(config=model.config)

    dense = Decoder(DENSE, model, new_cache)
    decoders, rows = [], {DENSE: Row(DENSE, DENSE)}
    for name, options in parsed:
        config = Config.from_options(options)
        # Neither head_dim nor width has a say in which tokens are packed.
        formats = () if config.off else config.formats(64, 64)
        compiled = torch.compile(model, backend="tqai", options={"rest": "eager", **options})
        decoders.append(Decoder(name, compiled, new_cache, formats))
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
                row.reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return dense, decoders, rows


def _fill(row: Row, scores: Mapping[str, Scores], decoder: Decoder, dense: Decoder) -> None:
    """Enter scores and sizes, as the decoders stand at the end of the text."""
    summary, reference = scores[row.name].summary(), scores[DENSE].summary()
    for name, number in summary.items():
        setattr(row, name, number)
    row.perplexity_increase = summary["perplexity"] / reference["perplexity"] - 1
    row.cache_bytes = cache_bytes(decoder.cache)
    row.bits = row.cache_bytes * 8 / elements(dense.cache)
    if row.kind == PEER:
        row.bits_4096 = measured_bits(decoder.new_cache, layer_shapes(dense.cache)[0])
        return
    shapes, config = layer_shapes(decoder.cache), Config.from_options(row.options)
    row.packed_layers = sum(shape.packed for shape in shapes)
    row.bits_4096 = all_in_bits(config, shapes)
    if row.kind == OURS and not config.off and not row.packed_layers:
        row.reason = "no layer's cache was packed; tqc.explain says why"


def _ask(cases: Sequence[Passkey], decoder: Decoder, tokenizer: Any, report: Callable[[str], None]) -> int:
    found = 0
    for case in cases:
        report(f"passkey at {case.depth:.0%} with {decoder.name}")
        found += case.asked(decoder, tokenizer)
    decoder.restart()
    return found


def _text(number: float | None, spec: str) -> str:
    return "-" if number is None else format(number, spec)
