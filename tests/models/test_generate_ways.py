"""Ways of transformers to generate with a compiled model: each packs the cache, or the logger hears why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import CompileConfig, DynamicCache, GenerationConfig
from transformers.cache_utils import Cache, QuantizedLayer

from tests.common import OPTIONS
from tests.models.common import FAMILIES, prompt
from tqc import report
from tqc.cache.packed_tensor import PackedTensor
from tqc.passes.plan import DENSE, FUSE, PACK

TOKENS = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}


class OffloadedCache(DynamicCache):
    """A cache on another device between its layers' turns, as `cache_implementation="offloaded"` makes it, without the
    CUDA streams."""

    def update(self, keys, values, layer_idx, *args, **kwargs):
        self.layers[(layer_idx + 1) % len(self.layers)].prefetch()
        result = super().update(keys, values, layer_idx, *args, **kwargs)
        self.layers[layer_idx].offload()
        return result


class EightBits(QuantizedLayer):
    """Quantized by the model's own cache; the packages that transformers takes for it are optional."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True) / 127 + 1e-9
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, quantized):
        return quantized[0] * quantized[1]


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(report, "_said", set())


def everywhere(**config: Any) -> CompileConfig:
    """As `generate` takes it on a GPU; on the CPU it compiles nothing without this."""
    config = CompileConfig(**config)
    config._compile_all_devices = True
    return config


def llama(compiled: bool = True) -> Any:
    model = FAMILIES["llama"].build()
    if compiled:
        model.compile(backend="tqai", options=OPTIONS)
    return model


def told(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "tqc.report"]


@pytest.mark.parametrize(
    "config", [{}, {"mode": "kv-only"}, {"mode": None, "options": OPTIONS}], ids=["default", "preset", "options"]
)
def test_compile_config(config, caplog):
    """The default mode is "reduce-overhead": what cannot be recorded is said."""
    model = llama(compiled=False)
    static = {"cache_implementation": "static", "compile_config": everywhere(backend="tqai", **config)}
    with report.collect() as plans:
        result = model.generate(prompt(1), **static, **TOKENS)
    assert all(isinstance(layer.keys, PackedTensor) for layer in result.past_key_values.layers)
    assert {site.action for site in plans[-1].sites} == {FUSE}
    said = any("not recorded as a CUDA graph" in record.message for record in caplog.records)
    assert said == ("mode" not in config)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compilation_around_the_compiled_model(in_place):
    """What `generate` does of its own on a GPU where the cache is static."""
    model = llama(compiled=in_place)
    compiled = model if in_place else torch.compile(model, backend="tqai", options=OPTIONS)
    static = {"cache_implementation": "static", "compile_config": everywhere(backend="eager", mode="default")}
    result = compiled.generate(prompt(1), **static, **TOKENS)
    assert all(isinstance(layer.keys, PackedTensor) for layer in result.past_key_values.layers)
    assert torch.equal(result.sequences, llama(compiled=False).generate(prompt(1), **TOKENS).sequences)


CACHES = {
    "offloaded": (lambda config: OffloadedCache(config=config), "an offloaded cache"),
    "quantized": (lambda _: Cache(layers=[EightBits(residual_length=32) for _ in range(2)]), "not of a cache and new"),
    "fp8": (None, "the keys are torch.float8"),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_that_stay_dense(name, caplog):
    make, reason = CACHES[name]

    def generate(model):
        if make is None:
            kwargs = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
        else:
            kwargs = {"past_key_values": make(model.config)}
        return model.generate(prompt(1), **kwargs, **TOKENS).sequences

    try:
        dense = generate(llama(compiled=False))
    except (ValueError, TypeError) as error:
        pytest.skip(f"not in this transformers: {error}")
    model = llama()
    with report.collect() as plans:
        assert torch.equal(generate(model), dense)
        generate(model)
    assert {site.action for site in plans[-1].sites} == {DENSE}
    assert not any(plan.with_action(FUSE) + plan.with_action(PACK) for plan in plans)
    assert len(told(caplog)) == 1 and reason in told(caplog)[0], told(caplog)


def test_generate_batch_says_that_it_stays_dense(caplog):
    model = llama()
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = transformers.ContinuousBatchingConfig(
        page_size=16, num_blocks=8, max_batch_tokens=64, max_requests_per_batch=2
    )
    (result,) = model.generate_batch([prompt(1, 40)[0].tolist()], config, batching, warmup=False).values()
    assert result.generated_tokens == llama(compiled=False).generate(prompt(1, 40), max_new_tokens=3)[0, -3:].tolist()
    assert len(told(caplog)) == 1 and "generate_batch" in told(caplog)[0]


def test_calls_without_a_cache_need_no_word(caplog):
    model = llama()
    with torch.no_grad():
        model(prompt(1), use_cache=False)
        model(prompt(1, 60), use_cache=False)
    assert not told(caplog)
