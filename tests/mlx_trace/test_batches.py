"""Batches of prompts of different lengths with packed caches: each sequence is what it is alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="needs mlx and mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx_lm import batch_generate  # noqa: E402
from mlx_lm.models.cache import BatchKVCache, KVCache, RotatingKVCache, make_prompt_cache  # noqa: E402

from tests.mlx_trace.models import build, tokenizer, tokens  # noqa: E402
from tests.mlx_trace.test_sessions import compiled, largest  # noqa: E402

MODELS = [pytest.param("llama", {}, marks=pytest.mark.extended), ("mistral", {"sliding_window": 60})]
TOKENS = tokens(3, 200)


def alone(model: nn.Module, row: int, *lengths: int) -> tuple[list[Any], mx.array]:
    """Caches of one sequence, and its last logits."""
    caches, at, logits = make_prompt_cache(model), 0, mx.zeros(0)
    for length in lengths:
        logits = model(TOKENS[row : row + 1, at : at + length], cache=caches)[:, -1]
        at += length
    return caches, logits


@pytest.mark.parametrize("name, changes", MODELS)
def test_batch_generate(name: str, changes: dict[str, Any]) -> None:
    model, plain = compiled(name, **changes), build(name, **changes)
    prompts = [TOKENS[0, :110].tolist(), TOKENS[1, :50].tolist(), TOKENS[2, :140].tolist(), TOKENS[0, :110].tolist()]
    how: Any = {"max_tokens": [3, 8, 5, 12], "return_prompt_caches": True, "prefill_batch_size": 2}
    made, own = (batch_generate(held, tokenizer(), prompts, **how) for held in (model, plain))
    assert made.token_ids == own.token_ids
    for cache, expected in zip(made.caches, own.caches, strict=True):
        assert cache[0].offset == expected[0].offset and isinstance(cache[0], type(expected[0]))
    # Each of these caches goes on by itself, and as a history of other batches.
    again = batch_generate(
        model, tokenizer(), [[5, 7], [3]], prompt_caches=copy.deepcopy(made.caches[:2]), max_tokens=6
    )
    expected = batch_generate(plain, tokenizer(), [[5, 7], [3]], prompt_caches=own.caches[:2], max_tokens=6)
    assert again.token_ids == expected.token_ids


@pytest.mark.parametrize("name, changes", MODELS)
def test_a_sequence_does_not_know_of_the_others(name: str, changes: dict[str, Any]) -> None:
    """Merged, decoded together, filtered, extended and taken apart."""
    model = compiled(name, **changes)
    lengths = (120, 9, 71)
    singles = [alone(model, row, length)[0] for row, length in enumerate(lengths)]
    batch = [rows[0].merge(list(rows)) for rows in zip(*singles, strict=True)]
    for step in range(40):
        given = mx.concatenate([TOKENS[row : row + 1, at + step : at + step + 1] for row, at in enumerate(lengths)])
        logits = model(given, cache=batch)
    for row, length in enumerate(lengths):
        assert largest(logits[row], alone(model, row, length, *[1] * 40)[1]) < 1e-4
    rest = [copy.deepcopy(cache) for cache in batch]
    for cache in batch:
        cache.filter([2, 0])
    for cache in rest:
        cache.filter([1])
    logits = model(mx.stack([TOKENS[2, 111:112], TOKENS[0, 160:161]]), cache=batch)
    assert largest(logits[0], alone(model, 2, 71, *[1] * 41)[1]) < 1e-4
    model(TOKENS[1:2, 49:50], cache=rest)
    for cache, other in zip(batch, rest, strict=True):
        cache.extend(other)
    logits = model(mx.stack([TOKENS[2, 112:113], TOKENS[0, 161:162], TOKENS[1, 50:51]]), cache=batch)
    single = [cache.extract(2) for cache in batch]
    assert isinstance(single[0], (KVCache, RotatingKVCache)) and single[0].offset == 51
    expected, last = alone(model, 1, 9, *[1] * 42)
    assert largest(logits[2], last) < 1e-4
    assert largest(model(TOKENS[1:2, 51:60], cache=single), model(TOKENS[1:2, 51:60], cache=expected)) < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_stored(side: str) -> None:
    model = compiled()
    lengths = (120, 9, 71)
    if side == "left":
        batch: list[Any] = [BatchKVCache([120 - length for length in lengths]) for _ in range(4)]
        given = mx.stack([mx.pad(TOKENS[row, :length], [120 - length, 0]) for row, length in enumerate(lengths)])
    else:
        batch = [KVCache().merge([KVCache()] * 3) for _ in range(4)]
        model(TOKENS[:, :1], cache=batch)
        for cache in batch:
            cache.trim(1)
            cache.prepare(lengths=list(lengths), right_padding=[120 - length for length in lengths])
        given = mx.stack([mx.pad(TOKENS[row, :length], [0, 120 - length]) for row, length in enumerate(lengths)])
    for part in (given[:, :70], given[:, 70:]):
        model(part, cache=batch)
    for cache in batch:
        cache.finalize()
    assert batch[0].offset.tolist() == list(lengths)
    assert [held.packed for held in batch[0].placements] == [96, 0, 64]
    nexts = mx.concatenate([TOKENS[row : row + 1, at : at + 1] for row, at in enumerate(lengths)])
    logits = model(nexts, cache=batch)
    for row, length in enumerate(lengths):
        assert largest(logits[row], alone(model, row, length, 1)[1]) < 0.01
