"""`tqc plugins`: what there is to choose from."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from tqc.plugins import plugins


def described() -> list[dict[str, Any]]:
    """Each plugin: name, kind, paper, what it does in a line and in full, parameters with their defaults."""
    return [
        {
            "name": plugin.name,
            "kind": plugin.kind,
            "paper": plugin.paper,
            "title": (sys.modules[plugin.__module__].__doc__ or "").strip().splitlines()[0],
            "what": " ".join((plugin.__doc__ or "").split()),
            "parameters": {field.name: field.default for field in dataclasses.fields(plugin)},
        }
        for plugin in plugins().values()
    ]


def table(found: Sequence[dict[str, Any]]) -> Table:
    made = Table("plugin", "kind", "parameters", "what", "from")
    for plugin in found:
        parameters = ", ".join(f"{name}={value!r}" for name, value in plugin["parameters"].items())
        made.add_row(plugin["name"], plugin["kind"], parameters, plugin["title"], plugin["paper"])
    return made
