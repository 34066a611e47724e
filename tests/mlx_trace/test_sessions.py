"""Models of mlx-lm with packed caches: what they generate, and what mlx-lm does with their caches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="needs mlx and mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx_lm  # noqa: E402
from mlx_lm.models.cache import (  # noqa: E402
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from tests.mlx_trace.models import build, tokenizer, tokens  # noqa: E402
from tqc import compile_mlx, decompile_mlx, explain  # noqa: E402
from tqc.mlx_trace.graph import CaptureError  # noqa: E402

FINE = {"bits_k": 8, "bits_v": 8, "residual_window": 32}
PROMPT = tokens(1, 160)


def largest(a: mx.array, b: mx.array) -> float:
    return mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item()


def run(model: nn.Module, caches: list[Any], *lengths: int, at: int = 0) -> mx.array:
    """Logits of the last of several calls with consecutive parts of the prompt."""
    logits = None
    for length in lengths:
        logits = model(PROMPT[:, at : at + length], cache=caches)
        mx.eval(logits, [cache.state for cache in caches])
        at += length
    assert logits is not None
    return logits


def compiled(name: str = "llama", options: Any = None, **changes: Any) -> nn.Module:
    return compile_mlx(build(name, **changes), strict=True, **(FINE if options is None else options))


def test_mlx_lm_generates_as_before() -> None:
    model, plain = compiled(), build("llama")
    prompt, how = PROMPT[0].tolist()[:120], {"max_tokens": 12}
    assert mlx_lm.generate(model, tokenizer(), prompt, **how) == mlx_lm.generate(plain, tokenizer(), prompt, **how)
    caches = make_prompt_cache(model)
    streamed = list(
        mlx_lm.stream_generate(model, tokenizer(), prompt, prompt_cache=caches, prefill_step_size=48, **how)
    )
    own = list(mlx_lm.stream_generate(plain, tokenizer(), prompt, **how))
    assert [part.token for part in streamed] == [part.token for part in own]
    assert all(isinstance(cache, KVCache) and cache.placement.packed == 96 for cache in caches)
    assert type(decompile_mlx(model)) is type(plain)


def test_a_call_does_not_depend_on_how_the_prompt_was_split() -> None:
    model = compiled(options={"bits_k": 4, "bits_v": 2})
    whole, parts = make_prompt_cache(model), make_prompt_cache(model)
    run(model, whole, 130)
    run(model, parts, 100, 3, *[1] * 27)
    assert whole[0].placement == parts[0].placement and whole[0].placement.packed == 32
    assert mx.array_equal(whole[0].values.pages[:, :, 0], parts[0].values.pages[:, :, 0])


def test_prompt_caches_of_mlx_lm_are_saved_and_loaded(tmp_path: Path) -> None:
    for name, changes in (("llama", {}), ("mistral", {"sliding_window": 60})):
        model = compiled(name, **changes)
        caches = make_prompt_cache(model)
        run(model, caches, 120)
        save_prompt_cache(str(tmp_path / "cache.safetensors"), caches, {"of": name})
        again, metadata = load_prompt_cache(str(tmp_path / "cache.safetensors"), return_metadata=True)
        assert metadata == {"of": name}
        assert [type(cache) for cache in again] == [type(cache) for cache in make_prompt_cache(model)]
        ours, own = (run(model, held, 1, 1, 5, at=120) for held in (again, caches))
        assert largest(ours, own) < 1e-5
        assert again[1].placement == caches[1].placement


def test_a_prompt_cache_of_another_format_is_refused(tmp_path: Path) -> None:
    model = compiled()
    caches = make_prompt_cache(model)
    run(model, caches, 120)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), caches)
    compile_mlx(model, bits_k=4, bits_v=4)
    for held in (load_prompt_cache(str(tmp_path / "cache.safetensors")), caches):
        with pytest.raises(ValueError, match="tq2:d16:b8:.*the model takes tq2:d16:b4"):
            run(model, held, 1, at=120)


def test_a_trimmed_cache_goes_on_from_there() -> None:
    model, plain = compiled(), build("llama")
    ours, own = make_prompt_cache(model), make_prompt_cache(plain)
    for trim in (3, 1, 70):
        for held, caches in ((model, ours), (plain, own)):
            at = caches[0].offset
            run(held, caches, 130 - at, at=at)
            assert trim_prompt_cache(caches, trim) == trim
        assert largest(run(model, ours, 5, at=130 - trim), run(plain, own, 5, at=130 - trim)) < 0.05
        for caches in (ours, own):
            trim_prompt_cache(caches, 5)
    assert trim_prompt_cache(ours, 1000) == 60 and ours[0].offset == 0
    assert largest(run(model, ours, 7), run(plain, make_prompt_cache(plain), 7)) < 1e-4


def test_copies_of_a_cache_go_their_own_ways() -> None:
    model = compiled()
    caches = make_prompt_cache(model)
    run(model, caches, 120)
    fork = copy.deepcopy(caches)
    expected = run(model, caches, 1, 1, at=120)
    run(model, fork, 20, at=0)
    assert caches[0].offset == 122 and fork[0].offset == 140
    fork = copy.deepcopy(caches)
    trim_prompt_cache(fork, 2)
    assert largest(run(model, fork, 1, 1, at=120), expected) < 1e-5


@pytest.mark.parametrize("window", [40, *(pytest.param(size, marks=pytest.mark.extended) for size in (64, 120))])
def test_a_sliding_window_drops_what_it_passes(window: int) -> None:
    model, plain = compiled("mistral", sliding_window=window), build("mistral", sliding_window=window)
    ours, own = make_prompt_cache(model), make_prompt_cache(plain)
    for lengths in ((100,), (1,) * 20, (30, 1, 1)):
        at = ours[0].offset
        assert largest(run(model, ours, *lengths, at=at), run(plain, own, *lengths, at=at)) < 0.05
    assert isinstance(ours[0], RotatingKVCache) and not isinstance(ours[1], RotatingKVCache)
    held = ours[0].placement
    assert held.length == 152 and held.begin == 152 - window + 1 and held.packed > 100
    assert ours[0].keys.num_pages <= held.fmt.ring_pages and not ours[0].is_trimmable()


def test_a_cache_that_was_filled_dense_is_packed_by_the_next_call() -> None:
    model, plain = build("llama"), build("llama")
    ours, own = make_prompt_cache(model), make_prompt_cache(plain)
    run(model, ours, 120)
    compile_mlx(model, strict=True, **FINE)
    run(plain, own, 120)
    assert largest(run(model, ours, 1, 1, at=120), run(plain, own, 1, 1, at=120)) < 0.02
    assert ours[0].placement.packed == 96


def test_calls_that_no_program_serves_read_a_packed_cache_decoded() -> None:
    model, plain = compiled(), build("llama")
    ours, own = make_prompt_cache(model), make_prompt_cache(plain)
    for held, caches in ((model, ours), (plain, own)):
        run(held, caches, 120)
    embedded = mx.random.normal((1, 3, 64))
    mine, expected = (held(PROMPT[:, :3], caches, embedded) for held, caches in ((model, ours), (plain, own)))
    assert largest(mine, expected) < 0.02 and ours[0].offset == 123
    decompile_mlx(model)
    assert largest(model(PROMPT[:, :1], cache=ours), plain(PROMPT[:, :1], cache=own)) < 0.02


def test_layers_that_stay_dense() -> None:
    model, plain = compiled(options={**FINE, "skip_layers": (0, -1)}), build("llama")
    ours, own = make_prompt_cache(model), make_prompt_cache(plain)
    assert largest(run(model, ours, 120, 1, 1), run(plain, own, 120, 1, 1)) < 0.02
    assert [hasattr(cache, "placement") for cache in ours] == [False, True, True, False]


def test_a_batch_of_prompts_of_one_length() -> None:
    model, plain = compiled(), build("llama")
    ours, own, given = make_prompt_cache(model), make_prompt_cache(plain), tokens(3, 121)
    for part in (given[:, :120], given[:, 120:]):
        made, expected = model(part, cache=ours), plain(part, cache=own)
        assert largest(made, expected) < 0.02


def test_what_a_packed_cache_cannot_do_says_so() -> None:
    model = compiled()
    caches = make_prompt_cache(model)
    run(model, caches, 8)
    with pytest.raises(ValueError, match="packed already: give no kv_bits"):
        caches[0].to_quantized()
    compile_mlx(model, preset="off", strict=True)
    with pytest.raises(CaptureError, match="the cache is packed, and the model was compiled to leave it dense"):
        run(model, caches, 8)
    for options, message in (
        ({"fold_values": True}, "fold_values is an option of the torch backend alone"),
        ({"strategy": "evict"}, "strategy is an option of the torch backend alone; got 'evict'"),
        ({"provider": "triton"}, "provider must be auto or reference, what MLX's default device runs; got 'triton'"),
        ({"bits": 3}, "unknown option 'bits'"),
        ({"preset": "tiny"}, "preset must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            compile_mlx(model, **options)


def test_explain_says_what_becomes_of_each_layer(caplog: pytest.LogCaptureFixture) -> None:
    model = build("mistral")
    said = explain(model, PROMPT[0].tolist(), options=FINE)
    assert "attention reads packed" in str(said)
    assert "no more than the 36 that stay dense" in said.graphs[0][0]["reason"]
    assert {site["action"] for graph in said.graphs for site in graph} == {"dense", "fuse"}
    assert said.tokens == 164 and said.cache_bytes and said.dense_bytes and type(model).__name__ == "Model"
    compile_mlx(model, skip_layers=(0, 1, 2, 3))
    said = explain(model, PROMPT[0, :3], graphs=True)
    assert "named in skip_layers" in str(said) and "no attention reads a packed cache" in said.notes
    assert said.texts and "packs nothing of its cache: " not in caplog.text
    with pytest.raises(ValueError, match="tokens must be integers"):
        explain(model, [1.5])
    with pytest.raises(TypeError, match="model must be a torch.nn.Module or an mlx.nn.Module, got str"):
        explain("llama", [1])


def test_a_model_of_which_nothing_can_be_packed_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = compiled(head_dim=12)
    with caplog.at_level("WARNING", logger="tqc"):
        for _ in range(2):
            run(model, make_prompt_cache(model), 3, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "a graph of Model packs nothing of its cache: the head_dim of the keys is 12, not a multiple of 8 "
        "(tqc.explain shows each layer)"
    ]
