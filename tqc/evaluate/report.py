"""Evaluations as one HTML file with its pictures in it, that opens without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tqc.evaluate.evaluation import DENSE, Evaluation
from tqc.evaluate.plot import plot

COLUMNS = {
    "name": ("cache", "{}"),
    "bits_4096": ("bits at 4,096 tokens", "{:.2f}"),
    "kl_mean": ("KL mean", "{:.2g}"),
    "kl_p99": ("KL 99 %", "{:.2g}"),
    "top1_agreement": ("same top-1", "{:.1%}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "numbers_nll": ("NLL of hidden numbers", "{:.3f}"),
    "numbers_found": ("found", "{}"),
    "cache_bytes": ("cache bytes", "{:,}"),
}
_STYLE = (
    "body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{border:1px solid #bbb;padding:.3em .6em;text-align:right}td:first-child,th:first-child{text-align:left}"
    "img{max-width:100%}.dense{background:#eee}"
)


def html(evaluations: Sequence[Evaluation], about: Mapping[str, Any]) -> str:
    """A page: what it was made with, for each model a table, and one picture of losses over bits.

    Args:
        about: facts on top, by name: versions, machine, date.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    picture = io.BytesIO()
    plot(evaluations, picture)
    source = base64.b64encode(picture.getvalue()).decode()
    facts = "".join(f"<li>{escape(name)}: {escape(str(value))}</li>" for name, value in about.items())
    tables = "".join(map(_table, evaluations))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>tqc benchmark</title>'
        f'<style>{_STYLE}</style></head><body><h1>tqc benchmark</h1><ul>{facts}</ul><img alt="losses over bits" '
        f'src="data:image/png;base64,{source}">{tables}</body></html>\n'
    )


def _table(evaluation: Evaluation) -> str:
    heads = "".join(f"<th>{escape(title)}</th>" for title, _ in COLUMNS.values())
    rows = []
    for row in evaluation.rows:
        if row.reason:
            cells = f'<td>{escape(row.name)}</td><td colspan="{len(COLUMNS) - 1}">{escape(row.reason)}</td>'
        else:
            cells = "".join(f"<td>{_cell(getattr(row, field), text)}</td>" for field, (_, text) in COLUMNS.items())
        rows.append(f'<tr class="{"dense" if row.kind == DENSE else ""}">{cells}</tr>')
    return (
        f"<h2>{escape(evaluation.model)}, {escape(evaluation.dtype)}</h2><p>{evaluation.tokens:,} tokens decoded "
        f"through each cache, scored from {evaluation.score_from:,} on; {evaluation.numbers} hidden numbers.</p>"
        f"<table><tr>{heads}</tr>{''.join(rows)}</table>"
    )


def _cell(value: Any, text: str) -> str:
    return "" if value is None else escape(text.format(value))
