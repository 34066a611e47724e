"""The backend as a user meets it: torch.compile and Module.compile, generate, explain, what is compiled and when."""

from collections import OrderedDict

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import tqc
from tqc import report
from tqc.cache.packed_tensor import PackedTensor
from tqc.execute import regions

EAGER = {"rest": "eager", "provider": "reference", "bits_k": 8, "bits_v": 8, "residual_window": 32}
PROMPT = torch.arange(80).remainder(97)[None]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def make_model(layers=3):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=100,
    )
    return LlamaForCausalLM(config).eval()


def generate(model, tokens=6, prompt=PROMPT, **kwargs):
    return model.generate(prompt, max_new_tokens=tokens, do_sample=False, **kwargs)


def packed(cache):
    return [isinstance(layer.keys, PackedTensor) and isinstance(layer.values, PackedTensor) for layer in cache.layers]


def test_backend_is_registered():
    assert "tqai" in torch._dynamo.list_backends()


def test_module_compile_fills_the_users_own_cache():
    model = make_model()
    dense = generate(model)
    cache = DynamicCache(config=model.config)
    model.compile(backend="tqai", options=EAGER)
    assert torch.equal(generate(model, past_key_values=cache), dense)
    assert all(packed(cache))
    assert tqc.cache_bytes(cache) == sum(
        t.packed_nbytes() for layer in cache.layers for t in (layer.keys, layer.values)
    )


def test_torch_compile_generates_compiled_and_leaves_the_model_dense():
    model = make_model()
    dense = generate(model)
    compiled = torch.compile(model, backend="tqai", options=EAGER)
    cache = DynamicCache(config=model.config)
    assert torch.equal(generate(compiled, past_key_values=cache), dense)
    assert all(packed(cache))
    cache = DynamicCache(config=model.config)
    generate(model, past_key_values=cache)
    assert not any(packed(cache)), "the wrapped model, called by its own name, is as it was"


def test_other_backends_keep_torchs_own_attribute_look_up():
    model = make_model()
    torch.compile(model, backend="tqai", options=EAGER)
    other = torch.compile(model, backend="eager")
    assert other.generate.__self__ is model


def test_mode_names_a_preset():
    model = make_model()
    model.compile(backend="tqai", mode="small")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(PROMPT, past_key_values=cache)
    assert cache.layers[0].keys.fmt.bits == 2


def test_unknown_options_are_named():
    model = make_model()
    model.compile(backend="tqai", options={"bit_k": 4})
    with torch.no_grad(), pytest.raises(Exception, match="unknown option 'bit_k'"):
        model(PROMPT)


def test_gradients_are_refused():
    model = make_model()
    model.compile(backend="tqai", options=EAGER)
    with pytest.raises(Exception, match="compiles inference only.*no_grad"):
        model(PROMPT)


def test_a_graph_without_a_cache_has_gradients():
    linear = torch.nn.Linear(8, 4).eval()
    x = torch.randn(2, 8)
    out = torch.compile(linear, backend="tqai", options={"rest": "eager"})(x)
    out.sum().backward()
    assert torch.equal(out, linear(x)) and linear.weight.grad is not None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_contexts(context):
    model = make_model()
    model.compile(backend="tqai", options={**EAGER, "rest": "inductor"})
    with context():
        cache = DynamicCache(config=model.config)
        for _ in range(3):
            out = model(PROMPT[:, :5], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 15 and torch.isfinite(out.logits).all()


@pytest.mark.slow
def test_off_equals_inductor_bit_for_bit():
    logits = []
    for backend, options in (("inductor", None), ("tqai", {"bits_k": 16, "bits_v": 16})):
        torch._dynamo.reset()
        model = make_model()
        model.compile(backend=backend, options=options)
        out = generate(model, return_dict_in_generate=True, output_logits=True)
        logits.append(torch.stack(out.logits))
    assert torch.equal(*logits)


@pytest.mark.slow
def test_one_compilation_serves_generations_lengths_and_copies():
    model = make_model()
    dense = make_model()
    options = {**EAGER, "rest": "inductor"}
    model.compile(backend="tqai", options=options)
    with report.collect() as plans:
        for length in (40, 50, 60, 70):
            prompt = PROMPT[:, :length]
            assert torch.equal(generate(model, prompt=prompt), generate(dense, prompt=prompt))
        count = len(plans)
        twin = make_model()
        twin.compile(backend="tqai", options=options)
        generate(twin, prompt=PROMPT[:, :55])
        assert len(plans) == count, "a copy of the model compiles nothing anew"
    assert count <= 5


@pytest.mark.slow
def test_repeated_layers_are_compiled_once(monkeypatch):
    compiled = []
    compile_with_inductor = regions.inductor_compile
    monkeypatch.setattr(regions, "_compiled", OrderedDict())
    monkeypatch.setattr(regions, "inductor_compile", lambda *a: compiled.append(a) or compile_with_inductor(*a))
    model = make_model(layers=6)
    dense = generate(model)
    model.compile(backend="tqai", options={**EAGER, "rest": "inductor"})
    assert torch.equal(generate(model), dense)
    assert len(compiled) == 3, "before the first attention, between two, after the last: for decoding alone"
    assert [cpp_wrapper for _, _, cpp_wrapper, _ in compiled].count(True) == 1, "only what runs once a layer"


def test_a_graph_without_a_cache_is_left_alone():
    linear = torch.nn.Linear(4, 4).requires_grad_(False)
    linear.compile(backend="tqai", options={"rest": "eager"})
    x = torch.randn(2, 4)
    assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight, linear.bias))


def test_explain():
    model = make_model()
    explanation = tqc.explain(model, options={**EAGER, "skip_layers": [1]}, inputs=PROMPT)
    prefill, *decode = explanation.graphs
    assert [site["action"] for site in prefill] == ["pack", "dense", "pack"]
    assert [site["action"] for site in decode[-1]] == ["fuse", "dense", "fuse"]
    assert decode[-1][1]["reason"] == "named in skip_layers"
    assert explanation.tokens == 83
    assert 0 < explanation.cache_bytes and explanation.dense_bytes == 3 * 2 * 2 * 83 * 16 * 4
    assert "named in skip_layers" in str(explanation) and "reference" in str(explanation)
    assert explanation.to_dict()["tokens"] == 83
    cache = DynamicCache(config=model.config)
    generate(model, past_key_values=cache)
    assert not any(packed(cache)), "explaining leaves the model as it was"
