"""`tqc plugins`: what there is to choose from."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tqc.plugins import plugins

# In a checkout of the project, whose figures are not installed with it.
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "plugins.json"
FIGURES = ("model", "setting", "bits_4096", "kl_mean", "numbers_nll", "numbers_found")


def measured() -> dict[str, list[dict[str, Any]]]:
    """By scorer, its rows of benchmarks/results/plugins.json, least KL first; none where there is no such file."""
    found: dict[str, list[dict[str, Any]]] = {}
    rows = json.loads(RESULTS.read_text("utf-8"))["rows"] if RESULTS.is_file() else []
    for row in sorted((row for row in rows if row.get("kl_mean") is not None), key=lambda row: row["kl_mean"]):
        if name := row.get("options", {}).get("scorer"):
            found.setdefault(name, []).append({field: row.get(field) for field in FIGURES})
    return found


def described() -> list[dict[str, Any]]:
    """Each plugin: name, kind, paper, what it does in a line and in full, parameters with their defaults, what it
    costs and gains where that was measured."""
    figures = measured()
    return [
        {
            "name": plugin.name,
            "kind": plugin.kind,
            "paper": plugin.paper,
            "title": (sys.modules[plugin.__module__].__doc__ or "").strip().splitlines()[0],
            "what": " ".join((plugin.__doc__ or "").split()),
            "parameters": {field.name: field.default for field in dataclasses.fields(plugin)},
            "measured": figures.get(plugin.name, []),
        }
        for plugin in plugins().values()
    ]


def table(found: Sequence[dict[str, Any]]) -> Table:
    columns = ["plugin", "kind", "parameters", "what", "from"]
    made = Table(*columns, *(["least KL that was measured"] if any(plugin["measured"] for plugin in found) else []))
    for plugin in found:
        parameters = ", ".join(f"{name}={value!r}" for name, value in plugin["parameters"].items())
        figures = [
            f"{row['kl_mean']:.2g} at {row['bits_4096']:.2f} bits, {row['numbers_found']} numbers, {row['model']}"
            for row in plugin["measured"][:1]
        ]
        made.add_row(plugin["name"], plugin["kind"], parameters, plugin["title"], plugin["paper"], *figures)
    return made
