"""Evaluations as a picture: what a cache loses over the bits that it takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import IO, Any

from tqc.evaluate.decode import BITS_LENGTH
from tqc.evaluate.evaluation import DENSE, OURS, PEER, Evaluation


def plot(evaluations: Sequence[Evaluation], path: str | os.PathLike[str] | IO[bytes]) -> None:
    """Draw mean KL and the NLL of hidden numbers over all-in bits at 4,096 tokens as a PNG, a column of panels a model.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("matplotlib is not installed: pip install matplotlib") from None
    measures = {"kl_mean": "KL to the dense model, nats (mean)"}
    if any(evaluation.numbers for evaluation in evaluations):
        measures["numbers_nll"] = "NLL of hidden numbers, nats a token"
    size = (7 * len(evaluations), 4.5 * len(measures))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(measures), len(evaluations), squeeze=False)
    for column, evaluation in enumerate(evaluations):
        panels[0, column].set_title(evaluation.model)
        for axes, (measure, label) in zip(panels[:, column], measures.items(), strict=True):
            _panel(axes, evaluation, measure)
            axes.set_xlabel(f"all-in bits per element at {BITS_LENGTH:,} tokens, bfloat16")
            axes.set_ylabel(label)
    figure.savefig(path, format="png", dpi=150)


def _panel(axes: Any, evaluation: Evaluation, measure: str) -> None:
    for kind, marker in ((OURS, "o"), (PEER, "x")):
        points = [
            (row.bits_4096, getattr(row, measure), row.name)
            for row in evaluation.rows
            if row.kind == kind and row.bits_4096 is not None and getattr(row, measure)
        ]
        if not points:
            continue
        axes.scatter([x for x, _, _ in points], [y for _, y, _ in points], marker=marker, label=kind)
        for x, y, name in points:
            axes.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    dense = [getattr(row, measure) for row in evaluation.rows if row.kind == DENSE]
    if dense and dense[0]:
        axes.axhline(dense[0], linestyle=":", color="gray", label=DENSE)
    axes.set_yscale("log")
    axes.grid(True, which="both", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
