"""In-place writes into views, with attention between: a graph cut into compiled regions computes what it says."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.common import OPTIONS
from tests.passes.common import packed, tensors
from tqc import report
from tqc.execute import regions
from tqc.ops.effects import written
from tqc.passes.plan import FUSE
from tqc.torch_private import pytree

CALLS = 3  # the first runs eagerly, the second compiles
HEADS, DIM = 2, 16
SHAPE = (1, HEADS, 1, DIM)

Step = tuple[str, int, int]
# Of one value: a new one, a view, or a write; `other` is another value, of any shape.
FRESH: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, other: x * 1.5 + other.mean(),
    lambda x, other: torch.tanh(x),
    lambda x, other: x.clone(),
    lambda x, other: x + 0,
]
VIEWS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, other: x.view(-1) if x.is_contiguous() else x.reshape(-1),
    lambda x, other: x.reshape(1, -1),
    lambda x, other: x[..., ::2],
    lambda x, other: x.detach(),
    lambda x, other: x.chunk(2, -1)[-1],
    lambda x, other: x.transpose(0, -1),
    lambda x, other: x.contiguous(),
    lambda x, other: x.expand_as(x),
]
WRITES: list[Callable[[Tensor, Tensor], Any]] = [
    lambda x, other: x.add_(other.mean()),
    lambda x, other: x.mul_(0.5).sub_(1),
    lambda x, other: x.__setitem__(..., other.mean()),
    lambda x, other: F.relu(x, inplace=True),
    lambda x, other: F.silu(x, True),
    lambda x, other: torch.add(x, 1, out=x),
    lambda x, other: x.__iadd__(other.mean()),
    lambda x, other: torch._foreach_add_([x], 0.5),
    lambda x, other: x.copy_(other.reshape(-1)[:1].clone()),
]
KINDS = {"fresh": FRESH, "view": VIEWS, "write": WRITES, "attend": [None]}


def program(steps: list[Step]) -> Callable[..., Any]:
    """A function of dense inputs and of two caches that are attended to once each; all values are returned."""

    def run(inputs: list[Tensor], new: tuple[Tensor, Tensor], caches: list[tuple[Tensor, Tensor]]) -> Any:
        values, grown = list(inputs), []
        for kind, choice, operand in [*steps, ("attend", 0, 0), ("attend", 0, 1)]:
            x, other = values[-1 - operand % len(values)], values[choice % len(values)]
            if kind != "attend":
                options: Any = KINDS[kind]
                made = options[choice % len(options)](x, other)
                values += [made] if isinstance(made, Tensor) else []
            elif len(grown) < len(caches):
                keys, vals = (torch.cat([past, y], 2) for past, y in zip(caches[len(grown)], new, strict=True))
                values.append(F.scaled_dot_product_attention(x.reshape(-1)[:1] * new[0], keys, vals))
                grown.append((keys, vals))
        return values, grown

    return run


def outcomes(steps: list[Step], alias: bool, rest: str) -> list[list[Tensor]]:
    """What each of some calls returns, and what it leaves in its inputs."""
    torch._dynamo.reset()
    step = torch.compile(program(steps), backend="tqai", options={**OPTIONS, "rest": rest}, dynamic=False)
    _, key, value, past_keys, past_values = tensors(batch=1, heads=HEADS, query_heads=HEADS, past=40, head_dim=DIM)
    found = []
    with report.collect() as plans, torch.no_grad():
        for call in range(CALLS):
            inputs = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(2 * call + i)) for i in range(2)]
            inputs += [inputs[0].view(-1)] if alias else []
            caches = [packed(past_keys, past_values) for _ in range(2)]
            values, grown = step(inputs, (key, value), caches)
            # A caller may write, too, and sees it in views.
            values[-1].add_(1)
            seen = [*inputs, *values, *(x.dequantize() for x in pytree.tree_leaves(grown))]
            found.append([x.clone() for x in seen])
    last = [plan for plan in plans if plan.sites][-1]  # dynamo breaks the graph at some writes
    assert {site.action for site in last.sites} == {FUSE}, [str(site) for site in last.sites]
    return found


def compare(steps: list[Step], alias: bool) -> None:
    pairs = zip(outcomes(steps, alias, "inductor"), outcomes(steps, alias, "eager"), strict=True)
    for call, (actual, expected) in enumerate(pairs):
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert torch.allclose(a, b, atol=1e-4, rtol=1e-4), f"call {call}: {index} is {a}, not {b}"


@pytest.fixture
def without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd does all that it does about aliases; in place of Inductor's code the graph itself runs."""

    def compile_fx_inner(gm: Any, inputs: Any, **_: Any) -> Any:
        def run(args: list[Any]) -> Any:
            return gm(*args)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_inner", compile_fx_inner)
    monkeypatch.setattr(regions.Region, "worth_a_wrapper", False)
    regions._compiled.clear()


