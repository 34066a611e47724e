"""CUDA graphs without CUDA: what a step does is written down, not done, and done at each replay on the same memory.

While recording, an operation that writes to its arguments is skipped, and so is every Triton kernel, as on a stream
that captures; a value that the host reads is an error, as it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from tqc.execute import cuda_graphs, instructions
from tqc.lowering import reference, select
from tqc.lowering.triton import PROVIDER, kernels


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`."""

    made: list[Graph] = []

    def __init__(self) -> None:
        self.operations: list[Callable[[], None]] = []
        self.replays = 0
        Graph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        for operation in self.operations:
            operation()


class _Capture(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        schema = func._schema
        if schema.is_mutable:
            self.graph.operations.append(lambda: func(*args, **kwargs))
            return args[0]
        result = func(*args, **kwargs)
        if any(output.alias_info for output in schema.returns):
            return result  # a view: nothing to do

        def again() -> None:
            fresh = pytree.tree_leaves(func(*args, **kwargs))
            for old, new in zip(pytree.tree_leaves(result), fresh, strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

        self.graph.operations.append(again)
        return result


@contextmanager
def graph(recorded: Graph, pool: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    """Stands in for `torch.cuda.graph`."""
    launch = GridExecutor.__call__

    def write_down(self: Any, *args: Any, **kwargs: Any) -> None:
        recorded.operations.append(lambda: launch(self, *args, **kwargs))

    GridExecutor.__call__ = write_down
    try:
        with _Capture(recorded):
            yield
    finally:
        GridExecutor.__call__ = launch


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """CPU tensors count as a GPU's, Triton as its provider; yields the graphs that get made."""
    Graph.made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(cuda_graphs, "DEVICE", "cpu")
    monkeypatch.setattr(instructions, "_on_host", lambda x: False)
    stand_in = replace(PROVIDER, supports=lambda *_: None, load=lambda: kernels)
    monkeypatch.setattr(select, "providers", lambda: [stand_in, reference.PROVIDER])
    return Graph.made
