"""Methods of a model that `torch.compile` returned: which call they see, in which thread, and what is left behind."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from tests.common import OPTIONS
from tests.models.common import FAMILIES, prompt
from tqc.cache.packed_tensor import PackedTensor
from tqc.execute.split_graph import SplitGraph
from tqc.torch_private import called_through

TIMEOUT = 60


def in_threads(*functions: Callable[[], Any]) -> None:
    """Run all at once; what one raises is raised here."""
    raised: list[BaseException] = []

    def run(function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
        assert not thread.is_alive()
    if raised:
        raise raised[0]


class Worker:
    """A thread that runs one function at a time."""

    def __init__(self) -> None:
        self.wanted, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.function: Callable[[], Any] | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while self.wanted.acquire() and self.function:
            self.result = self.function()
            self.done.release()

    def do(self, function: Callable[[], Any]) -> Any:
        self.function = function
        self.wanted.release()
        assert self.done.acquire(timeout=TIMEOUT)
        return self.result

    def stop(self) -> None:
        self.function = None
        self.wanted.release()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["enter", "leave", "call"])), max_size=14))
def test_each_thread_sees_its_own_call(steps: list[tuple[int, str]]) -> None:
    """Threads enter and leave in any order, nested ones too."""
    module = torch.nn.Identity()
    workers = [Worker() for _ in range(3)]
    stacks: list[list[Any]] = [[] for _ in workers]
    names = iter(range(len(steps)))
    try:
        for index, step in steps:
            worker, stack = workers[index], stacks[index]
            if step == "enter":
                name = next(names)
                context = called_through(module, lambda x, name=name: name)
                worker.do(context.__enter__)
                stack.append((name, context))
            elif step == "leave" and stack:
                _, context = stack.pop()
                worker.do(lambda context=context: context.__exit__(None, None, None))
            expected = stack[-1][0] if stack else "plain"
            assert worker.do(lambda: module("plain")) == expected
        for worker, stack in zip(workers, stacks, strict=True):
            for _, context in reversed(stack):
                worker.do(lambda context=context: context.__exit__(None, None, None))
    finally:
        for worker in workers:
            worker.stop()
    assert module._compiled_call_impl is None


def test_what_was_compiled_in_place_comes_back() -> None:
    module = torch.nn.Identity()
    module._compiled_call_impl = lambda x: "in place"
    with called_through(module, lambda x: "other"), pytest.raises(KeyError), called_through(module, lambda x: "inner"):
        assert module(0) == "inner"
        raise KeyError
    assert module(0) == "in place"


def test_generate_in_threads_packs_each_cache_and_leaves_the_model_dense() -> None:
    torch._dynamo.reset()
    model = FAMILIES["llama"].build("sdpa")
    compiled = torch.compile(model, backend="tqai", options=OPTIONS)
    caches = [DynamicCache(config=model.config) for _ in range(3)]
    expected, found = [], []
    ids = [prompt(1, 60 + index) for index in range(3)]
    dense = copy.deepcopy(model)

    def generate(index: int) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                tokens = compiled.generate(ids[index], past_key_values=caches[index], max_new_tokens=6 + 4 * index)
            found.append((index, tokens.tolist()))

        return run

    with torch.no_grad():
        for index in range(3):
            tokens = dense.generate(ids[index], max_new_tokens=6 + 4 * index)
            expected.append((index, tokens.tolist()))
    in_threads(*map(generate, range(3)))
    assert sorted(found) == expected
    for cache in caches:
        assert all(isinstance(layer.keys, PackedTensor) for layer in cache.layers)
    assert model._compiled_call_impl is None
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[0], past_key_values=cache)
    assert not any(isinstance(layer.keys, PackedTensor) for layer in cache.layers)
    torch._dynamo.reset()


def test_a_graph_that_threads_call_at_once_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = torch.fx.symbolic_trace(lambda x: (x + 1,))
    split = SplitGraph(graph, "inductor")
    compilations: list[int] = []
    monkeypatch.setattr(SplitGraph, "compile", lambda self: (compilations.append(1), setattr(self, "_lazy", False)))
    start = threading.Barrier(8)

    class Slow(int):
        """Time to be interrupted by another thread between reading a count and writing it."""

        def __add__(self, other: int) -> int:
            time.sleep(0.01)
            return Slow(int(self) + other)

    split._calls = Slow(0)

    def call() -> None:
        start.wait(TIMEOUT)
        assert split(torch.ones(2))[0].tolist() == [2, 2]

    in_threads(*[call] * 8)
    assert len(compilations) == 1
