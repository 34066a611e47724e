"""A plan as a picture: steps by layers, a colour for what each does."""

from __future__ import annotations

import os

from tqc.diffusion.plan import OTHER, Plan
from tqc.plugins.step_strategy import CELLS

_COLOURS = ("#30343f", "#8ecae6", "#219ebc", "#126782", "#f4a259", "#b7e4a0", "#74b65f", "#3c7a34")


def plot_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write a picture of a plan, in the format that the name of the file says. Needs matplotlib."""
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(max(5, 0.25 * plan.steps + 3), max(2.5, 0.25 * plan.layers + 1.2)), layout="constrained")
    axes = figure.add_subplot()
    numbers = [[CELLS.index(row[layer].step) for row in plan.rows] for layer in range(plan.layers)]
    axes.imshow(numbers, cmap=ListedColormap(_COLOURS), norm=BoundaryNorm(range(len(CELLS) + 1), len(CELLS)))
    for step, row in enumerate(plan.rows):
        for layer, cell in enumerate(row):
            if cell.guidance == OTHER:
                axes.text(step, layer, "½", color="white", ha="center", va="center", fontsize=7)
    axes.set(xlabel="step", ylabel="layer", aspect="auto", title=_title(plan))
    used = sorted({number for row in numbers for number in row})
    handles = [Patch(color=_COLOURS[number], label=CELLS[number].replace("_", " ")) for number in used]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def _title(plan: Plan) -> str:
    left = plan.found.get("total")
    psnr = plan.found.get("psnr_db")
    said = [plan.model]
    said += [f"{left:.0%} of operations"] if left is not None else []
    said += [f"{psnr:.1f} dB"] if psnr is not None else []
    return ", ".join(said)
