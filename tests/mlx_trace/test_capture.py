"""Models of mlx-lm as graphs: the same logits and caches, sites that the passes know, and what cannot be captured."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="needs mlx and mlx-lm")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import torch  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models.base import create_attention_mask  # noqa: E402
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache  # noqa: E402

from tests.mlx_trace.models import ATTENTION, WINDOWED, build, tokens  # noqa: E402
from tqc import ops  # noqa: E402
from tqc.config import Config  # noqa: E402
from tqc.mlx_trace import layouts, markers  # noqa: E402
from tqc.mlx_trace.arrays import tensor_of  # noqa: E402
from tqc.mlx_trace.capture import Captured, capture  # noqa: E402
from tqc.mlx_trace.graph import CaptureError  # noqa: E402
from tqc.mlx_trace.program import Program  # noqa: E402
from tqc.ops import PackedValue, example, set_example  # noqa: E402
from tqc.passes import rewrite  # noqa: E402
from tqc.passes.plan import DENSE, FUSE, PACK  # noqa: E402


def assert_same(a: mx.array, b: mx.array, tolerance: float = 2e-5) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    assert mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item() <= tolerance


@pytest.mark.parametrize("name", ATTENTION)
def test_a_session_is_the_models_own(name: str) -> None:
    """Prefill and decode past the window, on caches of mlx-lm: logits and, where they hold all tokens, the caches."""
    model = build(name)
    programs: dict[int, Program] = {}
    own, ours = make_prompt_cache(model), make_prompt_cache(model)
    at, given = 0, tokens(1, 24)
    for length in (7, 1, 1, 7, *[1] * 8):
        step, at = given[:, at : at + length], at + length
        program = programs.setdefault(length, Program(capture(model, ours, 1, length)))
        assert_same(program(step, ours), model(step, cache=own))
    for held, expected in zip(ours, own, strict=True):
        assert (held.offset, held.empty()) == (expected.offset, False)
        if type(held) is KVCache:
            assert_same(held.keys[:, :, :at], expected.keys[:, :, :at])
            assert_same(held.values[:, :, :at], expected.values[:, :, :at])
    assert_same(model(given[:, :1], cache=ours), model(given[:, :1], cache=own))  # and mlx-lm goes on with them


def test_float16_and_quantized_weights() -> None:
    model = build("llama")
    model.set_dtype(mx.float16)
    nn.quantize(model, group_size=32, bits=4)
    own, ours, given = make_prompt_cache(model), make_prompt_cache(model), tokens(2, 6)
    captured = capture(model, ours, 2, 6)
    assert sum(node.target.__name__ == "quantized_matmul" for node in calls(captured)) == 4 * 7 + 1
    assert_same(Program(captured)(given, ours), model(given, cache=own), 4e-3)


def test_a_cache_that_another_call_has_filled() -> None:
    """One program serves any length: buffers grow by steps, windows are full or not."""
    model = build("mistral")
    program = Program(capture(model, make_prompt_cache(model), 1, 1))
    for length in (3, 8, 20, 256, 300):
        own, ours, given = make_prompt_cache(model), make_prompt_cache(model), tokens(1, length)
        for cache in (own, ours):
            model(given, cache=cache)
        for _ in range(2):
            assert_same(program(given[:, :1], ours), model(given[:, :1], cache=own))


def calls(captured: Captured) -> list[torch.fx.Node]:
    return [node for node in captured.gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("length", [1, 8])
@pytest.mark.parametrize("name", ATTENTION)
def test_passes_pack_what_is_no_window(name: str, length: int) -> None:
    model = build(name)
    windows = WINDOWED.get(name, 0)
    captured = capture(model, make_prompt_cache(model), 1, length)
    plan = rewrite(captured.gm, Config())
    assert len(plan.with_action(PACK)) == 4 - windows and len(plan.with_action(DENSE)) == windows
    for site in plan.with_action(DENSE):
        assert ("ring_write" if length == 1 else "window_append") in site.reason
    assert {site.layer for site in plan.with_action(PACK)} <= {0, 1, 2, 3}
    assert all("layers." in site.attention.name and site.attention.name.endswith("self_attn") for site in plan.sites)

    captured = capture(model, make_prompt_cache(model), 1, length)
    for node in captured.gm.graph.find_nodes(op="placeholder"):
        kind, _, rest = node.meta["path"].partition(".")
        layer, _, part = rest.partition(".")
        if kind == "cache" and captured.kinds[int(layer)].name == "whole":
            held = example(node)
            fmt = Config().formats(16, 16)[int(part)]
            set_example(node, PackedValue(fmt, *held.shape[:3], held.dtype, held.device))
    plan = rewrite(captured.gm, Config())
    assert len(plan.with_action(FUSE)) == 4 - windows
    attends = [node for node in calls(captured) if node.target is ops.attend]
    assert len(attends) == 4 - windows
    softcap, sinks = attends[0].kwargs["softcap"], attends[0].kwargs["sinks"]
    assert (softcap > 0, sinks is not None) == (name == "gemma2", name == "gpt_oss")


def test_torch_runs_the_graph_with_the_same_result() -> None:
    """The functions of a graph mean in torch what they do in MLX."""
    for name in ("llama", "gemma2", "gpt_oss"):
        model, given = build(name), tokens(1, 5)
        captured = capture(model, make_prompt_cache(model), 1, 5)
        expected = model(given, cache=make_prompt_cache(model))
        inputs = []
        for node in captured.gm.graph.find_nodes(op="placeholder"):
            path = node.meta["path"]
            if path in captured.weights:
                inputs.append(tensor_of(captured.weights[path]))
            elif path == "tokens":
                inputs.append(tensor_of(given))
            elif path == "offset":
                inputs.append(torch.tensor(0, dtype=torch.int32))
            else:
                columns = 0 if captured.kinds[int(path.split(".")[1])].name == "window" else 12
                inputs.append(torch.zeros(1, 2, columns, 16))
        logits = captured.gm(*inputs)[0]
        assert torch.allclose(logits, tensor_of(expected), atol=2e-5), name


def test_a_pure_trace_shows_the_same_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where attention is no marker, the products that MLX makes of it are recognized."""
    fused = mx.fast.scaled_dot_product_attention

    def spelled_out(self: Any, q: mx.array, k: mx.array, v: mx.array, **how: Any) -> mx.array:
        return fused(q, k, v, **how)

    monkeypatch.setattr(markers.Trace, "_attention", spelled_out)
    for heads in (2, 4):
        model = build("llama", num_key_value_heads=heads)
        captured = capture(model, make_prompt_cache(model), 1, 8)
        own, ours, given = make_prompt_cache(model), make_prompt_cache(model), tokens(1, 8)
        assert_same(Program(captured)(given, ours), model(given, cache=own))
        plan = rewrite(captured.gm, Config())
        assert [site.action for site in plan.sites] == [PACK] * 4, plan.sites


