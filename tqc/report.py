"""What the compiler found in a model, what it did with it, and why not more."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from tqc.passes.plan import DENSE, FUSE, PACK, Plan

# The plans of the most recent graphs, newest last.
_plans: deque[Plan] = deque(maxlen=64)
_collectors: list[list[Plan]] = []


def record(plan: Plan) -> None:
    """Keep the plan of a graph that is being compiled."""
    _plans.append(plan)
    for collector in _collectors:
        collector.append(plan)


@contextlib.contextmanager
def collect() -> Iterator[list[Plan]]:
    """The plans of all graphs that are compiled inside the `with` block."""
    plans: list[Plan] = []
    _collectors.append(plans)
    try:
        yield plans
    finally:
        _collectors.remove(plans)


@dataclass
class Explanation:
    """What was found in the graphs of one model.

    Attributes:
        graphs: one entry a graph, in the order they were compiled, each a list of sites (see `Site.to_dict`).
        cache_bytes: bytes that the cache holds after the run, or None where there is none to look at.
        dense_bytes: bytes that the same tokens take dense.
        tokens: how many tokens the cache holds.
        notes: what concerns the whole model.
    """

    graphs: list[list[dict[str, Any]]]
    cache_bytes: int | None = None
    dense_bytes: int | None = None
    tokens: int | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "graphs": self.graphs,
            "cache_bytes": self.cache_bytes,
            "dense_bytes": self.dense_bytes,
            "tokens": self.tokens,
            "notes": self.notes,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        meaning = {
            FUSE: "attention reads packed",
            PACK: "cache packed on leaving",
            DENSE: "left dense",
        }
        for number, sites in enumerate(self.graphs):
            table = Table(title=f"graph {number}: {len(sites)} attention sites", title_justify="left")
            for column in ("layers", "what", "kernel", "keys", "values", "why"):
                table.add_column(column, overflow="fold")
            for first, last, site in _runs(sites):
                layers = str(first) if first == last else f"{first}-{last}"
                why = "; ".join(filter(None, [site["reason"], *site["notes"]]))
                table.add_row(layers, meaning[site["action"]], site["kernel"], site["keys"], site["values"], why)
            yield table
        if self.cache_bytes is not None and self.dense_bytes:
            share = f"{self.cache_bytes / self.dense_bytes:.3f} of dense ({self.dense_bytes:,})"
            yield f"cache: {self.cache_bytes:,} bytes for {self.tokens} tokens, {share}"
        yield from self.notes

    def __str__(self) -> str:
        console = Console(width=140, record=True, file=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _runs(sites: list[dict[str, Any]]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Consecutive sites that read the same but for their layer."""

    def same(site: dict[str, Any]) -> dict[str, Any]:
        return {key: val for key, val in site.items() if key not in ("layer", "name")}

    start = 0
    for index in range(1, len(sites) + 1):
        if index == len(sites) or same(sites[index]) != same(sites[start]):
            yield sites[start]["layer"], sites[index - 1]["layer"], sites[start]
            start = index


def explain(model: torch.nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **inputs: Any) -> Explanation:
    """Compile `model` as the backend would, run it on `inputs`, and say what was found, what was not, and why.

    A model with `generate` makes a few tokens, so that its prefill and decode graphs are both seen; any other is called
    once. Nothing but attention and the cache is compiled, and the model stays as it was.

    Args:
        options: of the backend; those that the model was compiled with if it was, else the defaults.
    """
    from tqc.backend import tqai
    from tqc.cache.io import cache_bytes
    from tqc.optimized_module import options_of, with_compiled_call

    inner: Any = getattr(model, "_orig_mod", model)
    settings = {**(options if options is not None else options_of(model) or {}), "rest": "eager"}
    # A backend of its own, since dynamo would reuse what it compiled for equal options, and nothing would be seen.
    compiled: Any = torch.compile(inner, backend=functools.partial(tqai, options=settings))
    cache = None
    with collect() as plans, torch.no_grad():
        if hasattr(inner, "generate"):
            generate = with_compiled_call(compiled, inner.generate)
            result = generate(*args, **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
            cache = getattr(result, "past_key_values", None)
        else:
            compiled(*args, **inputs)
    explanation = Explanation([[site.to_dict() for site in plan.sites] for plan in plans])
    explanation.notes += [f"graph {number}: {plan.cuda_graph}" for number, plan in enumerate(plans) if plan.cuda_graph]
    if cache is not None:
        explanation.tokens = int(cache.get_seq_length())
        explanation.cache_bytes = cache_bytes(cache)
        explanation.dense_bytes = _dense_bytes(cache)
    if not any(explanation.graphs):
        explanation.notes.append("no attention was found")
    if not any(site["action"] == FUSE for sites in explanation.graphs for site in sites):
        explanation.notes.append("no attention reads a packed cache")
    return explanation


def _dense_bytes(cache: Any) -> int:
    """Bytes of the same keys and values, dense."""
    from torch.utils import _pytree as pytree

    layers = getattr(cache, "layers", [])
    tensors = pytree.tree_leaves([(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers])
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
