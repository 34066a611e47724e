"""Compiled models whose packed caches the generated kernels read and write, against MLX's ops.

Without a GPU, the text that MLX hands to Metal's compiler runs by the shim of `tests/lowering`, which is slow and needs
arrays that are there: so nothing is compiled by `mx.compile`.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("mlx_lm", reason="needs mlx and mlx-lm")

import mlx.core as mx  # noqa: E402
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, make_prompt_cache  # noqa: E402

from tests.lowering.metal_shim import Shim  # noqa: E402
from tests.mlx_trace.models import build, tokens  # noqa: E402
from tests.mlx_trace.test_sessions import FINE, largest  # noqa: E402
from tqc import compile_mlx, explain  # noqa: E402
from tqc.lowering.metal import launch  # noqa: E402
from tqc.mlx_trace import kernels  # noqa: E402

SIZES = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 60}
shims: dict[Any, Shim] = {}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Calls of kernels, by the first word of their names, from when "metal" is patched in as the provider."""
    if launch.available():
        pytest.skip("there is a device")
    if sys.platform != "linux" or not shutil.which("g++"):
        pytest.skip("the shim needs g++ on Linux")
    seen: Counter[str] = Counter()

    def compiled(kernel: Any) -> Any:
        seen[kernel.name.split("_")[1]] += 1
        return shims.setdefault(kernel, Shim(kernel))

    monkeypatch.setattr(launch, "compiled", compiled)
    mx.disable_compile()
    yield seen
    mx.enable_compile()


def fed(model: Any, caches: list[Any], given: mx.array, *lengths: int, at: int) -> mx.array:
    """Logits of the last of several calls with consecutive parts of the tokens."""
    logits = given
    for length in lengths:
        logits = model(given[:, at : at + length], cache=caches)
        mx.eval(logits)
        at += length
    return logits


def test_a_session(called: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, tokens one by one, some at once, a cut, and a call that no program serves; a sliding window in it."""
    monkeypatch.setattr(launch, "PAGES_A_SIMDGROUP", 1)  # so that few pages make several shares
    ours, plain = (compile_mlx(build("mistral", **SIZES), strict=True, **FINE) for _ in range(2))
    made, expected = make_prompt_cache(ours), make_prompt_cache(plain)
    given, embedded = tokens(1, 270), mx.random.normal((1, 2, 64))
    for at, lengths in ((0, (256,)), (256, (1, 1, 4))):
        wanted = fed(plain, expected, given, *lengths, at=at)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "provider", lambda: "metal")
            assert largest(fed(ours, made, given, *lengths, at=at), wanted) < 5e-3, at
    for cache, own in zip(made, expected, strict=True):
        assert cache.placement == own.placement
        for part, held in zip((cache.keys, cache.values), (own.keys, own.values), strict=True):
            assert part.pages.shape == held.pages.shape and mx.allclose(part.dense, held.dense, atol=1e-3).item()
            assert (part.pages != held.pages).mean().item() < 0.02
    wanted = plain(tokens(1, 2), expected, embedded)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "provider", lambda: "metal")
        assert largest(ours(tokens(1, 2), made, embedded), wanted) < 5e-3
    assert set(called) == {"encode", "centre", "attend", "merge", "read"}, called


def test_a_batch_with_padding(called: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sequence has a state and a padding of its own."""
    lengths = (150, 40, 111)
    given = tokens(3, 160)
    padded = mx.stack([mx.pad(given[row, :length], [150 - length, 0]) for row, length in enumerate(lengths)])
    nexts = mx.concatenate([given[row : row + 1, at : at + 4] for row, at in enumerate(lengths)])
    made = []
    for provider in ("reference", "metal"):
        model = compile_mlx(build("mistral", **SIZES), strict=True, **FINE)
        left = [150 - length for length in lengths]
        caches = [BatchRotatingKVCache(60, left), BatchKVCache(left)]
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "provider", lambda provider=provider: provider)
            for part in (padded[:, :116], padded[:, 116:], nexts, nexts[:, :1]):
                made.append(model(part, cache=caches)[:, -1])
                mx.eval(made[-1])
    assert len(made) == 8 and called["attend"] and called["encode"]
    for expected, ours in zip(made[:4], made[4:], strict=True):
        assert largest(ours, expected) < 5e-3


def test_the_provider_is_named(called: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "provider", lambda: "metal")
    said = explain(build("mistral", **SIZES), tokens(1, 120), options=FINE)
    assert {site["kernel"] for graph in said.graphs for site in graph if site["action"] == "fuse"} == {"metal"}
    with pytest.raises(ValueError, match="provider must be auto or metal, .*; got 'reference'"):
        compile_mlx(build("llama"), provider="reference")


def test_the_device_decides() -> None:
    assert kernels.provider() == ("reference" if mx.default_device().type == mx.cpu else kernels.provider())