# --- What cannot be captured -----------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    """A model of one attention layer without projections; `change` may do anything to what it computes."""

    def __init__(self, change: Callable[..., mx.array]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(100, 16)
        self.change = change
        self.layers = [None]

    def __call__(self, inputs: mx.array, cache: Any) -> mx.array:
        x = self.embed_tokens(inputs)
        mask = create_attention_mask(x, cache[0])
        q = x[:, None]
        keys, values = cache[0].update_and_fetch(q, q)
        return self.change(q, keys, values, mask, cache[0])


def attend(q: mx.array, keys: mx.array, values: mx.array, mask: Any, cache: Any) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, keys, values, scale=1.0, mask=mask)


def asks_for_no_mask(q: mx.array, keys: mx.array, values: mx.array, mask: Any, cache: Any) -> mx.array:
    return attend(q, keys, values, None, cache)


@pytest.mark.parametrize("change", [attend, asks_for_no_mask])
def test_attention_without_a_mask_sees_what_the_cache_holds(change: Any) -> None:
    model, given = OneLayer(change), tokens(1, 1)
    own, ours = [KVCache()], [KVCache()]
    program = Program(capture(model, ours, 1, 1))
    for _ in range(3):
        assert_same(program(given, ours), model(given, cache=own))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q, k, v, m, c: mx.hadamard_transform(attend(q, k, v, m, c)), r"primitive Hadamard\(float32\[1, 1, 4, "),
        (lambda q, k, v, m, c: attend(q, k[:, :, -3:], v[:, :, -3:], None, c), "a part of a cache"),
        (lambda q, k, v, m, c: attend(q, k, v, m, c) if c.offset > 3 else q, "array as the caches' offset"),
        (lambda q, k, v, m, c: (attend(q, k, v, m, c), q), "gives a tuple"),
        (lambda q, k, v, m, c: mx.softmax(q @ k.swapaxes(-1, -2), axis=-1) @ v, "without a mask"),
        (lambda q, k, v, m, c: attend(q, k, v, m, c) * k.sum(2, keepdims=True), "without a mask"),
        (lambda q, k, v, m, c: attend(q, k, v, m, c) * k.shape[2], "length of a cache is a constant"),
    ],
)
def test_what_cannot_be_captured_says_why(change: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(OneLayer(change), [KVCache()], 1, 4)


def test_a_failing_trace_changes_nothing() -> None:
    model = OneLayer(lambda q, k, v, m, c: mx.hadamard_transform(attend(q, k, v, m, c)))
    functions = [mx.fast.rope, mx.fast.rms_norm, mx.fast.scaled_dot_product_attention, mx.contiguous]
    held, cls, cache = tree_flatten(model.parameters()), type(model), KVCache()
    with pytest.raises(CaptureError):
        capture(model, [cache], 1, 4)
    assert functions == [mx.fast.rope, mx.fast.rms_norm, mx.fast.scaled_dot_product_attention, mx.contiguous]
    assert type(model) is cls and cache.empty()
    assert all(a is b for (_, a), (_, b) in zip(held, tree_flatten(model.parameters()), strict=True))


def test_other_threads_see_no_marker() -> None:
    x, found = mx.ones((1, 1, 2, 8)), []
    expected = mx.fast.rms_norm(x, None, 1e-5)

    def other() -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            found.append(mx.array_equal(mx.fast.rms_norm(x, None, 1e-5), expected).item())

    mx.eval(x, expected)
    with markers.Trace().marking():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found == [True]


def test_caches_that_are_not_known_say_so() -> None:
    model = build("llama")
    cache = RotatingKVCache(8)
    with pytest.raises(CaptureError, match="a cache of class QuantizedKVCache is not known"):
        capture(model, [KVCache().to_quantized()] * 4, 1, 1)
    with pytest.raises(CaptureError, match="different numbers of tokens"):
        held = make_prompt_cache(model)
        program = Program(capture(model, held, 1, 1))
        held[0].offset = 3
        program(tokens(1, 1), held)
    assert cache.empty()


def test_another_layout_of_arguments_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts.check()
    monkeypatch.setitem(layouts.LAYOUTS, "Split", [(layouts.LAYOUTS["Split"][0][0], [2, (2, 5)])])
    with pytest.raises(CaptureError, match=r"Split has arguments .*, not \[2, \(2, 5\)\]"):
        layouts.check.__wrapped__()
