"""Draw benchmarks/results/generate_peers.json and attention.json, each into a PNG beside it.

python benchmarks/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

RESULTS = Path(__file__).resolve().parent / "results"
TQC_COLOR = "tab:red"
OTHER_COLORS = [color for number, color in enumerate(pyplot.get_cmap("tab20").colors) if number != 6]  # which is red


def generate_peers(result: dict[str, Any], file: Path) -> None:
    """Milliseconds of a token over the tokens in the cache, and their increase over the shortest context."""
    figure, (whole, increase) = pyplot.subplots(1, 2, figsize=(15, 6), sharex=True, layout="constrained")
    for number, row in enumerate(result["rows"]):
        points = sorted((int(field[3:]), value) for field, value in row.items() if field.startswith("ms_"))
        if len(points) < 2:
            continue
        contexts, times = zip(*points, strict=True)
        ours = row["name"].startswith("tqc")
        style: dict[str, Any] = {
            "label": row["name"],
            "marker": "osD^vP*X"[number % 8],
            "linestyle": "-" if row["weights"] == "float32" else "--",
            "linewidth": 2.5 if ours else 1.2,
            "color": TQC_COLOR if ours else OTHER_COLORS[number % len(OTHER_COLORS)],
        }
        whole.plot(contexts, times, **style)
        increase.plot(contexts, [time - times[0] for time in times], **style)
    whole.set_yscale("log")
    increase.set_yscale("symlog", linthresh=1)
    whole.set(xlabel="tokens in the cache", ylabel="ms a token", title="a token (dashed: 4-bit weights)")
    increase.set(xlabel="tokens in the cache", ylabel="ms more than at the shortest context", title="increase")
    figure.legend(*whole.get_legend_handles_labels(), fontsize=7, loc="outside right center")
    _save(figure, result, file)


def attention(result: dict[str, Any], file: Path) -> None:
    """Microseconds of a call over the length, a panel for each shape and batch."""
    panels = list(dict.fromkeys((row["heads_dim"], row["batch"]) for row in result["rows"]))
    shapes, batches = (list(dict.fromkeys(values)) for values in zip(*panels, strict=True))
    figure, axes = pyplot.subplots(
        len(batches), len(shapes), figsize=(4 * len(shapes), 4 * len(batches)), squeeze=False, sharex=True
    )
    lines = {
        "k4v2_us": "tqc K4 V2",
        "k4v4_us": "tqc K4 V4",
        "bf16_us": "torch SDPA bf16",
        "fp32_us": "torch SDPA fp32",
        "flex_us": "flex_attention bf16",
        "onnxruntime_us": "onnxruntime, best cache",
        "floor_us": "floor, K4 V2",
    }
    for shape, batch in panels:
        axis = axes[batches.index(batch)][shapes.index(shape)]
        rows = [row for row in result["rows"] if (row["heads_dim"], row["batch"]) == (shape, batch)]
        for row in rows:
            row["floor_us"] = row["k4v2_us"] / row["k4v2_of_floor"]
        for number, (field, label) in enumerate(lines.items()):
            points = [(row["length"], row[field]) for row in rows if field in row]
            if points:
                dotted = ":" if field == "floor_us" else "-"
                axis.plot(*zip(*points, strict=True), dotted, marker=".", label=label, color=f"C{(number + 3) % 10}")
        axis.set(xscale="log", yscale="log", title=f"{shape}, batch {batch}", xlabel="tokens", ylabel="µs")
    axes[0][0].legend(fontsize=7)
    _save(figure, result, file)


def _save(figure: Any, result: dict[str, Any], file: Path) -> None:
    hardware = result["hardware"]
    figure.suptitle(f"{hardware['processor']}, {hardware['threads']} threads, {result['date']}", fontsize=9)
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    for draw in (generate_peers, attention):
        file = RESULTS / f"{draw.__name__}.json"
        if file.exists():
            draw(json.loads(file.read_text()), file.with_suffix(".png"))


if __name__ == "__main__":
    main()
