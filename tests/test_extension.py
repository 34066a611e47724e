"""What an addition takes: an op is one file, a pass is one file and its place in the list, a provider is one file."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import tqc
import tqc.lowering
from tests.common import OPTIONS
from tests.passes.common import compiled, notes, only_site, packed, tensors
from tqc import ops, passes
from tqc.cache.packed_tensor import PackedTensor
from tqc.lowering import select
from tqc.ops import PackedValue, Planes, op
from tqc.ops.interpret import interpret
from tqc.ops.text import graph_text
from tqc.passes.edit import insert
from tqc.passes.plan import FUSE, Plan
from tqc.passes.verify import InvalidGraph

# --- An op, as a file of tqc/ops would hold it -----------------------------------------------------------------------


@op()
def fade(output: Tensor, cache: Planes, rate: float = 0.5) -> Tensor:
    """Output of attention, the smaller the more tokens its cache holds."""
    return output / (1 + rate * int(cache.state[0]))


@fade.register_fake
def _(output: Tensor, cache: PackedValue, rate: float) -> Tensor:
    return torch.empty_like(output)


@fade.register_traceable
def _(output: Tensor, cache: Planes, rate: float = 0.5) -> Tensor:
    return output / (1 + rate * cache.state[0])


# --- Passes that put it behind attention -----------------------------------------------------------------------------


def fade_output(gm: GraphModule, plan: Plan) -> int:
    """out = attend(query, k_cache, ...)  ->  out = fade(attend(query, k_cache, ...), keys)"""
    attends = gm.graph.find_nodes(op="call_function", target=ops.attend)
    for attend in attends:
        keys = next(user for user in attend.args[1].users if user.target is ops.extend)
        with gm.graph.inserting_before(gm.graph.output_node()):
            faded = insert(gm.graph, fade, attend, keys, 0.25)
        attend.replace_all_uses_with(faded, lambda user, faded=faded: user is not faded)
    return len(attends)


def fade_by_old_keys(gm: GraphModule, plan: Plan) -> int:
    return _misuse(gm, plan, lambda attend: (attend, attend.args[1]))


def fade_by_dense_keys(gm: GraphModule, plan: Plan) -> int:
    return _misuse(gm, plan, lambda attend: (attend, attend.args[3]))


def fade_by_nothing(gm: GraphModule, plan: Plan) -> int:
    return _misuse(gm, plan, lambda attend: (attend,))


def _misuse(gm: GraphModule, plan: Plan, operands: Callable[[Node], tuple[Any, ...]]) -> int:
    count = fade_output(gm, plan)
    for faded in gm.graph.find_nodes(op="call_function", target=fade):
        faded.args = operands(faded.args[0])
    return count


def step(query: Tensor, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor) -> Any:
    """One attention step over growing caches."""
    keys, values = torch.cat([k_cache, key], dim=-2), torch.cat([v_cache, value], dim=-2)
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True), keys, values


def planes(cache: PackedTensor) -> Planes:
    return Planes(cache.pages.clone(), cache.dense.clone(), cache.state.clone(), cache.fmt, cache.shape[2])


@pytest.fixture
def step_inputs() -> tuple[Any, ...]:
    query, key, value, *caches = tensors(past=80)
    return query, key, value, *packed(*caches)


def test_an_op_needs_no_other_file(step_inputs: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify`, text, interpreter and torch take it, and all with the same numbers."""
    with compiled(step) as (run, _):
        plain = run(*step_inputs)[0]

    kept: list[GraphModule] = []

    def keep(gm: GraphModule, requested: str) -> Any:
        kept.append(copy.deepcopy(gm))
        return realize(gm, requested)

    realize = tqc.backend.realize
    monkeypatch.setattr("tqc.backend.realize", keep)
    monkeypatch.setattr(passes, "PASSES", [*passes.PASSES, fade_output])
    given = [planes(x) if isinstance(x, PackedTensor) else x for x in step_inputs]
    with compiled(step) as (run, plans):
        out, keys, values = run(*step_inputs)
    assert plans[0].rewritten["fade_output"] == 1 and only_site(plans).action == FUSE
    torch.testing.assert_close(out, plain / (1 + 0.25 * 81))
    assert isinstance(keys, PackedTensor) and keys.shape[2] == 81

    (graph,) = kept
    assert "fade: float32[2, 4, 1, 16] cpu" in graph_text(graph.graph)
    assert "= tqai.fade(attend, extend, 0.25)\n" in graph_text(graph.graph)

    # As dynamo orders its inputs: by first use, the length of the cache among them.
    by_name = dict(zip(("query", "key", "value", "k_cache", "v_cache"), given, strict=True))
    names = [node.name.removeprefix("l_").removesuffix("_") for node in graph.graph.find_nodes(op="placeholder")]
    (meant, meant_keys, _), updates = interpret(graph, *(by_name.get(name, 80) for name in names))
    torch.testing.assert_close(out, meant)
    assert meant_keys.length == 81 and not updates

    assert fade.traceable
    torch.testing.assert_close(fade.traceable(plain, meant_keys, 0.25), meant)


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (fade_by_old_keys, "it uses l_k_cache_, which extend has consumed"),
        (fade_by_dense_keys, "cache must be Packed, got FakeTensor"),
        (fade_by_nothing, "missing a required argument: 'cache'"),
    ],
)
def test_a_wrong_use_of_an_op_is_refused(
    wrong: Any, reason: str, step_inputs: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "PASSES", [*passes.PASSES, wrong])
    with compiled(step) as (run, _), pytest.raises(Exception) as raised:
        run(*step_inputs)
    error = _cause(raised.value)
    assert isinstance(error, InvalidGraph)
    first, graph = str(error).split("\n", 1)
    assert first == f"after pass {wrong.__name__}, node fade is invalid: {reason}"
    assert "tqai.fade(attend" in graph


