"""Models that are compiled whole while their `generate` calls another model inside: packed, or said."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, DynamicCache
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig, Blip2VisionConfig

import tqc
from tests.common import OPTIONS
from tests.models.common import FAMILIES, layers, prompt
from tqc import report
from tqc.cache.packed_tensor import PackedTensor

TOKENS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
FUSED = {"pack", "fuse"}


class Adapter(torch.nn.Module):
    """Hands out what its model has, as the tuners of a LoRA library do: it has no `generate` of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.model, name)

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Wrapper(torch.nn.Module):
    """A LoRA model around its tuner: `generate` is that of what is inside."""

    def __init__(self, model):
        super().__init__()
        self.base_model = Adapter(model)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)


class Around(Wrapper):
    """A loop of one's own around a model that could generate by itself."""

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens, **kwargs):
        cache, step = DynamicCache(), input_ids
        for _ in range(max_new_tokens):
            step = self.base_model(step, past_key_values=cache).logits[:, -1:].argmax(-1)
            input_ids = torch.cat([input_ids, step], 1)
        return SimpleNamespace(sequences=input_ids, past_key_values=cache)


class Loop(torch.nn.Module):
    """A generating loop of one's own, over what neither is compiled nor generates."""

    def __init__(self, model):
        super().__init__()
        self.decoder, self.head = model.model, model.lm_head

    def forward(self, ids, **kwargs):
        return self.head(self.decoder(ids, **kwargs).last_hidden_state)

    @torch.no_grad()
    def generate(self, ids, **kwargs):
        cache = DynamicCache()
        for _ in range(3):
            scores = self.head(self.decoder(ids, past_key_values=cache).last_hidden_state)
            ids = scores[:, -1:].argmax(-1)
        return ids


def llama() -> Any:
    return FAMILIES["llama"].build()


def blip2() -> Any:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "opt", **FAMILIES["opt"].options}
    vision, qformer = Blip2VisionConfig(**small, image_size=16, patch_size=8), Blip2QFormerConfig(**small, vocab_size=8)
    qformer.encoder_hidden_size = 32
    config = Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=4)
    config.image_token_id = 127
    return Blip2ForConditionalGeneration(config).eval()


MODELS = {
    "blip2": (blip2, "language_model"),
    "adapter": (lambda: Adapter(llama()), "model"),
    "wrapper": (lambda: Wrapper(llama()), "base_model.model"),
    "around": (lambda: Around(llama()), "base_model.model"),
}


def inputs(name: str) -> dict[str, Any]:
    if name != "blip2":
        return {"input_ids": prompt(1, 70)}
    ids = torch.cat([torch.full((1, 4), 127), prompt(1, 66).clamp(max=126)], 1)
    return {"input_ids": ids, "pixel_values": torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def compile_whole(model: Any, in_place: bool, backend: str = "tqai", **options: Any) -> Any:
    torch._dynamo.reset()
    if not in_place:
        return torch.compile(model, backend=backend, options={**OPTIONS, **options})
    model.compile(backend=backend, options={**OPTIONS, **options} if backend == "tqai" else None)
    return model


def keys(result: Any) -> list[type]:
    return [type(layer.keys) for layer in layers(result.past_key_values)]


@pytest.mark.parametrize("in_place", [True, pytest.param(False, marks=pytest.mark.extended)])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_inside_packs(name, in_place, caplog):
    model = MODELS[name][0]()
    dense = model.generate(**inputs(name), **TOKENS)
    assert set(keys(dense)) == {torch.Tensor}
    compiled = compile_whole(model, in_place)
    for _ in range(2):
        result = compiled.generate(**inputs(name), **TOKENS)
        assert set(keys(result)) == {PackedTensor}
        assert torch.equal(result.sequences, dense.sequences)
    assert not [record for record in caplog.records if record.name.startswith("tqc")]
    if not in_place:
        assert set(keys(model.generate(**inputs(name), **TOKENS))) == {torch.Tensor}, "by its own name it is as it was"


@pytest.mark.parametrize("name", ["blip2", pytest.param("wrapper", marks=pytest.mark.extended)])
def test_explain_names_the_model_inside(name):
    model = MODELS[name][0]()
    explanation = tqc.explain(model, **inputs(name), options=OPTIONS)
    assert {site["action"] for graph in explanation.graphs for site in graph} == FUSED
    assert f"generate calls {MODELS[name][1]}, which is compiled with the module around it" in explanation.notes


@pytest.mark.parametrize("in_place", [True, False])
def test_the_first_generate_says_what_to_compile(in_place, caplog):
    model = compile_whole(Loop(llama()), in_place)
    for _ in range(2):
        model.generate(prompt(1, 70))
    (record,) = [record for record in caplog.records if record.name == "tqc.inner_models"]
    assert record.levelno == logging.WARNING
    assert "Loop.generate does not call the module that was compiled" in record.message
    assert "It calls decoder: compile that by its own name" in record.message
    model = Loop(llama())
    explanation = tqc.explain(model, prompt(1, 70), options=OPTIONS)
    assert not explanation.graphs and any("but decoder: compile that" in note for note in explanation.notes)
    torch._dynamo.reset()
    model.decoder.compile(backend="tqai", options=OPTIONS)
    with report.collect() as plans:
        model.generate(prompt(1, 70))
    assert {site.action for plan in plans for site in plan.sites} == FUSED, "the advice helps"
    explanation = tqc.explain(model, prompt(1, 70), options=OPTIONS)
    assert {site["action"] for graph in explanation.graphs for site in graph} == FUSED


def test_what_the_user_compiled_inside_is_left_alone():
    model = Wrapper(llama())
    inner = model.base_model.model
    inner.compile(backend="tqai", options={**OPTIONS, "bits_k": 2})
    call = inner._compiled_call_impl
    compile_whole(model, in_place=True)
    assert inner._compiled_call_impl is call


def test_another_backend_takes_all_over():
    model = compile_whole(Wrapper(llama()), in_place=True)
    assert model.base_model.model._compiled_call_impl
    compile_whole(model, in_place=True, backend="eager")
    assert model.base_model.model._compiled_call_impl is None and "generate" not in model.__dict__
    assert set(keys(model.generate(prompt(1, 70), **TOKENS))) == {torch.Tensor}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("in_place", [True, False])
def test_copies_generate_with_their_own_weights(in_place, again):
    if again is not copy.deepcopy and not in_place:
        pytest.skip("torch does not pickle what torch.compile returns")
    model = compile_whole(Loop(llama()), in_place)
    if not in_place:
        model.generate(prompt(1, 70))
    other = again(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    assert other.generate(prompt(1, 70)).item() == 0
    assert model.generate(prompt(1, 70)).item() != 0


FIRST = """
import torch

class Inner(torch.nn.Linear):
    def generate(self, x):
        return self(x)

outer = torch.nn.Sequential(Inner(2, 2))
outer.compile(backend="tqai")
assert outer[0]._compiled_call_impl is not None
"""


def test_the_first_compilation_of_a_process():
    """It is what loads the package."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
