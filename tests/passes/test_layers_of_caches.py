"""Which layer a site is of, whether it has a cache at all, and what is said where nothing is packed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache

import tqc
from tests.common import OPTIONS
from tests.models.common import FAMILIES, compiled, layers, prompt, run
from tqc import report
from tqc.cache.packed_tensor import PackedTensor
from tqc.passes.plan import DENSE, FUSE, PACK, SKIPPED, UNCACHED, Plan


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_said", set())


def source() -> dict[str, Tensor]:
    return {"input_ids": prompt(2, 40, seed=3)}


def layers_with(plans: list[Plan], *actions: str) -> list[set[int | None]]:
    """Layers of each graph that has a cache."""
    cached = [plan for plan in plans if any(site.layer is not None for site in plan.sites)]
    return [{site.layer for site in plan.sites if site.action in actions} for plan in cached]


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[list[Plan], Any]:
    with compiled(model, **options) as plans:
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    return plans, out.past_key_values


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(16, 16)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Any]:
        keys = self.proj(x)[:, None]
        values = keys + 1
        if past is not None:
            keys, values = (torch.cat([held, new], dim=-2) for held, new in zip(past, (keys, values), strict=True))
        return F.scaled_dot_product_attention(x[:, None], keys, values)[:, 0], (keys, values)


class Stack(torch.nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(count))


class Seeing(torch.nn.Module):
    """Layers without a cache before those with one, where there is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = Stack(3), Stack(2)

    def forward(self, x: Tensor, caches: list[Any], image: Tensor | None = None) -> tuple[Tensor, list[Any]]:
        if image is not None:
            for layer in self.vision.layers:
                image, _ = layer(image)
            x = torch.cat([image, x], dim=1)
        made = []
        for layer, past in zip(self.text.layers, caches, strict=True):
            x, new = layer(x, past)
            made.append(new)
        return x, made


SKIPS = [([0], {0}), ([1], {1}), ([-1], {1}), ([-2], {0}), ([0, -1], {0, 1}), ([7], set())]


@pytest.mark.parametrize("skip, dense", SKIPS)
def test_layers_without_a_cache_do_not_count(skip: list[int], dense: set[int]) -> None:
    model = Seeing().eval()
    caches: list[Any] = [(torch.zeros(1, 1, 0, 16), torch.zeros(1, 1, 0, 16))] * 2
    with compiled(model, skip_layers=skip) as plans:
        for image in (torch.randn(1, 40, 16), None):
            _, caches = model(torch.randn(1, 3, 16), caches, image)
            assert [not isinstance(keys, PackedTensor) for keys, _ in caches] == [n in dense for n in range(2)]
    towers = [[site for site in plan.sites if site.layer is None] for plan in plans]
    assert [len(tower) for tower in towers] == [3, 0]
    assert all(site.action == UNCACHED and "no cache" in site.reason for site in towers[0])
    assert layers_with(plans, PACK, FUSE) == [{0, 1} - dense] * 2


@pytest.mark.parametrize(
    "skip, dense", [SKIPS[0], *(pytest.param(*skip, marks=pytest.mark.extended) for skip in SKIPS[1:3])]
)
def test_the_same_layers_are_skipped_in_all_graphs(skip: list[int], dense: set[int]) -> None:
    plans, cache = generate(FAMILIES["llama"].build("sdpa"), source(), skip_layers=skip)
    found = layers_with(plans, PACK, FUSE)
    assert len(found) > 1 and all(packed == {0, 1} - dense for packed in found)
    assert [not isinstance(layer.keys, PackedTensor) for layer in layers(cache)] == [n in dense for n in range(2)]
    assert all(site.reason == SKIPPED for plan in plans for site in plan.with_action(DENSE))


@pytest.mark.parametrize("skip, dense", [([-1], {1}), pytest.param([0], {0}, marks=pytest.mark.extended)])
def test_a_decoders_self_and_cross_attention_are_one_layer(skip: list[int], dense: set[int]) -> None:
    plans, cache = generate(FAMILIES["t5"].build("sdpa"), source(), skip_layers=skip)
    assert all(packed == {0, 1} - dense for packed in layers_with(plans, PACK, FUSE))
    for half in (cache.self_attention_cache, cache.cross_attention_cache):
        assert [not isinstance(layer.keys, PackedTensor) for layer in layers(half)] == [n in dense for n in range(2)]


