"""Solvers of codebooks on keys and values of real models: benchmarks/results/codebooks.json.

    python benchmarks/quality/codebooks.py [--gemma FOLDER] [--tokens 1024]    (wants the package cma)

Each solver makes a symmetric table of levels, from the first half of a text's tokens (but for `lloyd_max`, which needs
no data: it is the format's own table); all are compared on the second half, by the format's own encoding with those
levels: the relative squared error, and the KL of attention weights of the last 64 queries.

- lloyd_max: the exact density of a rotated unit vector, solved by Newton's iteration.
- lloyd_data: the same iteration on the coordinates found in the data.
- fuzzy: soft assignment by exp(-(x - level)^2 / tau), tau annealed to zero.
- cmaes: CMA-ES (package cma) on the squared error of the data.
- cmaes_attention: CMA-ES on the KL of attention with real queries and keys; keys alone.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tqc.evaluate.evaluation import default_text
from tqc.format import PAGE_TOKENS, PackedFormat, codebook
from tqc.format.quantizer import decode_pages, decoded, encode_pages, head_rows, rotate
from tqc.models import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envelope

LAYERS, QUERIES = 3, 64


@dataclass(frozen=True)
class Tabled(PackedFormat):
    """A format with levels of its own, of which this is the positive half. Its pages are no pages of version 2."""

    half: tuple[float, ...] = ()

    def levels(self, device: torch.device) -> Tensor:
        half = torch.tensor(self.half, dtype=torch.float32, device=device)
        return torch.cat([-half.flip(0), half])

    def boundaries(self, device: torch.device) -> Tensor:
        table = self.levels(device)
        return (table[1:] + table[:-1]) / 2


@dataclass(frozen=True)
class Data:
    """Tokens of one layer, [1, heads, tokens, head_dim], and the queries that go with the last of them if they are
    keys, [1, query heads, tokens, head_dim]."""

    tokens: Tensor
    queries: Tensor | None

    def half(self, second: bool) -> Data:
        middle = self.tokens.shape[2] // 2 // PAGE_TOKENS * PAGE_TOKENS
        cut = slice(middle, middle * 2) if second else slice(0, middle)
        return Data(self.tokens[:, :, cut], None if self.queries is None else self.queries[:, :, cut])


def read_back(data: Data, half: tuple[float, ...], bits: int) -> Tensor:
    fmt = Tabled(data.tokens.shape[-1], bits, data.queries is not None, half=half)
    head = head_rows(data.tokens[:, :, :PAGE_TOKENS], fmt)
    return decoded(decode_pages(encode_pages(data.tokens, head, fmt), head, fmt), head, fmt)


def error(sets: list[Data], half: tuple[float, ...], bits: int) -> float:
    """Mean over layers of the squared error relative to what is left when each head's mean is taken off."""
    found = []
    for data in sets:
        rest = data.tokens - data.tokens.mean(2, keepdim=True)
        found.append(float((read_back(data, half, bits) - data.tokens).square().sum() / rest.square().sum()))
    return float(np.mean(found))


def attention_kl(sets: list[Data], half: tuple[float, ...], bits: int) -> float:
    found = []
    for data in sets:
        assert data.queries is not None
        repeats = data.queries.shape[1] // data.tokens.shape[1]
        query = data.queries[:, :, -QUERIES:].float()
        scale = data.tokens.shape[-1] ** -0.5
        exact, coded = (
            (query @ keys.float().repeat_interleave(repeats, 1).mT * scale).log_softmax(-1)
            for keys in (data.tokens, read_back(data, half, bits))
        )
        found.append(float((exact.exp() * (exact - coded)).sum(-1).mean()))
    return float(np.mean(found))


def coordinates(sets: list[Data]) -> np.ndarray:
    """Sizes of rotated coordinates of unit variance, as codes see them."""
    found = []
    for data in sets:
        x = data.tokens - data.tokens.mean(2, keepdim=True) if data.queries is not None else data.tokens
        y = rotate(x, PackedFormat(x.shape[-1], 2, False))
        found.append((y / y.square().mean(-1, keepdim=True).sqrt()).abs().flatten())
    sample = torch.cat(found).numpy().astype(np.float64)
    return np.random.default_rng(0).choice(sample, min(len(sample), 200_000), replace=False)