def some(*kinds: str) -> st.SearchStrategy[list[Step]]:
    return st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, 40), st.integers(0, 5)), min_size=1, max_size=4)


PROGRAMS = st.tuples(some("fresh", "view", "write"), some("attend", "view"), some("write", "write", "fresh", "view"))


@pytest.mark.usefixtures("without_code")
def test_aliasing_graphs_equal_eager() -> None:
    @settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
    @given(PROGRAMS, st.booleans())
    def check(parts: tuple[list[Step], ...], alias: bool) -> None:
        compare(sum(parts, []), alias)

    check()
    regions._compiled.clear()


ISSUE: list[Step] = [("fresh", 0, 0), ("view", 0, 0), ("attend", 0, 0), ("write", 0, 1), ("fresh", 1, 3)]


@pytest.mark.usefixtures("without_code")
def test_a_view_that_is_written_behind_attention(caplog: pytest.LogCaptureFixture) -> None:
    compare(ISSUE, False)
    assert any("run uncompiled" in line for line in caplog.messages)
    regions._compiled.clear()


@pytest.mark.usefixtures("without_code")
def test_what_attention_returns_is_written_twice() -> None:
    """A pass has put another node in its place, so that examples do not tell."""
    compare([("attend", 0, 0), ("view", 0, 0), ("attend", 0, 1), ("write", 0, 1), ("fresh", 0, 2)], False)
    regions._compiled.clear()


@pytest.mark.slow
def test_with_the_code_of_inductor() -> None:
    compare(ISSUE, True)


@pytest.mark.usefixtures("without_code")
def test_ordinary_writes_stay_compiled(caplog: pytest.LogCaptureFixture) -> None:
    """One tensor comes into one region, where it is written, or all of them are made there."""
    within = [("fresh", 0, 0), ("view", 0, 0), ("write", 0, 0), ("fresh", 1, 1), ("attend", 0, 0), ("fresh", 0, 0)]
    caplog.set_level(logging.WARNING)
    compare(within, False)
    compare([("attend", 0, 0), ("write", 0, 1), ("fresh", 0, 1)], False)
    assert not any("run uncompiled" in line for line in caplog.messages)
    regions._compiled.clear()


@pytest.mark.parametrize("write", WRITES, ids=range(len(WRITES)))
def test_every_write_is_known(write: Callable[[Tensor, Tensor], Any]) -> None:
    graphs: list[Any] = []

    def keep(gm: Any, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x, other: (write(x, other), x.sum()), backend=keep)(torch.ones(4), torch.ones(4))
    first = next(node for node in graphs[0].graph.nodes if node.op == "placeholder")
    held = [target for node in graphs[0].graph.nodes for target in written(node)]
    assert any(target is first or target.name == first.name for target in held)


def test_what_asks_for_no_write_is_none() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.ones(2)
    for node in (
        graph.call_function(F.relu, (x, False)),
        graph.call_function(F.silu, (x,)),
        graph.call_method("relu", (x,)),
    ):
        assert not written(node)
