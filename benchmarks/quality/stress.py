"""Models made hard to code without changing what they compute, decoded through the cache.

    python benchmarks/quality/stress.py                                SmolLM2 -> benchmarks/results/quality_stress.json
    python benchmarks/quality/stress.py --model gemma=FOLDER ...       other models beside it
    python benchmarks/quality/stress.py --without-correction           scores of packed tokens as they are

Each transformation keeps the dense model's function to rounding, so its rows should read as those of the plain model:

- `pairs-N`: K times N and Q over N in two rotary pairs of each head (N from 4 to 64);
- `channel`: the same in one pair, times 256: a huge channel;
- `bias`: a constant of norm 600 in the slowest pairs of K, as Qwen2 models have (models without norms of keys alone).
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tqc.evaluate.evaluation import evaluate
from tqc.format import PackedFormat
from tqc.models import load

TRANSFORMATIONS = ("plain", "pairs-4", "pairs-16", "pairs-64", "channel", "bias")
SETTINGS = ("k2v2", "k3v3", "k4v4")


def transformed(model: Any, name: str) -> Any:
    """`model` with the transformation `name`, in place where it can be.

    Raises:
        ValueError: if there is no such transformation or the model cannot have it.
    """
    if name == "plain":
        return model
    if match := re.fullmatch(r"pairs-(\d+)", name):
        return with_outlier_pairs(model, int(match[1]), (5, 9))
    if name == "channel":
        return with_outlier_pairs(model, 256, (7,))
    if name == "bias":
        if hasattr(model.model.layers[0].self_attn, "k_norm"):
            raise ValueError("keys that are normalized have no bias")
        return with_bias(model)
    raise ValueError(f"transformation must be one of {', '.join(TRANSFORMATIONS)} or pairs-N; got {name!r}")


def with_outlier_pairs(model: Any, factor: float, pairs: tuple[int, ...]) -> Any:
    """K times and Q over `factor` in rotary pairs `pairs` of each head: the products are the same."""
    for layer in model.model.layers:
        attention = layer.self_attn
        for name, by in (("k", factor), ("q", 1 / factor)):
            gain = torch.ones(attention.head_dim)
            gain[[half * attention.head_dim // 2 + pair for half in (0, 1) for pair in pairs]] = by
            norm = getattr(attention, f"{name}_norm", None)
            with torch.no_grad():
                if norm is not None:  # Gemma's norms multiply by 1 + weight
                    one = 1.0 if "Gemma" in type(norm).__name__ else 0.0
                    norm.weight.copy_((one + norm.weight) * gain - one)
                else:
                    projection = getattr(attention, f"{name}_proj")
                    projection.weight.mul_(gain.repeat(projection.out_features // len(gain))[:, None])
    return model


def with_bias(model: Any) -> Any:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import settings

    settings.DecodingThroughCache()  # registers the attention that with_biased_keys selects
    biased = settings.with_biased_keys(model)
    biased.set_attn_implementation("sdpa")
    return biased


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import envelope

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", default=[], metavar="NAME=FOLDER", help="models beside SmolLM2")
    parser.add_argument("--transformations", nargs="+", default=TRANSFORMATIONS)
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--without-correction", action="store_true", help="write quality_stress_uncorrected.json")
    arguments = parser.parse_args()
    if arguments.without_correction:
        PackedFormat.score_stretch = 0.0
    rows = []
    for name, folder in [("SmolLM2-135M", None), *(pair.split("=", 1) for pair in arguments.model)]:
        for transformation in arguments.transformations:
            model, tokenizer = load(folder, "float32")
            try:
                model = transformed(model, transformation)
            except ValueError as error:
                print(f"{name}, {transformation}: {error}", file=sys.stderr)
                continue
            found = evaluate(model, tokenizer, arguments.settings, tokens=arguments.tokens, passkey_tokens=0)
            for row in found.rows:
                kept = {key: asdict(row)[key] for key in ("kl_mean", "kl_p99", "perplexity", "bits_4096")}
                rows.append({"model": name, "transformation": transformation, "setting": row.name, **kept})
                print(rows[-1], flush=True)
    notes = [f"{arguments.tokens:,} tokens of Python's documentation, teacher-forced through each cache, float32."]
    name = "quality_stress_uncorrected" if arguments.without_correction else "quality_stress"
    print(f"written: {envelope.write(name, rows, notes).relative_to(envelope.ROOT)}")


if __name__ == "__main__":
    main()
