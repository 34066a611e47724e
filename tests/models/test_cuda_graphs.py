"""`mode="reduce-overhead"`: steps over a StaticCache are recorded and replayed; all else says why it is not."""

from __future__ import annotations

import logging
import operator
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache

pytest.importorskip("triton")
import tqc  # noqa: E402
from tests.models.common import FAMILIES, assert_caches_close, compiled, layers, prompt, run  # noqa: E402
from tests.models.fake_cuda_graph import fake_cuda  # noqa: E402, F401
from tqc.config import Config  # noqa: E402
from tqc.execute import (
    cuda_graphs,  # noqa: E402
    instructions,  # noqa: E402
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: see test_cuda_graphs_gpu.py")
OPTIONS: dict[str, Any] = {"provider": "triton", "cuda_graphs": True}
# The fourth step behind it packs a page, with 4 sinks and a window of 32.
PROMPT = 65


def small() -> Any:
    """One layer, since the interpreter is slow."""
    return FAMILIES["llama"].build(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)


def make(model: Any, capacity: int = 96) -> StaticCache:
    return StaticCache(model.config, max_cache_len=capacity)


def parts(cache: Any) -> list[torch.Tensor]:
    stores = [tensor.packed_storage for layer in layers(cache) for tensor in (layer.keys, layer.values)]
    return [part for s in stores for part in (s.pages, s.dense, s.state)]


def stored(cache: Any) -> int:
    return layers(cache)[0].keys.packed_storage.length


def steps(
    model: Any, cache: Any, count: int = 6, behind: int = PROMPT, **options: Any
) -> tuple[torch.Tensor, list[Any]]:
    with compiled(model, **{**OPTIONS, **options}) as plans:
        return run(model, prompt(1, behind + count), cache, splits=(behind,)), plans


@pytest.mark.parametrize(
    "behind,capacity,packed",
    [
        (PROMPT, 96, 64),  # a page is packed while it replays
        pytest.param(33, 96, 32, marks=pytest.mark.extended),  # the first one is
        (8, 30, 0),  # there is room for no page
    ],
)
def test_replayed_steps_are_the_steps(behind: int, capacity: int, packed: int, fake_cuda: Any) -> None:  # noqa: F811
    """They are recorded once: a cache has from the start all rows and pages that it will need."""
    model = small()
    theirs, ours = make(model, capacity), make(model, capacity)
    expected, _ = steps(model, theirs, behind=behind, cuda_graphs=False)
    assert not fake_cuda
    actual, plans = steps(model, ours, behind=behind)
    assert torch.equal(actual, expected)
    assert len(fake_cuda) == 1 and fake_cuda[0].replays == 5, "the first step runs, all others are replayed"
    for a, b in zip(parts(ours), parts(theirs), strict=True):
        assert torch.equal(a, b)
    assert int(layers(ours)[0].cumulative_length) == behind + 6
    assert stored(ours) == behind + 6 and layers(ours)[0].keys.packed_storage.packed == packed
    assert plans[-1].cuda_graph == "recorded as a CUDA graph" and "starts a cache" in plans[0].cuda_graph


def test_generate(fake_cuda: Any) -> None:  # noqa: F811
    model = small()
    arguments = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = model.generate(prompt(1, PROMPT), **arguments)
    with compiled(model, **OPTIONS):
        actual = model.generate(prompt(1, PROMPT), **arguments)
    assert torch.equal(actual, expected)
    assert len(fake_cuda) == 1 and fake_cuda[0].replays == 4, "one prefill, one step that runs, four that are replayed"


def test_another_cache_is_recorded_anew_and_the_first_still_works(fake_cuda: Any) -> None:  # noqa: F811
    model = small()
    ids = prompt(1, PROMPT + 6)
    caches = [make(model) for _ in range(2)]
    with compiled(model, **OPTIONS):
        logits = [run(model, ids[:, : PROMPT + 3], cache, splits=(PROMPT,)) for cache in caches]
        assert len(fake_cuda) == 2
        # Looked at, and so known to the host, between replays.
        assert [stored(cache) for cache in caches] == [PROMPT + 3] * 2
        more = [run(model, ids[:, PROMPT + 3 :], cache, splits=(1,)) for cache in caches]
    assert [stored(cache) for cache in caches] == [PROMPT + 6] * 2
    assert len(fake_cuda) == 2 and torch.equal(*logits) and torch.equal(*more)
    assert [graph.replays for graph in fake_cuda] == [5, 5]


@pytest.mark.slow
def test_a_cache_that_is_reset_is_replayed(fake_cuda: Any) -> None:  # noqa: F811
    model = small()
    ids, cache = prompt(1, PROMPT + 4), make(model)
    with compiled(model, **OPTIONS):
        first = run(model, ids, cache, splits=(PROMPT,))
        cache.reset()
        second = run(model, ids, cache, splits=(PROMPT,))
    assert torch.equal(first[:, PROMPT:].argmax(-1), second[:, PROMPT:].argmax(-1))
    assert len(fake_cuda) == 1 and fake_cuda[0].replays == 7


def test_outputs_are_the_callers_own(fake_cuda: Any) -> None:  # noqa: F811
    model = small()
    ids, cache = prompt(1, PROMPT + 5), make(model)
    with compiled(model, **OPTIONS):
        run(model, ids[:, : PROMPT + 2], cache, splits=(PROMPT,))
        with torch.no_grad():
            kept = model(ids[:, PROMPT + 2 : PROMPT + 3], past_key_values=cache).logits
            before = kept.clone()
            model(ids[:, PROMPT + 3 : PROMPT + 4], past_key_values=cache)
    assert torch.equal(kept, before)


def test_a_weight_that_moves_is_recorded_anew(fake_cuda: Any) -> None:  # noqa: F811
    model = small()
    ids, cache = prompt(1, PROMPT + 8), make(model)
    with compiled(model, **OPTIONS):
        run(model, ids[:, : PROMPT + 3], cache, splits=(PROMPT,))
        weight = model.model.norm.weight
        weight.data = 2 * weight.data
        doubled = run(model, ids[:, PROMPT + 3 :], cache, splits=(1,))
    expected, _ = steps(model, make(model), count=8, cuda_graphs=False)
    assert len(fake_cuda) == 2
    torch.testing.assert_close(doubled[:, -1], expected[:, -1], rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.extended
def test_many_signatures_do_not_pile_up(fake_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(cuda_graphs, "MAX_SIGNATURES", 1)
    model = small()
    caches = [make(model) for _ in range(2)]
    with compiled(model, **OPTIONS):
        for cache in caches:
            run(model, prompt(1, PROMPT + 2), cache, splits=(PROMPT,))
        actual = run(model, prompt(1, PROMPT + 4)[:, PROMPT + 2 :], caches[0], splits=(1,))
    expected, _ = steps(model, make(model), count=4, cuda_graphs=False)
    assert torch.equal(actual, expected[:, -2:])
    assert len(fake_cuda) == 3


def test_calls_that_all_differ_are_not_recorded_and_say_so() -> None:
    """A number that a model counts up in Python, say."""
    graph = torch.fx.Graph()
    x, number = graph.placeholder("x"), graph.placeholder("number")
    x.meta["example_value"], number.meta["example_value"] = torch.zeros(2), 0
    graph.output((graph.call_function(torch.add, (x, number)),))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)

    class Step:
        outer = module

        def __call__(self, *args: Any) -> Any:
            return module(*args)

    said: list[str] = []
    step = cuda_graphs.CudaGraphs(Step(), module, said.append)  # type: ignore[arg-type]
    for number in range(20):
        assert torch.equal(step(torch.ones(2), number)[0], torch.full((2,), 1.0 + number))
    assert said == ["no two of 8 calls had the same sizes, numbers and addresses"]


def test_a_recording_that_fails_says_so_and_loses_nothing(
    fake_cuda: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The host looks at positions, as it does on a CPU: not permitted while recording."""
    model = small()
    monkeypatch.setattr(instructions, "_on_host", lambda x: True)
    expected, _ = steps(model, make(model), count=4, cuda_graphs=False)
    cache = make(model)
    with caplog.at_level(logging.WARNING, "tqc"):
        actual, plans = steps(model, cache, count=4)
    assert torch.equal(actual, expected) and int(layers(cache)[0].cumulative_length) == PROMPT + 4
    assert "recording failed: operation not permitted" in plans[-1].cuda_graph
    assert sum("recording failed" in line for line in caplog.messages) == 1 and len(fake_cuda) == 1


@pytest.mark.parametrize(
    ("options", "make_cache", "reason"),
    [
        ({}, DynamicCache, "a cache grows, so its memory moves: give the model a StaticCache"),
        ({"provider": "reference"}, make, "the kernels of 'reference' wait for the device"),
    ],
)
def test_what_is_not_recorded_says_why(
    options: Any,
    make_cache: Any,
    reason: str,
    fake_cuda: Any,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = small()
    cache = DynamicCache(config=model.config) if make_cache is DynamicCache else make_cache(model)
    with caplog.at_level(logging.WARNING, "tqc"):
        _, plans = steps(model, cache, count=3, **options)
    assert reason in plans[-1].cuda_graph and not fake_cuda
    assert any(reason in line for line in caplog.messages)


def test_on_a_cpu_it_says_so_and_works(caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    theirs, ours = make(model), make(model)
    expected = run(model, prompt(1, PROMPT + 2), theirs, splits=(PROMPT,))
    with caplog.at_level(logging.WARNING, "tqc"):
        actual, plans = steps(model, ours, count=2, provider="reference")
    assert "is on cpu, and all must be on one CUDA device" in plans[-1].cuda_graph
    assert any("is on cpu" in line for line in caplog.messages)
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))
    assert_caches_close(ours, theirs, 0.05, packed=1)


def test_explain_says_it() -> None:
    model = small()
    options = {"provider": "reference", "residual_window": 32}
    quiet = tqc.explain(model, prompt(1, PROMPT), options=options)
    asked = tqc.explain(model, prompt(1, PROMPT), options={**options, "cuda_graphs": True})
    assert not any("CUDA graph" in note for note in quiet.notes)
    assert any("not recorded as a CUDA graph" in note for note in asked.notes)


def test_modes() -> None:
    assert Config.from_options(mode="reduce-overhead") == Config(cuda_graphs=True)
    assert Config.from_options(mode="quality") == Config.from_options({"preset": "quality"})
    with pytest.raises(ValueError, match="mode must be one of reduce-overhead, default, .*; got 'max-autotune'"):
        Config.from_options(mode="max-autotune")
    with pytest.raises(ValueError, match=r"got 'reduce_overhead' \(did you mean 'reduce-overhead'\?\)"):
        Config.from_options(mode="reduce_overhead")
    with pytest.raises(TypeError, match="cuda_graphs must be True or False, got 1"):
        Config.from_options({"cuda_graphs": 1})


def test_the_mode_of_torch_compile_reaches_the_backend() -> None:
    from tqc.optimized_module import options_of

    model = small()
    assert options_of(torch.compile(model, backend="tqai", mode="reduce-overhead")) == {"cuda_graphs": True}
    with pytest.raises(Exception, match="mode must be one of"), torch.no_grad():
        torch.compile(model, backend="tqai", mode="max-autotune")(prompt(1, 4))
    torch._dynamo.reset()


def test_what_holds_no_cache_gets_inductors_own_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def compile_fx(gm: Any, inputs: Any, config_patches: Any = None) -> Any:
        given.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    for options in ({"cuda_graphs": True}, {"cuda_graphs": True, "preset": "off"}, {}):
        torch._dynamo.reset()
        torch.compile(torch.sin, backend="tqai", options=options)(torch.ones(2))
    torch._dynamo.reset()
    assert given == [{"triton.cudagraphs": True}, {"triton.cudagraphs": True}, None]


@pytest.mark.slow
def test_the_default_mode_of_transformers() -> None:
    """`CompileConfig` asks for "reduce-overhead" unless told otherwise, also of other backends than Inductor."""
    config = CompileConfig(backend="tqai")
    assert config.mode == "reduce-overhead"
    config._compile_all_devices = True
    model = small()
    arguments = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(prompt(1, 8), **arguments)
    result = model.generate(prompt(1, 8), **arguments, compile_config=config, return_dict_in_generate=True)
    torch._dynamo.reset()
    assert torch.equal(result.sequences, expected)
    assert isinstance(layers(result.past_key_values)[0].keys, tqc.PackedTensor)


def test_inputs_that_are_written_are_used_where_they_lie() -> None:
    """Else a replay would write to a copy."""
    graph = torch.fx.Graph()
    nodes = {}
    for name in ("added", "viewed", "assigned", "out", "read", "unused"):
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["example_value"] = torch.zeros(4, 4)
    view = graph.call_method("view", (nodes["viewed"], 16))
    view.meta["example_value"] = nodes["viewed"].meta["example_value"].view(16)
    graph.call_method("add_", (nodes["added"], 1))
    graph.call_method("mul_", (view, nodes["read"]))
    graph.call_function(operator.setitem, (nodes["assigned"], 0, 1.0))
    graph.call_function(torch.neg, (nodes["read"],), {"out": nodes["out"]})
    graph.output(())
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    found = dict(zip(nodes, cuda_graphs.roles(module, module), strict=True))
    assert found.pop("unused") == cuda_graphs.UNUSED and found.pop("read") == cuda_graphs.COPY
    assert set(found.values()) == {cuda_graphs.ADDRESS}
