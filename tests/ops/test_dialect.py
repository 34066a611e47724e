"""What every op of the dialect has: a description, a type, and a reference that leaves its operands as they are."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

import tqc.ops
from tests.lowering.common import drawn
from tests.ops.common import OPS, draw_calls
from tqc.format import PackedFormat
from tqc.ops import Op, PackedValue, Planes, set_example

KEYS, VALUES = PackedFormat(16, 3, True, 4, 32), PackedFormat(24, 2, False, 4, 32)


def type_of(held: Any, mode: FakeTensorMode) -> Any:
    """Example of what an op takes or makes."""
    if isinstance(held, tuple):
        return tuple(type_of(part, mode) for part in held)
    if isinstance(held, Planes):
        batch, heads = held.dense.shape[:2]
        return PackedValue(held.fmt, batch, heads, held.length, held.dense.dtype, held.dense.device)
    return mode.from_tensor(held) if isinstance(held, Tensor) else held


def facts(example: Any) -> Any:
    """What two examples of the same type agree in."""
    if isinstance(example, tuple):
        return tuple(map(facts, example))
    if isinstance(example, PackedValue):
        return example
    strides = [stride for size, stride in zip(example.shape, example.stride(), strict=True) if size > 1]
    return example.shape, example.dtype, example.device, strides if example.numel() else None


def contents(arguments: dict[str, Any]) -> dict[str, list[Tensor]]:
    """Copies of the bytes of every operand."""
    parts = {name: held.parts if isinstance(held, Planes) else [held] for name, held in arguments.items()}
    return {
        name: [part.contiguous().view(torch.uint8).clone() for part in held if isinstance(part, Tensor)]
        for name, held in parts.items()
    }


class TestEveryOp:
    def test_there_are_thirteen(self):
        assert {op.__name__ for op in OPS} == {
            "adopt", "attend", "extend", "fold", "fork", "pack", "read", "rewind", "score", "unfold", "update",
            "window", "write"
        }  # fmt: skip

    @pytest.mark.parametrize("op", OPS, ids=repr)
    def test_has_its_parts(self, op: Op):
        assert callable(op.reference) and callable(op.fake)
        assert callable(op.traceable) or op is tqc.ops.adopt
        assert set(op.consumes) <= set(op.signature.parameters)

    @pytest.mark.parametrize("op", OPS, ids=repr)
    def test_is_described(self, op: Op):
        assert op.__doc__
        _, arguments, rest = re.split(r"\n\s+(?:Args|Returns):\n", op.__doc__)
        for name in op.signature.parameters:
            assert re.search(rf"^\s+([\w, ]+, )?{name}(, [\w, ]+)?: ", arguments, re.M), name
        assert rest.strip()

    @pytest.mark.parametrize("op", OPS, ids=repr)
    def test_schema_names_every_argument(self, op: Op):
        assert op.schema.startswith(f"{op.__name__}(") and "'" not in op.schema
        assert all(f"{name}: " in op.schema for name in op.signature.parameters)

    def test_schema(self):
        assert tqc.ops.extend.schema == (
            "extend(cache: Packed, new: Tensor, query: Tensor | None = None, score: Tensor | None = None, "
            "state_rows: Tensor | None = None) -> Packed"
        )
        assert tqc.ops.rewind.schema == "rewind(cache: Packed, length: int) -> Packed"


@given(data=st.data())
@settings(drawn, max_examples=25)
def test_fakes_know_the_type_that_the_reference_makes(data):
    mode = FakeTensorMode()
    for op, arguments in draw_calls(data, [8, 64, 80, 96, 128, 256]):
        made = type_of(op(**arguments), mode)
        node = op_node(op, **{name: type_of(held, mode) for name, held in arguments.items()})
        with mode:
            set_example(node, made)
            assert op.why_not(node) is None
            fake = op.fake(**{name: tqc.ops.example(held) for name, held in op.arguments(node).items()})
        assert facts(fake) == facts(made), op


@given(data=st.data())
@settings(drawn, max_examples=20)
def test_operands_stay_as_they_are(data):
    for op, arguments in draw_calls(data, [8, 16, 24], longest=70):
        before = contents(arguments)
        for form in filter(None, (op.reference, op.traceable)):
            form(**arguments)
            after = contents(arguments)
            for name, parts in before.items():
                assert all(map(torch.equal, parts, after[name])), f"{op} writes into {name}"


def op_node(op: Op, *args: Any, **kwargs: Any) -> Any:
    """A node of `op` whose operands are inputs with these examples, or constants."""
    graph = Graph()

    def operand(held: Any) -> Any:
        if not isinstance(held, (Tensor, PackedValue)):
            return held
        node = graph.placeholder("x")
        set_example(node, held)
        return node

    args, kwargs = tuple(map(operand, args)), {name: operand(held) for name, held in kwargs.items()}
    return graph.call_function(op, args, kwargs)


class TestWrite:
    """Of a cache that holds all tokens dense, so that it reads as the dense one that `index_copy` writes."""

    def dense(self) -> Tensor:
        return torch.arange(30.0).reshape(1, 1, 30, 1).expand(1, 1, 30, 16).contiguous()

    def cache(self) -> Planes:
        return tqc.ops.pack(self.dense(), KEYS.spec, capacity=30)

    @pytest.mark.parametrize("mask, shown", [(None, 10), (torch.ones(1, 30, dtype=torch.bool), 30)])
    @pytest.mark.parametrize(
        "positions, counted",
        [(7, False), (torch.arange(7, 10), False), (torch.arange(7, 10), True), (torch.tensor([7]), True)],
    )
    def test_consecutive_tokens(self, positions, counted, mask, shown):
        new = -torch.ones(1, 1, 3, 16)
        written = tqc.ops.read(tqc.ops.write(self.cache(), new, positions, mask, counted))
        expected = self.dense().index_copy(2, torch.arange(7, 10), new)
        expected[:, :, shown:] = 0
        assert torch.equal(written, expected)

    def test_tokens_here_and_there(self):
        new, positions = normal_tokens(3), torch.tensor([9, 2, 5])
        written = tqc.ops.read(tqc.ops.write(self.cache(), new, positions))
        assert torch.equal(written, self.dense().index_copy(2, positions, new))

    @pytest.mark.parametrize("positions", [3, torch.tensor([3]), torch.arange(0)])
    def test_nothing_new_changes_nothing(self, positions):
        nothing = normal_tokens(0)
        for form in (tqc.ops.write, tqc.ops.write.traceable):
            assert torch.equal(tqc.ops.read(form(self.cache(), nothing, positions)), self.dense())
        query, cache = normal_tokens(1), self.cache()
        for form in (tqc.ops.attend, tqc.ops.attend.traceable):
            assert torch.equal(form(query, cache, cache, nothing, nothing, positions), form(query, cache, cache))

    @pytest.mark.parametrize(
        "positions", [28, -1, torch.arange(28, 31), torch.tensor([2, 30, 4]), torch.tensor([-1, 3, 2])]
    )
    def test_positions_outside_are_refused(self, positions):
        with pytest.raises(IndexError, match="of a cache of 30 tokens"):
            tqc.ops.write(self.cache(), normal_tokens(3), positions)


def normal_tokens(count: int) -> Tensor:
    return torch.randn(1, 1, count, 16, generator=torch.Generator().manual_seed(count))


class TestWhyNot:
    cache = PackedValue(KEYS, 1, 2, 100, torch.float32, torch.device("cpu"))
    new = torch.empty(1, 2, 5, 16)

    def why_not(self, op: Op, *args: Any, made: Any, **kwargs: Any) -> str | None:
        node = op_node(op, *args, **kwargs)
        set_example(node, made)
        return op.why_not(node)

    def test_a_node_that_fits(self):
        assert self.why_not(tqc.ops.extend, self.cache, self.new, made=self.cache.longer(5)) is None
        assert self.why_not(tqc.ops.extend, self.cache, new=self.new, made=self.cache.longer(5)) is None

    def test_arguments_that_do_not_fit_the_signature(self):
        assert self.why_not(tqc.ops.extend, self.cache, made=self.cache) == "missing a required argument: 'new'"
        assert self.why_not(tqc.ops.read, self.cache, 3, made=None) == "too many positional arguments"
        assert "unexpected keyword argument 'length'" in self.why_not(tqc.ops.read, self.cache, length=3, made=None)

    @pytest.mark.parametrize(
        "op, args, reason",
        [
            (tqc.ops.extend, (new, new), "cache must be Packed, got Tensor"),
            (tqc.ops.extend, (cache, cache), "new must be Tensor, got PackedValue"),
            (tqc.ops.rewind, (cache, 1.5), "length must be int, got float"),
            (tqc.ops.rewind, (cache, None), "length must be int, got NoneType"),
            (tqc.ops.write, (cache, new, 3, 4), "attn_mask must be Tensor or NoneType, got int"),
            (tqc.ops.update, ("x", cache), "cache must be Packed or Tensor, got str"),
            (tqc.ops.fold, (new, 7), "spec must be str, got int"),
        ],
    )
    def test_arguments_of_the_wrong_kind(self, op, args, reason):
        assert self.why_not(op, *args, made=None) == reason

    def test_an_operand_without_an_example(self):
        node = op_node(tqc.ops.attend, self.new, self.cache, self.cache, key=self.new)
        set_example(node.kwargs["key"], None)
        assert tqc.ops.attend.why_not(node) == "key has no example"

    def test_arguments_that_the_op_refuses(self):
        assert "malformed spec" in self.why_not(tqc.ops.pack, self.new, "tq2:x", made=self.cache)
        growing = self.why_not(tqc.ops.pack, self.new, KEYS.spec, torch.tensor([3]), made=self.cache)
        assert growing == "start must be a number where the cache grows: its length must not depend on data"
        assert self.why_not(tqc.ops.pack, self.new[0, 0, 0], KEYS.spec, made=self.cache)

    @pytest.mark.parametrize(
        "made, reason",
        [
            (cache, "its shape must be torch.Size([1, 2, 105, 16]), got torch.Size([1, 2, 100, 16])"),
            (PackedValue(KEYS, 1, 2, 105, torch.float16, cache.device), "its dtype must be torch.float32, got torch."),
            (PackedValue(KEYS, 1, 2, 105, cache.dtype, torch.device("meta")), "its device must be cpu, got meta"),
            (
                PackedValue(PackedFormat(16, 4, True), 1, 2, 105, cache.dtype, cache.device),
                "its fmt must be tq2:d16:b3",
            ),
            (torch.empty(1, 2, 105, 16), "its result must be PackedValue, got Tensor"),
            (None, "its result must be PackedValue, got NoneType"),
        ],
    )
    def test_a_wrong_example_of_the_result(self, made, reason):
        assert self.why_not(tqc.ops.extend, self.cache, self.new, made=made).startswith(reason)

    def test_a_wrong_example_among_several_results(self):
        given = (torch.empty(1, 4, 5, 16), self.cache, PackedValue(VALUES, 1, 2, 100, self.new.dtype, self.new.device))
        out, lse = torch.empty(1, 4, 5, 24), torch.empty(1, 4, 5)
        assert self.why_not(tqc.ops.attend, *given, return_lse=True, made=(out, lse)) is None
        assert self.why_not(tqc.ops.attend, *given, made=out) is None
        wrong = {
            (out, lse.half()): "its dtype must be torch.float32, got torch.float16",
            (out,): "it must have 2 results, got 1",
            out: "its result must be tuple, got Tensor",
        }
        for made, reason in wrong.items():
            assert self.why_not(tqc.ops.attend, *given, return_lse=True, made=made) == reason
