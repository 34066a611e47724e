"""`compile_mlx`: generation through captured programs, one model at a time, and back."""

from __future__ import annotations

import logging
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="needs mlx and mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from tests.mlx_trace.models import build, tokens  # noqa: E402
from tqc import compile_mlx, decompile_mlx  # noqa: E402
from tqc.mlx_trace.graph import CaptureError  # noqa: E402


def generated(model: nn.Module, count: int = 12) -> list[int]:
    steps = generate_step(tokens(1, 20)[0], model, max_tokens=count)
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3_next"])
def test_generation_is_the_same(name: str) -> None:
    """While another model of the same class stays as it is."""
    model, other = build(name), build(name)
    assert compile_mlx(model, strict=True, preset="off") is model
    assert generated(model) == generated(other)
    made = type(model).tqc_programs.programs
    assert {key[1] for key in made} == {4, 1} and type(other) is type(model).__bases__[0]
    assert decompile_mlx(model) is model and type(model) is type(other)
    assert decompile_mlx(other) is other and generated(model) == generated(other)


def test_other_calls_run_as_before() -> None:
    model, plain, given = build("llama"), build("llama"), tokens(2, 5)
    compile_mlx(model, preset="off")
    assert mx.array_equal(model(given), plain(given))
    embedded = mx.ones((1, 5, 64))
    caches = make_prompt_cache(model), make_prompt_cache(plain)
    ours, own = (held(given[:1], cache, embedded) for held, cache in zip((model, plain), caches, strict=True))
    assert mx.array_equal(ours, own) and not type(model).tqc_programs.programs


def test_a_model_that_cannot_be_captured_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model, plain = build("llama", head_dim=32), build("llama", head_dim=32)
    caches: list[Any] = [[cache.to_quantized(32) for cache in make_prompt_cache(held)] for held in (model, plain)]
    compile_mlx(model, preset="off")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            ours, own = (held(tokens(1, 3), cache=cache) for held, cache in zip((model, plain), caches, strict=True))
    assert mx.array_equal(ours, own)
    assert [record.getMessage() for record in caplog.records] == [
        "Model is not compiled and runs as it is: a cache of class QuantizedKVCache is not known"
    ]
    compile_mlx(model, strict=True, preset="off")
    with pytest.raises(CaptureError, match="QuantizedKVCache"):
        model(tokens(1, 3), cache=caches[0])


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="model must be an mlx.nn.Module, got str"):
        compile_mlx("llama")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown option 'bits'"):
        compile_mlx(build("llama"), bits=3)
