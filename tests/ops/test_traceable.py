"""The traceable forms do what the reference does, in static shapes and in few kinds of torch ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from tests.lowering.common import DTYPES, compare, draw_mask, drawn
from tests.ops.common import formats, tokens, with_room
from tqc.format import PackedFormat
from tqc.ops import Planes, attend, extend, fold, pack, read, rewind, unfold, update, write
from tqc.ops.planes import packed_pages

CAPACITY = 250


def same(actual: Planes, expected: Planes) -> None:
    """State, dense rows and pages in use, to the byte."""
    assert (actual.fmt, actual.length) == (expected.fmt, expected.length)
    assert actual.state.dtype == torch.int64 and actual.state.tolist() == expected.state.tolist()
    fmt, packed = expected.fmt, int(expected.state[1]) > 0
    rows = fmt.dense_rows if packed else min(fmt.token_rows, expected.dense.shape[2], actual.dense.shape[2])
    assert same_bytes(actual.dense[:, :, :rows], expected.dense[:, :, :rows])
    pages = [packed_pages(x.pages, x.state, int(x.state[0]), fmt)[0] for x in (actual, expected)]
    assert torch.equal(*pages)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class Session:
    """Keys and values that go through the same ops twice: as the reference has it, and by the traceable forms."""

    def __init__(self, data: st.DataObject, capacity: int | None) -> None:
        self.draw, self.capacity, self.count = data.draw, capacity, 0
        self.data = data
        dims, sinks = st.sampled_from([8, 16, 24]), self.draw(st.sampled_from([0, 4, 40]))
        self.keep = self.draw(st.sampled_from([None, None, 20, 70, 150])) if capacity is None else None
        common = {"head_dim": dims, "sink_tokens": st.just(sinks), "keep": st.just(self.keep)}
        k_fmt = self.draw(formats(**common))
        v_fmt = self.draw(formats(**common, centred=st.just(False), folded=st.booleans()))
        self.batch, self.heads, self.group = self.draw(st.integers(1, 2)), self.draw(st.integers(1, 2)), 2
        self.dtype = self.draw(st.sampled_from(DTYPES))
        self.room = capacity or self.draw(st.sampled_from([CAPACITY, CAPACITY, 34]))
        self.room = self.room if self.keep is None else 10_000  # enough for all pages of a window
        first = self.draw(st.sampled_from([0, 3, 26, 60, 150]).filter(lambda count: count + 2 <= self.room))
        start = self.draw(st.sampled_from([None, 0, 2]))
        self.reference, self.traced = [], []
        for fmt in (k_fmt, v_fmt):
            new = self.tokens(first, fmt)
            self.reference.append(pack(new, fmt.spec, start, capacity))
            traced = pack.traceable(new, fmt.spec, start, capacity)
            self.traced.append(with_room(traced, self.room) if capacity is None else traced)
        self.check()

    def tokens(self, count: int, fmt: PackedFormat) -> Tensor:
        self.count += 1
        return tokens(self.batch, self.heads, count, fmt, self.dtype, self.count)

    @property
    def length(self) -> int:
        return min(self.reference[0].length, int(self.reference[0].state[0] - self.reference[0].state[2]))

    def check(self) -> None:
        for actual, expected in zip(self.traced, self.reference, strict=True):
            same(actual, expected)
            assert same_bytes(read.traceable(actual), read(expected))

    def change(self, op: Any, *args: Any) -> None:
        """Both ways; of an argument that is a pair, each cache gets its own."""
        for index in (0, 1):
            own = [arg[index] if isinstance(arg, list) else arg for arg in args]
            self.reference[index] = op(self.reference[index], *own)
            self.traced[index] = op.traceable(self.traced[index], *own)
        self.check()

    def new(self, count: int) -> list[Tensor]:
        return [self.tokens(count, cache.fmt) for cache in self.reference]

    def extend(self) -> None:
        self.change(extend, self.new(self.draw(st.sampled_from([0, 1, 5, 33, 70]).filter(self.fits))))

    def fits(self, count: int) -> bool:
        return self.keep is not None or self.length + count <= self.room

    def rewind(self) -> None:
        self.change(rewind, self.draw(st.integers(max(0, self.length - 40), self.length) | st.integers(0, self.length)))

    def prefix(self) -> None:
        """A cache whose length is smaller than what is stored, as a slice of it has."""
        length = self.draw(st.integers(0, self.length))
        for caches in (self.reference, self.traced):
            caches[:] = [replace(cache, length=length) for cache in caches]
        self.check()

    def write(self) -> None:
        count = self.draw(st.sampled_from([0, 1, 1, 5, 33, 70]).filter(self.fits))
        first = self.draw(st.sampled_from([self.length, max(0, self.length - 9), self.length // 2, 0]))
        self.change(write, self.new(count), *self.positions(first, count))

    def positions(self, first: int, count: int) -> tuple[Any, Any, bool]:
        """As `write` takes them: positions, mask, and whether they are counted."""
        every = torch.arange(first, first + count)
        kinds = [(first, False), (every, False), (every, True), (torch.tensor([first]), True)]
        positions, counted = self.draw(st.sampled_from(kinds))
        return positions, None, counted

    def attend(self) -> None:
        rows = self.draw(st.sampled_from([1, 3]))
        count = self.draw(st.sampled_from([None, 0, 1, rows, rows, 40]).filter(lambda count: self.fits(count or 0)))
        key, value = (None, None) if count is None else self.new(count)
        query = tokens(self.batch, self.heads * self.group, rows, self.reference[0].fmt, self.dtype, self.count + 1)
        positions, counted, first = None, True, self.length
        if self.capacity is not None and count:
            # Also behind the stored tokens: a gap of zeros.
            gap = self.draw(st.integers(0, min(7, self.capacity - count - first)))
            first = self.draw(st.sampled_from([first, first + gap, first // 2]))
            positions, _, counted = self.positions(first, count)
        mask = self.mask(rows, first + (count or 0))
        sinks = torch.linspace(-2, 2, self.heads * self.group)
        given = {
            "key": key,
            "value": value,
            "positions": positions,
            "attn_mask": mask,
            "sinks": self.draw(st.sampled_from([None, sinks])),
            "scale": self.draw(st.sampled_from([0.25, 1.0])),
            "softcap": self.draw(st.sampled_from([0.0, 3.0])),
            "is_causal": self.draw(st.booleans()),
            "counted": counted,
            "return_lse": True,
        }
        expected, expected_lse = attend(query, *self.reference, **given)
        actual, lse = attend.traceable(query, *self.traced, **given)
        assert actual.stride() == expected.stride() and actual.dtype == self.dtype and lse.dtype == torch.float32
        compare(actual, expected, self.dtype)
        compare(lse, expected_lse, torch.float32)

    def mask(self, rows: int, end: int) -> Tensor | None:
        """Of any kind and width; it hides what a preallocated cache holds behind `end`, as an append wants it."""
        generator = torch.Generator().manual_seed(self.count)
        kind = self.draw(st.sampled_from(["any", "one column", "padding", "of the capacity"]))
        if kind == "one column":
            return torch.rand(rows, 1, generator=generator) < 0.7
        if kind == "any":
            mask = draw_mask(self.data, self.batch, self.heads * self.group, rows, end, generator)
        else:
            mask = torch.ones(self.batch, 1, rows, max(end, self.capacity or end), dtype=torch.bool)
            mask[0, ..., : self.draw(st.integers(0, end))] = False
            mask[..., end:] = self.draw(st.booleans())
            if self.draw(st.booleans()):
                mask = torch.zeros(mask.shape, dtype=self.dtype).masked_fill(~mask, torch.finfo(self.dtype).min)
        if mask is not None:
            stored = int(self.reference[0].state[0]) if self.capacity else end
            mask[..., end:stored] = False if mask.dtype == torch.bool else -math.inf
        return mask

    def run(self, steps: list[Callable[[], None]]) -> None:
        for _ in range(self.draw(st.integers(2, 5))):
            self.draw(st.sampled_from(steps))()
        self.attend()


class TestSessions:
    @given(data=st.data())
    @settings(drawn, max_examples=40)
    def test_a_growing_cache(self, data):
        session = Session(data, None)
        session.run([session.extend, session.extend, session.rewind, session.prefix, session.attend])

    @given(data=st.data())
    @settings(drawn, max_examples=40)
    def test_a_preallocated_cache(self, data):
        # The smallest has no pages.
        session = Session(data, data.draw(st.sampled_from([CAPACITY, 228, 160, 30])))
        session.run([session.write, session.write, session.attend])

    @pytest.mark.parametrize("new", [0, 40])
    def test_columns_behind_a_prefix_stand_for_zeros(self, new):
        """Not for the tokens that are stored there."""
        keys, values = (replace(cache, length=100) for cache in both(160))
        given = (QUERY, keys, values, KEY[:, :, :new], VALUE[:, :, :new])
        mask = torch.ones(ROWS, 150, dtype=torch.bool)
        compare(attend.traceable(*given, attn_mask=mask), attend(*given, attn_mask=mask), QUERY.dtype)


# What a target must express, on int64, uint8, bool, float32 and the model's dtype. `remainder` has the sign of the
# divisor, `round` takes halves to even, `index` looks numbers up in a table, and `slice_scatter`
# puts the parts of a page together.
ALLOWED = set(
    """
    _to_copy _unsafe_view alias cat clone copy detach expand permute select slice split squeeze stack transpose
    unsqueeze view
    arange constant_pad_nd full index index_select scalar_tensor slice_scatter zeros zeros_like
    abs add clamp clamp_min div exp floor_divide log2 maximum minimum mul nan_to_num pow remainder round sqrt sub tanh
    all amax logsumexp mean sum
    bmm mm
    bitwise_not eq ge gt lt masked_fill ne where
    __lshift__ __rshift__ bitwise_and bitwise_or bucketize
    """.split()
)
# The bytes of a number as numbers, and the other way.
BITCAST = "aten.view.dtype"

KEYS, VALUES = PackedFormat(64, 3, True, 4, 32), PackedFormat(80, 2, False, 4, 32)
FOLDED = replace(VALUES, folded=True)
BATCH, HEADS, ROWS = 2, 2, 3


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-2])).to(dtype)


def stored(fmt: PackedFormat, length: int, capacity: int = 200) -> Planes:
    cache = pack(normal(BATCH, HEADS, length, fmt.head_dim), fmt.spec, capacity=capacity)
    return with_room(cache, capacity)


def keys_only(length: int) -> tuple[Planes, ...]:
    return (stored(KEYS, length),)


def both(length: int) -> tuple[Planes, ...]:
    return stored(KEYS, length), stored(VALUES, length)


def none(length: int) -> tuple[Planes, ...]:
    return ()


KEY, VALUE = normal(BATCH, HEADS, 40, 64), normal(BATCH, HEADS, 40, 80)
QUERY = normal(BATCH, 2 * HEADS, ROWS, 64)
SINKS = torch.linspace(-2, 2, 2 * HEADS)
MASK = torch.rand(BATCH, 1, ROWS, 200, generator=torch.Generator().manual_seed(0)) < 0.7


def attend_in_place(keys: Planes, values: Planes, positions: Tensor, mask: Tensor, sinks: Tensor) -> Any:
    named = {"positions": positions, "attn_mask": mask, "sinks": sinks, "softcap": 5.0, "return_lse": True}
    return attend.traceable(QUERY, keys, values, KEY, VALUE, **named)


def attend_to_all(keys: Planes, values: Planes, mask: Tensor) -> Any:
    return attend.traceable(QUERY, keys, values, attn_mask=mask)


def attend_causally(keys: Planes, values: Planes) -> Any:
    return attend.traceable(QUERY, keys, values, KEY, VALUE, is_causal=True)


# What is traced, and the caches and the tensors that it takes, of a number of stored tokens.
FORMS: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Planes, ...]], Callable[[int], tuple[Tensor, ...]]]]
FORMS = {
    "pack": (lambda new: pack.traceable(new, KEYS.spec), none, lambda length: (KEY,)),
    "pack at a position": (lambda new: pack.traceable(new, VALUES.spec, 70, 200), none, lambda length: (VALUE,)),
    "extend": (extend.traceable, lambda length: (replace(stored(KEYS, length), length=90),), lambda length: (KEY,)),
    "write": (write.traceable, keys_only, lambda length: (KEY, torch.arange(length, length + 40))),
    "write at a number": (lambda cache, new: write.traceable(cache, new, 90), keys_only, lambda length: (KEY,)),
    "write of one": (write.traceable, keys_only, lambda length: (KEY[:, :, :1], torch.tensor([length]))),
    "rewind": (lambda cache: rewind.traceable(cache, 50), keys_only, none),
    "attend": (attend_in_place, both, lambda length: (torch.arange(length, length + 40), MASK, SINKS)),
    "attend to all": (attend_to_all, both, lambda length: (MASK.float(),)),
    "attend causally": (attend_causally, both, none),
    "read": (read.traceable, keys_only, none),
    "read folded": (read.traceable, lambda length: (stored(FOLDED, length),), none),
    "fold": (lambda x: fold.traceable(x, FOLDED.spec), none, lambda length: (VALUE,)),
    "unfold": (lambda x: unfold.traceable(x, FOLDED.spec), none, lambda length: (VALUE,)),
    "update": (update.traceable, both, none),
}


def on_parts(form: Callable[..., Any], caches: tuple[Planes, ...]) -> Callable[..., Any]:
    """`form` on tensors alone, to tensors alone."""

    def function(*tensors: Tensor) -> Any:
        own = [Planes(*tensors[3 * i : 3 * i + 3], cache.fmt, cache.length) for i, cache in enumerate(caches)]
        made = form(*own, *tensors[3 * len(own) :])
        return made.parts if isinstance(made, Planes) else made

    return function


def operands(caches: tuple[Planes, ...], rest: tuple[Tensor, ...]) -> list[Tensor]:
    return [part for cache in caches for part in cache.parts] + list(rest)


def trace(name: str, length: int) -> GraphModule:
    form, caches, rest = FORMS[name]
    function = dispatch_functionalize(on_parts(form, caches(length)))
    # A look at data raises here: tensors hold none.
    return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*operands(caches(length), rest(length)))


def kinds(graph: GraphModule) -> set[str]:
    found = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"} - {BITCAST}
    return {name.removeprefix("aten.").split(".")[0] for name in found if "getitem" not in name}


class TestStatic:
    @pytest.mark.parametrize("name", FORMS)
    def test_traced_once_it_serves_every_state(self, name):
        graph = trace(name, 0)
        assert kinds(graph) <= ALLOWED, kinds(graph) - ALLOWED
        for node in graph.graph.nodes:
            held = node.meta.get("val")
            assert not isinstance(held, torch.SymInt)
            assert not isinstance(held, Tensor) or all(type(size) is int for size in held.shape)
        form, caches, rest = FORMS[name]
        for length in (3, 90, 160):
            given = operands(caches(length), rest(length))
            expected = on_parts(form, caches(length))(*given)
            actual = graph(*given)
            for a, b in zip(
                *(made if isinstance(made, tuple) else (made,) for made in (actual, expected)), strict=True
            ):
                assert same_bytes(a, b)

    def test_bytes_of_numbers_occur_in_pages_alone(self):
        casts = {name: BITCAST in str(trace(name, 0).graph) for name in ("attend", "write", "fold", "unfold")}
        assert casts == {"attend": True, "write": True, "fold": False, "unfold": False}

    def test_a_trace_leaves_the_tables_as_they_are(self):
        fmt = PackedFormat(16, 2, True, seed=77)
        cache = pack(normal(1, 1, 150, 16), fmt.spec)
        function = on_parts(read.traceable, (cache,))
        make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*cache.parts)
        assert type(fmt.rotation_matrix()) is type(fmt.levels()) is Tensor

    def test_export(self):
        """A step of a preallocated cache, as `torch.export` takes it."""

        class Step(torch.nn.Module):
            def forward(self, k, v, query, key, value, positions):
                keys, values = Planes(*k, KEYS, 200), Planes(*v, VALUES, 200)
                out = attend.traceable(query, keys, values, key, value, positions)
                made = (write.traceable(keys, key, positions), write.traceable(values, value, positions))
                return out, made[0].parts, made[1].parts

        def given(length: int) -> tuple[Any, ...]:
            k, v = both(length)
            return k.parts, v.parts, QUERY[:, :, :1], KEY[:, :, :1], VALUE[:, :, :1], torch.tensor([length])

        program = torch.export.export(Step(), given(0))
        assert not program.range_constraints
        assert not any("_local_scalar_dense" in str(node.target) for node in program.graph.nodes)
        actual, expected = program.module()(*given(132)), Step()(*given(132))
        assert all(map(same_bytes, torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected)))
        same(Planes(*actual[1], KEYS, 200), write(both(132)[0], KEY[:, :, :1], torch.tensor([132])))