def test_attention_without_a_cache_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=14)).eval()
    explanation = tqc.explain(tower, options=OPTIONS, pixel_values=torch.randn(1, 3, 28, 28))
    assert {site["action"] for sites in explanation.graphs for site in sites} == {UNCACHED}
    assert {site["layer"] for sites in explanation.graphs for site in sites} == {None}
    assert "has no cache" in str(explanation) and "nothing to pack" in explanation.notes[-1]
    assert "left dense" not in str(explanation)
    assert not warnings(caplog)


def test_explain_shows_the_cache_of_an_encoder_decoder() -> None:
    model = FAMILIES["t5"].build("sdpa")
    explanation = tqc.explain(model, options=OPTIONS, **source())
    new, heads, head_dim = 4, 4, 16
    assert explanation.tokens == 40 + new
    assert explanation.dense_bytes == 2 * 2 * 2 * heads * head_dim * 4 * (40 + new)
    assert explanation.cache_bytes and f"for {explanation.tokens} tokens" in str(explanation)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "tqc.report" and record.levelno >= logging.WARNING
    ]


@pytest.mark.parametrize(
    "name, attn, reason",
    [
        ("gemma2", "eager", "the cache keeps 29 tokens (a sliding window), no more than the 36 that stay dense"),
        ("llama", "sdpa", "the head_dim of the keys is 20, not a multiple of 8"),
    ],
)
def test_a_dense_cache_is_said_once(name: str, attn: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {
        "gemma2": {"layer_types": ["sliding_attention"] * 3, "sliding_window": 30},
        "llama": {"head_dim": 20},
    }.get(name, {})
    model = FAMILIES[name].build(attn, **options)
    for _ in range(2):
        with compiled(model) as plans:
            run(model, prompt(1, 42), DynamicCache(config=model.config), splits=(40,))
        assert len(plans) > 1 and all(site.action == DENSE and reason in site.reason for p in plans for site in p.sites)
    (said,) = warnings(caplog)
    assert reason in said and FAMILIES[name].model.removesuffix("ForCausalLM") in said


@pytest.mark.parametrize("options", [{}, {"skip_layers": [0, 1]}])
def test_nothing_is_said_where_nothing_is_lost(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model = FAMILIES["llama"].build("sdpa")
    with compiled(model, **options):
        run(model, prompt(1, 42), DynamicCache(config=model.config), splits=(40,))
        model(prompt(1, 12), use_cache=False)
    assert not warnings(caplog)


def test_a_cache_that_no_attention_reads_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def step(x: Tensor, k_cache: Tensor, v_cache: Tensor) -> Any:
        keys, values = torch.cat([k_cache, x], dim=-2), torch.cat([v_cache, x], dim=-2)
        return torch.relu(x @ keys.mT) @ values, keys, values

    torch._dynamo.reset()
    with report.collect() as plans, torch.no_grad():
        torch.compile(step, backend="tqai", options=OPTIONS)(*(torch.randn(1, 2, 5, 16) for _ in range(3)))
    assert plans[0].unread and "no attention was found" in warnings(caplog)[0]


def test_caches_are_told_from_their_absence() -> None:
    """The same attention, with its keys taken from an earlier call, kept for a later one, or neither."""

    def kept(x: Tensor, past: Tensor) -> Any:
        return F.scaled_dot_product_attention(x, x, x + 1), x.transpose(1, 2)

    def written(x: Tensor, past: Tensor) -> Any:
        past[:, :, -5:].copy_(x)
        return F.scaled_dot_product_attention(x, x, x + 1)

    def taken(x: Tensor, past: Tensor) -> Any:
        return F.scaled_dot_product_attention(x, past, past + 1)

    def projected(x: Tensor, past: Tensor) -> Any:
        held = torch.cat([past, x], dim=-2)
        return F.scaled_dot_product_attention(x, held @ held.mT @ held, held * 2), held

    def neither(x: Tensor, past: Tensor) -> Any:
        y = F.scaled_dot_product_attention(x, past, past) + past[:, :, :5]
        return F.scaled_dot_product_attention(y * 2, y * 3, y * 4)

    for function in (kept, written, taken, projected, neither):
        torch._dynamo.reset()
        with report.collect() as plans, torch.no_grad():
            torch.compile(function, backend="tqai", options=OPTIONS)(
                torch.randn(1, 2, 5, 16), torch.randn(1, 2, 40, 16)
            )
        sites = plans[0].sites
        assert (sites[-1].action == UNCACHED) == (function is neither), (function, [str(site) for site in sites])