def lloyd_data(x: np.ndarray, half: np.ndarray) -> np.ndarray:
    for _ in range(100):
        cell = np.digitize(x, (half[1:] + half[:-1]) / 2)
        half = np.bincount(cell, x, len(half)) / np.maximum(np.bincount(cell, minlength=len(half)), 1)
    return half


def fuzzy(x: np.ndarray, half: np.ndarray) -> np.ndarray:
    x = x[:50_000]
    for tau in np.geomspace(0.5, 1e-3, 60):
        away = -((x[:, None] - half) ** 2) / tau
        share = np.exp(away - away.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        half = (share * x[:, None]).sum(0) / np.maximum(share.sum(0), 1e-9)
    return np.sort(half)


def cmaes(objective: Any, half: np.ndarray, evaluations: int) -> np.ndarray:
    import cma

    if len(half) < 2:  # the package wants two numbers at least
        return half
    options = {"maxfevals": evaluations, "seed": 1, "verbose": -9}
    found = cma.fmin2(lambda levels: objective(tuple(sorted(np.abs(levels)))), half, 0.05, options)[0]
    return np.sort(np.abs(found))


def squared(x: np.ndarray) -> Any:
    x = x[:50_000]

    def objective(half: tuple[float, ...]) -> float:
        levels = np.asarray(half)
        return float(((x - levels[np.digitize(x, (levels[1:] + levels[:-1]) / 2)]) ** 2).mean())

    return objective


def collect(model: Any, tokenizer: Any, count: int) -> tuple[list[Data], list[Data]]:
    """Keys with their queries, and values, of some layers that see all tokens."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def noting(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("sliding_window"):
            seen[module.layer_idx] = (query, key, value)
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("noting", noting)
    model.set_attn_implementation("noting")
    ids = tokenizer(default_text()[: 16 * count], return_tensors="pt").input_ids[:, :count]
    with torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    numbers = sorted(seen)[:: max(1, len(seen) // LAYERS)][:LAYERS]
    chosen = [seen[number] for number in numbers]
    return [Data(k.float(), q.float()) for q, k, _ in chosen], [Data(v.float(), None) for _, _, v in chosen]


def rows_of(name: str, what: str, sets: list[Data], bits: int, evaluations: int) -> list[dict[str, Any]]:
    train, test = ([data.half(second) for data in sets] for second in (False, True))
    start = codebook.levels(sets[0].tokens.shape[-1], bits).double().numpy()[2 ** (bits - 1) :]
    x = coordinates(train)
    tables = {"lloyd_max": start, "lloyd_data": lloyd_data(x, start), "fuzzy": fuzzy(x, start)}
    tables["cmaes"] = cmaes(squared(x), start, 10 * evaluations)
    if what == "keys":
        tables["cmaes_attention"] = cmaes(lambda half: attention_kl(train, half, bits), start, evaluations)
    rows = []
    for solver, half in tables.items():
        levels = tuple(float(level) for level in half)
        row: dict[str, Any] = {"model": name, "of": what, "bits": bits, "solver": solver}
        row |= {"train_error": error(train, levels, bits), "error": error(test, levels, bits)}
        if what == "keys":
            row["attention_kl"] = attention_kl(test, levels, bits)
        row["levels"] = [round(level, 4) for level in levels]
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemma", metavar="FOLDER")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--bits", type=int, nargs="+", default=(2, 3))
    parser.add_argument("--evaluations", type=int, default=200, help="of attention by CMA-ES")
    arguments = parser.parse_args()
    models = [("SmolLM2-135M", None)] + ([("Gemma-3-270m", arguments.gemma)] if arguments.gemma else [])
    rows = []
    for name, source in models:
        model, tokenizer = load(source, "float32")
        keys, values = collect(model, tokenizer, arguments.tokens)
        for bits in arguments.bits:
            rows += rows_of(name, "keys", keys, bits, arguments.evaluations)
            rows += rows_of(name, "values", values, bits, arguments.evaluations)
        note = (
            f"{arguments.tokens:,} tokens of Python's documentation, {LAYERS} layers that see all tokens; tables are "
            "made from the first half and compared on the second: relative squared error and, of keys, KL of attention."
        )
        envelope.write("codebooks", rows, [note], ("cma",))


if __name__ == "__main__":
    main()
