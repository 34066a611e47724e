"""`mode="reduce-overhead"` on a GPU: the same tokens and the same cache as without, by replays alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

pytest.importorskip("triton")
from tests.models.common import FAMILIES, dense, layers, prompt, run  # noqa: E402
from tqc import report  # noqa: E402
from tqc.execute import cuda_graphs  # noqa: E402
from tqc.lowering.triton import PROVIDER  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(PROVIDER.unavailable() is not None, reason=f"Triton: {PROVIDER.unavailable()}"),
]
PROMPT, STEPS = 80, 40


def generate(model: Any, **compile_options: Any) -> tuple[torch.Tensor, StaticCache, list[Any]]:
    torch._dynamo.reset()
    cache = StaticCache(model.config, max_cache_len=128)
    cache.early_initialization(1, model.config.num_key_value_heads, 32, torch.bfloat16, torch.device("cuda"))
    model.compile(backend="tqai", **compile_options)
    try:
        with report.collect() as plans, torch.no_grad():
            logits = run(model, prompt(1, PROMPT + STEPS).cuda(), cache, splits=(PROMPT,))
    finally:
        model._compiled_call_impl = None
        torch._dynamo.reset()
    return logits, cache, plans


def test_replays_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].build(dtype=torch.bfloat16, head_dim=32).cuda()
    replays: list[int] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(1), replay(self))[1])
    expected, theirs, _ = generate(model)
    assert not replays
    actual, ours, plans = generate(model, mode="reduce-overhead")
    assert plans[-1].cuda_graph == "recorded as a CUDA graph", plans[-1].cuda_graph
    assert len(replays) == STEPS - 1
    # Regions may be compiled differently where they are compiled at once; what is stored differs by rounding alone.
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=0.05 * float(expected.abs().max()))
    for a, b in zip(layers(ours), layers(theirs), strict=True):
        assert a.keys.packed_storage.length == b.keys.packed_storage.length == PROMPT + STEPS
        torch.testing.assert_close(dense(a.keys).float(), dense(b.keys).float(), rtol=0.1, atol=0.1)


def test_a_replay_allocates_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"].build(dtype=torch.bfloat16, head_dim=32).cuda()
    called: list[tuple[int, int]] = []
    call = cuda_graphs.CudaGraphs.__call__

    def watched(self: Any, *args: Any) -> Any:
        recorded = any(recording is not None for recording in self._recordings.values())
        before = torch.cuda.memory_stats()["num_device_alloc"]
        torch.cuda.set_sync_debug_mode("error" if recorded else "default")
        try:
            return call(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            if recorded:
                called.append((before, torch.cuda.memory_stats()["num_device_alloc"]))

    monkeypatch.setattr(cuda_graphs.CudaGraphs, "__call__", watched)
    generate(model, mode="reduce-overhead")
    assert len(called) == STEPS - 2 and all(before == after for before, after in called[1:])
