"""What the compiler found in a model, what it did with it, and why not more."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from tqc.passes.plan import DENSE, FUSE, PACK, READ, UNCACHED, Plan

log = logging.getLogger(__name__)
_said: set[tuple[str, str]] = set()


@dataclass
class _Collector:
    plans: list[Plan]
    texts: bool


_collectors: list[_Collector] = []


def record(plan: Plan) -> None:
    """Show the plan of a graph that is being compiled to whoever collects."""
    for collector in _collectors:
        collector.plans.append(plan)


def warn_if_dense(plan: Plan) -> None:
    """Say once a model and reason that a graph which has a cache leaves all of it dense."""
    reason = plan.why_dense()
    if reason and (plan.model, reason) not in _said:
        _said.add((plan.model, reason))
        log.warning("a graph of %s packs nothing of its cache: %s (tqc.explain shows each layer)", plan.model, reason)


def wants_texts() -> bool:
    """Whether somebody who collects plans wants their graphs as text."""
    return any(collector.texts for collector in _collectors)


@contextlib.contextmanager
def collect(texts: bool = False) -> Iterator[list[Plan]]:
    """The plans of all graphs that are compiled inside the `with` block, with the graphs as `texts` if wanted."""
    collector = _Collector([], texts)
    _collectors.append(collector)
    try:
        yield collector.plans
    finally:
        _collectors.remove(collector)


@dataclass
class Explanation:
    """What was found in the graphs of one model.

    Attributes:
        graphs: one entry a graph, in the order they were compiled, each a list of sites (see `Site.to_dict`).
        cache_bytes: bytes that the cache holds after the run, or None where there is none to look at.
        dense_bytes: bytes that the same tokens take dense.
        tokens: how many tokens the cache holds, in an encoder-decoder those of both.
        notes: what concerns the whole model.
        texts: where they were asked for, of each graph its text by the name of the pass that made it.
    """

    graphs: list[list[dict[str, Any]]]
    cache_bytes: int | None = None
    dense_bytes: int | None = None
    tokens: int | None = None
    notes: list[str] = field(default_factory=list)
    texts: list[dict[str, str]] = field(default_factory=list)

    def note_actions(self, unread: bool) -> None:
        """Say it where no graph reads a packed cache, and why.

        Args:
            unread: whether a graph writes a cache that no attention reads.
        """
        if unread:
            self.notes.append("a cache is written, but no attention was found that reads it")
        actions = {site["action"] for sites in self.graphs for site in sites}
        if not actions:
            self.notes.append("no attention was found")
        elif actions == {UNCACHED}:
            self.notes.append("no attention has a cache, so there is nothing to pack")
        elif not actions & {FUSE, READ}:
            self.notes.append("no attention reads a packed cache")

    def to_dict(self) -> dict[str, Any]:
        return {
            "graphs": self.graphs,
            "cache_bytes": self.cache_bytes,
            "dense_bytes": self.dense_bytes,
            "tokens": self.tokens,
            "notes": self.notes,
            "texts": self.texts,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        meaning = {
            FUSE: "attention reads packed",
            PACK: "cache packed on leaving",
            READ: "cache packed, read decoded",
            DENSE: "left dense",
            UNCACHED: "has no cache",
        }
        for number, sites in enumerate(self.graphs):
            table = Table(title=f"graph {number}: {len(sites)} attention sites", title_justify="left")
            for column in ("layers", "what", "kernel", "keys", "values", "why"):
                table.add_column(column, overflow="fold")
            for first, last, site in _runs(sites):
                layers = "" if first is None else str(first) if first == last else f"{first}-{last}"
                why = "; ".join(filter(None, [site["reason"], *site["notes"]]))
                table.add_row(layers, meaning[site["action"]], site["kernel"], site["keys"], site["values"], why)
            yield table
            for name, text in (self.texts[number] if self.texts else {}).items():
                yield Text(f"graph {number}, {name}:", style="bold")
                yield Text(text, no_wrap=True, overflow="ignore")
        if self.cache_bytes is not None and self.dense_bytes:
            share = f"{self.cache_bytes / self.dense_bytes:.3f} of dense ({self.dense_bytes:,})"
            yield f"cache: {self.cache_bytes:,} bytes for {self.tokens} tokens, {share}"
        yield from self.notes

    def __str__(self) -> str:
        console = Console(width=140, record=True, file=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self, crop=False)  # a line of a graph is as long as it is
        return capture.get()


def _runs(sites: list[dict[str, Any]]) -> Iterator[tuple[int | None, int | None, dict[str, Any]]]:
    """Consecutive sites that read the same but for their layer."""

    def same(site: dict[str, Any]) -> dict[str, Any]:
        return {key: val for key, val in site.items() if key not in ("layer", "name")}

    start = 0
    for index in range(1, len(sites) + 1):
        if index == len(sites) or same(sites[index]) != same(sites[start]):
            yield sites[start]["layer"], sites[index - 1]["layer"], sites[start]
            start = index