# --- A provider ------------------------------------------------------------------------------------------------------

TOY = """
from types import SimpleNamespace
from tqc.lowering.provider import Provider, Unavailable
from tqc.ops import planes

calls = []

def attend(*args):
    calls.append("attend")
    return planes.attend(*args)

def append(*args):
    calls.append("append")
    return planes.append(*args)

def supports(k_fmt, v_fmt, dtype, device_type):
    return None if device_type == "cpu" else "runs on cpu only"

def load():
    return SimpleNamespace(attend=attend, append=append, read=planes.read)

PROVIDER = Provider("toy", rank=1, supports=supports, load=load, folded=True)
"""
BROKEN = TOY.replace("    return SimpleNamespace", "    raise Unavailable('no toys here')\n    return SimpleNamespace")


@pytest.fixture
def add_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Writes the file of a provider beside those of `lowering/`."""

    def forget() -> None:
        sys.modules.pop("tqc.lowering.toy", None)
        vars(tqc.lowering).pop("toy", None)
        select.providers.cache_clear()
        select._warn.cache_clear()

    def add(text: str) -> None:
        (tmp_path / "toy.py").write_text(text)
        monkeypatch.setattr(tqc.lowering, "__path__", [*tqc.lowering.__path__, str(tmp_path)])
        forget()

    yield add
    monkeypatch.undo()
    forget()
    assert "toy" not in [provider.name for provider in select.providers()]


class Step(nn.Module):
    def forward(self, *args: Tensor) -> Any:
        return step(*args)


def toy_calls() -> list[str]:
    return sys.modules["tqc.lowering.toy"].calls


def test_a_provider_is_one_file(add_toy: Callable[[str], None], step_inputs: tuple[Any, ...]) -> None:
    add_toy(TOY)
    with compiled(step, provider="toy") as (run, plans):
        run(*step_inputs)
    assert only_site(plans).kernel == "toy" and toy_calls() == ["attend", "append", "append"]
    explained = tqc.explain(Step(), *step_inputs, options={**OPTIONS, "provider": "toy"})
    assert [site["kernel"] for site in explained.graphs[0]] == ["toy"]
    assert "│ toy " in str(explained)


def test_auto_takes_the_provider_of_the_lowest_rank(
    add_toy: Callable[[str], None], step_inputs: tuple[Any, ...]
) -> None:
    add_toy(TOY)
    with compiled(step, provider="auto") as (run, plans):
        run(*step_inputs)
    assert only_site(plans).kernel == "toy" and toy_calls()


def test_a_named_provider_never_falls_back(add_toy: Callable[[str], None], step_inputs: tuple[Any, ...]) -> None:
    add_toy(BROKEN)
    with compiled(step, provider="toy") as (run, _), pytest.raises(Exception) as raised:
        run(*step_inputs)
    error = _cause(raised.value)
    assert isinstance(error, ValueError)
    assert str(error) == "provider 'toy' cannot be used: toy: no toys here"


def test_auto_falls_back_with_one_warning(add_toy: Callable[[str], None], caplog: pytest.LogCaptureFixture) -> None:
    """Here past the CPU kernels too, which take no head_dim of 520 and say so without a warning."""
    add_toy(BROKEN)
    query, key, value, *caches = tensors(batch=1, past=40, head_dim=520)
    with caplog.at_level(logging.WARNING, "tqc"):
        for _ in range(2):
            with compiled(step, provider="auto") as (run, plans):
                run(query, key, value, *packed(*caches))
            assert only_site(plans).kernel == "reference"
            assert "toy: no toys here" in notes(plans) and "cpu: takes a head_dim of at most 512" in notes(plans)
    assert [record.getMessage() for record in caplog.records] == [
        "the 'toy' kernels cannot be used, slower ones run instead: no toys here"
    ]


@pytest.mark.parametrize(
    "text, names", [(TOY, "auto, triton, toy, cpu, reference"), (None, "auto, triton, cpu, reference")]
)
def test_an_unknown_provider_is_one_error_with_the_names(
    text: str | None, names: str, add_toy: Callable[[str], None], step_inputs: tuple[Any, ...]
) -> None:
    if text:
        add_toy(text)
    with compiled(step, provider="toi") as (run, _), pytest.raises(Exception) as raised:
        run(*step_inputs)
    error = _cause(raised.value)
    assert isinstance(error, ValueError) and str(error) == f"provider must be one of {names}; got 'toi'"


def _cause(error: BaseException) -> BaseException:
    """What a backend raised, without dynamo around it."""
    return error.__cause__ or getattr(error, "inner_exception", error)
