"""One file format for torch and MLX: what one saves the other loads, with the same attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="needs mlx and mlx-lm")

import torch  # noqa: E402
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache  # noqa: E402
from transformers import DynamicCache  # noqa: E402

import tqc  # noqa: E402
from tests.mlx_trace.models import build  # noqa: E402
from tests.mlx_trace.test_packed import Twins  # noqa: E402
from tests.mlx_trace.test_sessions import compiled, largest, run  # noqa: E402
from tqc import ops  # noqa: E402
from tqc.cache.packed_tensor import PackedTensor  # noqa: E402
from tqc.execute.instructions import as_packed_tensor  # noqa: E402
from tqc.format import PackedFormat  # noqa: E402
from tqc.mlx_trace.arrays import tensor_of  # noqa: E402
from tqc.torch_private import fill_layer, new_layer  # noqa: E402


def torch_cache(keep: int | None, tokens: int) -> tuple[DynamicCache, list[Twins]]:
    """A cache of one layer whose parts the reference has made."""
    torch.manual_seed(0)
    twins = [Twins(PackedFormat(16, 4, True, 4, 32, keep=keep)), Twins(PackedFormat(16, 2, False, 4, 32, keep=keep))]
    for twin in twins:
        twin.extend(torch.randn(1, 2, tokens, 16))
    kind, numbers = (
        ("DynamicLayer", {}) if keep is None else ("DynamicSlidingWindowLayer", {"sliding_window": keep + 1})
    )
    layer = new_layer(kind, numbers)
    fill_layer(layer, *(as_packed_tensor(twin.own) for twin in twins))
    if keep:
        layer.cumulative_length = tokens
    cache = DynamicCache()
    cache.layers = [layer]
    return cache, twins


@pytest.mark.parametrize("keep, tokens", [(None, 20), (None, 150), (90, 60), (90, 300)])
def test_what_torch_saves_mlx_loads_and_goes_on_with(keep: int | None, tokens: int, tmp_path: Path) -> None:
    cache, twins = torch_cache(keep, tokens)
    tqc.save_cache(cache, tmp_path / "cache.safetensors")
    (loaded,) = tqc.load_cache(tmp_path / "cache.safetensors", "mlx")
    assert isinstance(loaded, KVCache if keep is None else RotatingKVCache) and loaded.offset == tokens
    for part, twin, dense in zip((loaded.keys, loaded.values), twins, loaded.keys_and_values(), strict=True):
        expected = ops.read(twin.own)
        assert torch.allclose(tensor_of(dense), expected, atol=1e-5)
        # The same pages, wherever they lie, and the same bytes from there on.
        twin.placement, twin.ours = loaded.placement, part
        twin.extend(torch.randn(1, 2, 70, 16))
        twin.check()


def test_what_mlx_saves_torch_loads_and_mlx_goes_on_with(tmp_path: Path) -> None:
    for name, changes in (("llama", {}), ("mistral", {"sliding_window": 60}), ("mistral", {})):
        model = compiled(name, **changes)
        caches = make_prompt_cache(model)
        run(model, caches, 120, 1)
        tqc.save_cache(caches, tmp_path / "cache.safetensors")
        loaded = tqc.load_cache(tmp_path / "cache.safetensors")
        assert isinstance(loaded, DynamicCache) and len(loaded.layers) == 4
        for layer, cache in zip(loaded.layers, caches, strict=True):
            assert isinstance(layer.keys, PackedTensor) == hasattr(cache, "placement")
            if hasattr(cache, "placement"):
                for tensor, dense in zip((layer.keys, layer.values), cache.keys_and_values(), strict=True):
                    assert torch.allclose(tensor + 0, tensor_of(dense), atol=1e-5)
        again = tqc.load_cache(tmp_path / "cache.safetensors", device="mlx")
        assert [type(cache) for cache in again] == [type(cache) for cache in caches]
        assert largest(run(model, again, 1, 9, at=121), run(model, caches, 1, 9, at=121)) < 1e-5


def test_the_bytes_of_caches() -> None:
    model = compiled(options={"bits_k": 4, "bits_v": 4, "residual_window": 32})
    caches = make_prompt_cache(model)
    assert tqc.cache_bytes(caches) == 0
    run(model, caches, 132)
    # 3 pages, 36 tokens and what keys know of their head.
    page = [PackedFormat(16, 4, centred).page_bytes for centred in (True, False)]
    assert tqc.cache_bytes(caches) == 4 * 2 * (3 * sum(page) + (36 + 36 + 2) * 16 * 4)


def test_a_cache_of_another_model_is_refused(tmp_path: Path) -> None:
    model = compiled()
    caches = make_prompt_cache(model)
    run(model, caches, 120)
    tqc.save_cache(caches, tmp_path / "cache.safetensors")
    for changes, message in (
        ({"num_key_value_heads": 4}, "the cache holds 2 heads of 16 float32 numbers, and the model makes 4 heads"),
        ({"head_dim": 32}, "packed as tq2:d16:.*and the model takes tq2:d32"),
        ({"num_hidden_layers": 3}, "got 4 caches for a model that has 3"),
    ):
        other = compiled(**changes)
        run(other, make_prompt_cache(other), 1)
        with pytest.raises(ValueError, match=message):
            run(other, tqc.load_cache(tmp_path / "cache.safetensors", "mlx"), 1, at=120)


def test_what_cannot_be_saved_or_loaded_says_so(tmp_path: Path) -> None:
    model: Any = build("llama")
    for cache, name in ((QuantizedKVCache(), "QuantizedKVCache"), (RotatingKVCache(8, 4), "keeps its first 4 tokens")):
        with pytest.raises(TypeError, match=f"cannot save cache 1: .*{name}"):
            tqc.save_cache([*make_prompt_cache(model)[:1], cache], tmp_path / "cache.safetensors")
    tqc.save_cache(((torch.zeros(1, 2, 3, 8),) * 2,), tmp_path / "cache.safetensors")
    with pytest.raises(TypeError, match="mlx-lm has no cache for a tuple"):
        tqc.load_cache(tmp_path / "cache.safetensors", "mlx")
