"""Options that change what passes do, and mistakes in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.models.common import FAMILIES, OPTIONS, compiled, layers, prompt, run
from tqc.cache.packed_tensor import PackedTensor


@pytest.fixture(scope="module")
def llama() -> Any:
    return FAMILIES["llama"].build("sdpa")


def test_skipped_layers_stay_dense(llama: Any) -> None:
    cache = DynamicCache(config=llama.config)
    with compiled(llama, skip_layers=[-1]) as plans:
        run(llama, prompt(1, 82), cache)
    assert [isinstance(layer.keys, PackedTensor) for layer in layers(cache)] == [True, False]
    assert all(plan.sites[1].reason == "named in skip_layers" for plan in plans)


def test_debug_dir_shows_each_pass(llama: Any, tmp_path: Path) -> None:
    with compiled(llama, debug_dir=str(tmp_path / "graphs")):
        run(llama, prompt(1, 81), DynamicCache(config=llama.config))
    texts = {file.name: file.read_text() for file in (tmp_path / "graphs").iterdir()}
    traced = [text for name, text in texts.items() if name.endswith(".traced.txt")]
    fused = [text for name, text in texts.items() if name.endswith(".fuse_attention.txt")]
    assert len(traced) == 2 and len(fused) == 1
    assert all("scaled_dot_product_attention" in text and "tqai." not in text for text in traced)
    assert "tqai.attend" in fused[0] and "tqai.extend" in fused[0]
    assert "scaled_dot_product_attention" not in fused[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bit_k": 3}, "did you mean 'bits_k'"),
        ({"bits_k": 9}, "bits_k must be 1 to 8"),
        ({"provider": "gpu"}, "provider must be one of"),
        ({"residual_window": 33}, "multiple of 32"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    torch._dynamo.reset()
    function = torch.compile(lambda x: x + 1, backend="tqai", options={**OPTIONS, **options})
    with pytest.raises(Exception, match=message):
        function(torch.ones(2))


@pytest.mark.extended
def test_off_is_inductor_bit_for_bit() -> None:
    model = FAMILIES["llama"].build("sdpa")
    ids = prompt(1, 83)

    def logits(backend: str, **kwargs: Any) -> torch.Tensor:
        torch._dynamo.reset()
        model._compiled_call_impl = None
        model.compile(backend=backend, **kwargs)
        return run(model, ids, DynamicCache(config=model.config))

    expected = logits("inductor")
    assert torch.equal(logits("tqai", options={"bits_k": 16, "bits_v": 16}), expected)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, attn, static",
    [
        ("llama", "sdpa", False),
        ("llama", "sdpa", True),
        pytest.param("gpt_oss", "eager", False, marks=pytest.mark.extended),
    ],
)
def test_with_inductor(name: str, attn: str, static: bool) -> None:
    """The rest of the graph compiled: the same logits as with it run as it is."""
    model = FAMILIES[name].build(attn)
    ids = prompt(1, 86)

    def cache() -> Any:
        if not static:
            return DynamicCache(config=model.config)
        preallocated = StaticCache(model.config, max_cache_len=128)
        preallocated.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
        return preallocated

    with compiled(model):
        expected = run(model, ids, cache())
    with compiled(model, rest="inductor") as plans:
        actual = run(model, ids, cache())
    assert len(plans[-1].with_action("fuse")) == FAMILIES[name].packed
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
