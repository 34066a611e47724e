"""`verify` refuses each fault that a pass can make, and says which pass, which node and why, with the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from tqc import ops
from tqc.format import PackedFormat
from tqc.ops import PackedValue, example, set_example
from tqc.passes.edit import insert, update_input
from tqc.passes.graph import calls
from tqc.passes.verify import InvalidGraph, verify

FMT = PackedFormat(16, 4, True, 4, 32)
CACHE = PackedValue(FMT, 1, 2, 40, torch.float32, torch.device("cpu"))


class Step:
    """A decode step under construction: its inputs, and a way to put nodes with any example behind them."""

    def __init__(self) -> None:
        self.graph = Graph()
        with FakeTensorMode():
            self.query, self.new = (self.input(name, torch.empty(1, 2, 1, 16)) for name in ("query", "new"))
        self.keys, self.values = (self.input(name, CACHE) for name in ("keys", "values"))

    def input(self, name: str, held: Any) -> Node:
        node = self.graph.placeholder(name)
        set_example(node, held)
        return node

    def insert(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return insert(self.graph, target, *args, **kwargs)

    def raw(self, target: Any, *args: Any, held: Any, **kwargs: Any) -> Node:
        """A node as a wrong pass would leave it."""
        node = self.graph.create_node(
            "call_method" if isinstance(target, str) else "call_function", target, args, kwargs
        )
        set_example(node, held)
        return node

    def finish(self, *results: Node) -> GraphModule:
        self.graph.output(results)
        return GraphModule(torch.nn.Module(), self.graph)


def attend(step: Step) -> Node:
    return step.insert(ops.attend, step.query, step.keys, step.values, step.new, step.new)


def test_a_step_of_the_dialect_is_valid() -> None:
    """Growing caches, and a preallocated one that an update puts back, though a write has consumed it."""
    step = Step()
    out = attend(step)
    results = out, step.insert(ops.extend, step.keys, step.new)
    written = step.insert(ops.write, step.values, step.new, 3)
    gm = step.finish(*results, step.raw("size", written, 2, held=40), step.insert(ops.read, written))
    update_input(step.values, written)
    verify(gm, "a_pass")


def test_a_part_of_several_results_is_valid() -> None:
    step = Step()
    dense = step.input("dense", example(step.insert(ops.read, step.keys)))
    adopted = step.insert(ops.adopt, dense, dense, 0, 40, None, FMT.spec, FMT.spec)
    parts = [step.insert(operator.getitem, adopted, index) for index in (0, 1)]
    verify(step.finish(*parts), "a_pass")


def extended(cache: PackedValue = CACHE, **changes: Any) -> PackedValue:
    return replace(cache.longer(1), **changes)


FAULTS: dict[str, tuple[Callable[[Step], Node], str]] = {
    "too few operands": (
        lambda s: s.raw(ops.extend, s.keys, held=extended()),
        "missing a required argument: 'new'",
    ),
    "too many operands": (
        lambda s: s.raw(ops.extend, s.keys, s.new, *[None] * 4, held=extended()),
        "too many positional arguments",
    ),
    "a name that the op has not": (
        lambda s: s.raw(ops.extend, s.keys, s.new, where=1, held=extended()),
        "got an unexpected keyword argument 'where'",
    ),
    "a dense tensor for a cache": (
        lambda s: s.raw(ops.extend, s.new, s.new, held=extended()),
        "cache must be Packed, got FakeTensor",
    ),
    "a cache for a dense tensor": (
        lambda s: s.raw(ops.extend, s.keys, s.values, held=extended()),
        "new must be Tensor, got PackedValue",
    ),
    "a number for an optional tensor": (
        lambda s: s.raw(ops.attend, s.query, s.keys, s.values, attn_mask=3, held=example(s.query)),
        "attn_mask must be Tensor or NoneType, got int",
    ),
    "no type recorded": (
        lambda s: s.raw(ops.extend, s.keys, s.new, held=None),
        "its result must be PackedValue, got NoneType",
    ),
    "a dense type for a cache": (
        lambda s: s.raw(ops.extend, s.keys, s.new, held=example(s.query)),
        "its result must be PackedValue, got FakeTensor",
    ),
    "a cache of another length": (
        lambda s: s.raw(ops.extend, s.keys, s.new, held=extended(length=40)),
        "its shape must be torch.Size([1, 2, 41, 16]), got torch.Size([1, 2, 40, 16])",
    ),
    "a cache of another format": (
        lambda s: s.raw(ops.extend, s.keys, s.new, held=extended(fmt=replace(FMT, bits=3))),
        f"its fmt must be {FMT}, got {replace(FMT, bits=3)}",
    ),
    "a cache of another dtype": (
        lambda s: s.raw(ops.extend, s.keys, s.new, held=extended(dtype=torch.bfloat16)),
        "its dtype must be torch.float32, got torch.bfloat16",
    ),
    "an output of another shape": (
        lambda s: s.raw(ops.attend, s.query, s.keys, s.values, held=torch.empty(1, 2, 7, 16)),
        "its shape must be torch.Size([1, 2, 1, 16]), got torch.Size([1, 2, 7, 16])",
    ),
    "one result of two": (
        lambda s: s.raw(ops.attend, s.query, s.keys, s.values, return_lse=True, held=(example(s.query),)),
        "it must have 2 results, got 1",
    ),
    "a function of tqc that is no op": (
        lambda s: s.raw(calls, s.query, held=True),
        "calls is no op of the dialect",
    ),
    "an update of what is no input": (
        lambda s: s.raw(ops.update, s.insert(ops.extend, s.keys, s.new), s.values, held=CACHE),
        "what it updates is no input of the graph",
    ),
    "an update by names alone, which targets do not read": (
        lambda s: s.raw(ops.update, cache=s.keys, new=s.values, held=CACHE),
        "what it updates is no input of the graph",
    ),
    "an update of nothing": (
        lambda s: s.raw(ops.update, held=CACHE),
        "what it updates is no input of the graph",
    ),
}


def reason_of(gm: GraphModule, node: Node, finished: bool = True) -> str:
    """Why `verify` refuses a graph, which must be because of this node."""
    with pytest.raises(InvalidGraph) as raised:
        verify(gm, "a_pass", finished)
    first, text = str(raised.value).split("\n", 1)
    start = f"after pass a_pass, node {node.name} is invalid: "
    assert first.startswith(start)
    assert text.startswith("graph(\n    query: float32[1, 2, 1, 16] cpu,") and f"    {node.name}: " in text
    return first.removeprefix(start)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("finished", [False, True])
def test_a_fault_of_one_node(fault: str, finished: bool) -> None:
    make, reason = FAULTS[fault]
    step = Step()
    node = make(step)
    assert reason_of(step.finish(node), node, finished) == reason


TORCH: dict[str, tuple[Callable[[Step], Node], str]] = {
    "a function": (
        lambda s: s.raw(torch.cat, [s.keys, s.new], -2, held=torch.empty(1, 2, 41, 16)),
        "a torch op takes a packed cache",
    ),
    "a method": (
        lambda s: s.raw("transpose", s.keys, 1, 2, held=torch.empty(1, 40, 2, 16)),
        "a torch op takes a packed cache",
    ),
    "by name": (
        lambda s: s.raw(torch.add, s.new, other=s.keys, held=torch.empty(1, 2, 40, 16)),
        "a torch op takes a packed cache",
    ),
    "as a result, out of nothing": (
        lambda s: s.raw(torch.empty, held=CACHE),
        "a torch op makes a packed cache",
    ),
    "as a result": (
        lambda s: s.raw(torch.neg, s.new, held=CACHE),
        "a torch op makes a packed cache",
    ),
}


@pytest.mark.parametrize("case", TORCH)
def test_torch_ops_may_take_packed_caches_until_the_last_pass(case: str) -> None:
    make, reason = TORCH[case]
    step = Step()
    node = make(step)
    gm = step.finish(node)
    verify(gm, "a_pass", finished=False)
    assert reason_of(gm, node) == reason


@pytest.mark.parametrize(
    "measure, held", [(("size",), torch.Size((1, 2, 40, 16))), (("size", 2), 40), (("dim",), 4)], ids=str
)
def test_a_cache_may_be_measured(measure: tuple[Any, ...], held: Any) -> None:
    step = Step()
    name, *args = measure
    verify(step.finish(step.raw(name, step.keys, *args, held=held)), "a_pass")


USES: dict[str, Callable[[Step], Node]] = {
    "attend": attend,
    "read": lambda s: s.insert(ops.read, s.keys),
    "extend": lambda s: s.insert(ops.extend, s.keys, s.new),
    "size": lambda s: s.raw("size", s.keys, 2, held=40),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("finished", [False, True])
def test_a_cache_is_not_used_behind_what_consumes_it(use: str, finished: bool) -> None:
    step = Step()
    early = USES[use](step) if use != "extend" else None
    consumer = step.insert(ops.extend, step.keys, step.new)
    results = [consumer] + ([early] if early else [])
    node = USES[use](step)
    graph = step.finish(*results, node)
    if use == "size" and not finished:  # `read_cache` has not run yet
        verify(graph, "p", finished)
        return
    assert reason_of(graph, node, finished) == f"it uses keys, which {consumer.name} has consumed"


def test_a_consumed_cache_is_not_returned() -> None:
    step = Step()
    longer = step.insert(ops.extend, step.keys, step.new)
    gm = step.finish(longer, step.keys)
    with pytest.raises(InvalidGraph, match="node output is invalid: it uses keys, which extend has consumed"):
        verify(gm, "a_pass")


def test_a_consumed_cache_is_not_what_an_input_becomes() -> None:
    """An update may name a consumed input as what changes, not as what it becomes."""
    step = Step()
    step.insert(ops.write, step.keys, step.new, 3)
    node = step.raw(ops.update, step.values, step.keys, held=CACHE)
    assert reason_of(step.finish(), node) == "it uses keys, which write has consumed"


def test_nothing_stands_behind_an_update() -> None:
    step = Step()
    written = step.insert(ops.write, step.keys, step.new, 3)
    step.insert(ops.update, step.keys, written)
    node = step.insert(torch.neg, step.query)
    assert reason_of(step.finish(node), node) == "it stands behind an update"


def test_several_updates_stand_at_the_end() -> None:
    step = Step()
    written = [step.insert(ops.write, cache, step.new, 3) for cache in (step.keys, step.values)]
    gm = step.finish()
    for cache, new in zip((step.keys, step.values), written, strict=True):
        update_input(cache, new)
    verify(gm, "a_pass")


def test_an_input_that_was_dense_may_become_packed() -> None:
    step = Step()
    dense: Tensor = example(step.insert(ops.read, step.keys))
    given = step.input("given", dense)
    packed = step.insert(ops.pack, given, FMT.spec, None, 40)
    gm = step.finish()
    update_input(given, packed)
    verify(gm, "a_pass")
