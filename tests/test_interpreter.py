"""The interpreter as oracle: what torch makes of a rewritten graph, step by step, is what the graph means."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tests.models.common import FAMILIES, compiled, prompt
from tqc import backend
from tqc.cache.packed_tensor import PackedTensor
from tqc.execute.split_graph import SplitGraph
from tqc.ops import Planes
from tqc.ops.interpret import interpret


def planes(x: Any) -> Any:
    if not isinstance(x, PackedTensor):
        return x.clone() if isinstance(x, Tensor) and not isinstance(x, torch.nn.Parameter) else x
    return Planes(x.pages.clone(), x.dense.clone(), x.state.clone(), x.fmt, x.shape[2])


def assert_same(actual: Any, expected: Any, dtype_error: float = 2e-5) -> None:
    if not isinstance(expected, Planes):
        if isinstance(expected, Tensor):
            scale = max(1.0, float(expected.abs().max())) if expected.is_floating_point() else 1.0
            torch.testing.assert_close(actual, expected, atol=dtype_error * scale, rtol=0)
        return
    assert isinstance(actual, PackedTensor) and actual.fmt == expected.fmt and actual.shape[2] == expected.length
    assert actual.state.tolist() == expected.state.tolist()
    used = int(expected.state[1]) // expected.fmt.block_tokens
    assert torch.equal(actual.pages[:, :, :used], expected.pages[:, :, :used])
    stored = int(expected.state[0])
    ours, theirs = (torch.ops.tqai.read(*x, stored, expected.fmt.spec) for x in (parts(actual), expected.parts))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def parts(x: PackedTensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.pages, x.dense, x.state


class Checked:
    """Realized graphs that are interpreted before each call, and compared behind it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        realize = backend.realize

        def keep(gm: Any, requested: str) -> Any:
            rewritten = copy.deepcopy(gm)
            choices = realize(gm, requested)
            gm.meta["rewritten"] = rewritten
            return choices

        def checked(gm: Any, *args: Any, **kwargs: Any) -> Any:
            graph, rewritten = SplitGraph(gm, *args, **kwargs), gm.meta["rewritten"]
            names = [node.name for node in rewritten.graph.find_nodes(op="placeholder")]

            def call(*inputs: Any) -> Any:
                expected, updates = interpret(rewritten, *map(planes, inputs))
                actual = graph(*inputs)
                assert len(actual) == len(expected)
                for ours, theirs in zip(actual, expected, strict=True):
                    assert_same(ours, theirs)
                for name, new in updates.items():
                    assert_same(inputs[names.index(name)], new)
                self.calls += 1
                return actual

            call.regions = graph.regions  # type: ignore[attr-defined]
            return call

        monkeypatch.setattr(backend, "realize", keep)
        monkeypatch.setattr(backend, "SplitGraph", checked)


# The kind of cache, and whether a row is padded: calls without a mask are graphs of their own.
CASES = [
    ("llama", "dynamic", (False, True), {}),
    ("llama", "dynamic", (False,), {"fold_values": True, "bits_k": 3, "bits_v": 2}),
    ("llama", "dynamic", (True,), {"strategy": "evict", "scorer": "palm", "residual_window": 64}),
    ("qwen3", "static", (True,), {"bits_k": 4, "bits_v": 2}),
    ("gpt_oss", "dynamic", (True,), {}),
    *(
        pytest.param(family, kind, (False, True), options, marks=pytest.mark.extended)
        for family, kind, options in (
            ("llama", "static", {}),
            ("llama", "dynamic", {"fold_values": True, "bits_k": 3, "bits_v": 2}),
            ("llama", "dynamic", {"strategy": "evict", "scorer": "palm", "residual_window": 64}),
            ("qwen3", "static", {"bits_k": 4, "bits_v": 2}),
            ("gpt_oss", "dynamic", {}),
            ("gemma2", "dynamic", {}),
            ("gpt2", "dynamic", {}),
            ("gemma3n", "dynamic", {}),
        )
    ),
]


@pytest.mark.parametrize("family, kind, paddings, options", CASES)
def test_each_call_is_what_the_graph_means(
    family: str, kind: str, paddings: tuple[bool, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt, single tokens and a chunk that packs pages, with growing and preallocated caches."""
    checked = Checked(monkeypatch)
    layers = {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2}
    model = FAMILIES[family].build(
        "eager" if family in ("gpt_oss", "gemma2") else "sdpa", **(layers if family == "gpt_oss" else {})
    )
    ids = prompt(2, 124)
    mask = torch.ones(2, 124, dtype=torch.long)
    mask[0, :7] = 0
    config = model.config
    with compiled(model, **options):
        for padded in paddings:
            cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=128)
            for first, last in ((0, 80), (80, 81), (81, 82), (82, 122), (122, 123), (123, 124)):
                given = {"attention_mask": mask[:, :last]} if padded else {}
                model(ids[:, first:last], past_key_values=cache, **given)
    assert checked.calls == 6 * len(paddings)


def test_an_in_place_op_of_the_graph_leaves_the_inputs_alone() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.zeros(2)
    graph.output((graph.call_method("add_", (x, 1)),))
    given = torch.zeros(2)
    (result,), updates = interpret(torch.fx.GraphModule(torch.nn.Module(), graph), given)
    assert result.tolist() == [1, 1] and given.tolist() == [0, 0] and not updates
