"""`tqc.explain(pipe)`: what the compiled variants of a pipeline's transformers compute and share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from tqc.diffusion.dispatcher import Dispatcher, dispatcher_of
from tqc.diffusion.pipeline import TRANSFORMERS
from tqc.diffusion.variants import Action, Variant


@dataclass
class VariantExplanation:
    """One compiled variant.

    Attributes:
        layers: what its layers do, as runs of (first, last, what).
        sites: how many attention sites there are, by kind and source.
        flops: of a call, "attention" and "total".
        notes: why something is computed that was to be shared.
    """

    layers: list[tuple[int, int, str]]
    sites: dict[str, int]
    flops: dict[str, int]
    notes: list[str]


@dataclass
class PipelineExplanation:
    """What was found in a pipeline.

    Attributes:
        transformers: by name in the pipeline and class, the variants that calls have needed so far.
        notes: what concerns the whole pipeline.
    """

    transformers: dict[str, list[VariantExplanation]]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for name, variants in self.transformers.items():
            most = max((variant.flops["total"] for variant in variants), default=0)
            table = Table("layers", "attention sites", "attention GFLOP", "total GFLOP", "of the most", "why")
            table.title, table.title_justify = f"{name}: {len(variants)} variants", "left"
            for variant in variants:
                layers = ", ".join(
                    f"{first}-{last} {what}" if first != last else f"{first} {what}"
                    for first, last, what in variant.layers
                )
                sites = ", ".join(f"{count} {what}" for what, count in variant.sites.items())
                numbers = [f"{variant.flops[what] / 1e9:.3f}" for what in ("attention", "total")]
                share = f"{variant.flops['total'] / most:.2f}" if most else ""
                table.add_row(layers, sites, *numbers, share, "; ".join(variant.notes))
            yield table
        yield from self.notes

    def __str__(self) -> str:
        console = Console(width=140, record=True, file=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def explain_pipeline(pipe: Any, *args: Any, **call: Any) -> PipelineExplanation:
    """Variants of the transformers of a compiled pipeline; with arguments the pipeline is called with them first.

    Raises:
        ValueError: for a pipeline that is not compiled.
    """
    found = {name: dispatcher_of(getattr(pipe, name, None)) for name in TRANSFORMERS}
    dispatchers = {name: dispatcher for name, dispatcher in found.items() if dispatcher is not None}
    if not dispatchers:
        raise ValueError(f"{type(pipe).__name__} is not compiled: call tqc.compile_pipeline first")
    if args or call:
        pipe(*args, **call)
    explanation = PipelineExplanation(
        {f"{name} ({type(found.transformer).__name__})": _variants(found) for name, found in dispatchers.items()}
    )
    if not any(explanation.transformers.values()):
        explanation.notes.append("nothing was called yet: give explain the arguments of a call")
    return explanation


def _variants(dispatcher: Dispatcher) -> list[VariantExplanation]:
    return [
        VariantExplanation(list(_runs(row)), _sites(variant), dict(variant.flops), _notes(variant))
        for row, (variant, _) in dispatcher.variants.items()
    ]


def _runs(row: tuple[Action, ...]) -> Iterator[tuple[int, int, str]]:
    start = 0
    for layer in range(1, len(row) + 1):
        if layer == len(row) or row[layer] != row[start]:
            yield start, layer - 1, _words(row[start])
            start = layer


def _words(action: Action) -> str:
    said = [action.source if action.guidance == "full" else f"of {action.guidance}"]
    said += [f"of {action.terms} steps"] if action.terms > 1 else []
    said += [f"keeps {', '.join(action.keep)}"] if action.keep else []
    return " ".join([*said, *(["lends"] if action.lend else [])])


def _sites(variant: Variant) -> dict[str, int]:
    return dict(Counter(f"{site.kind} {site.source}" for sites in variant.sites for site in sites))


def _notes(variant: Variant) -> list[str]:
    notes = [site.note for sites in variant.sites for site in sites if site.note]
    return list(dict.fromkeys([*variant.notes, *notes]))
