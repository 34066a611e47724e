"""Realize a rewritten graph for ONNX: each op of the dialect calls its function, each cache becomes its tensors.

    out = attend(query, k_cache, v_cache, key, value, attn_mask=mask)
    keys = extend(k_cache, key, query=query)
->
    out = tqc::attend_...(query, state, key, value, mask, *tables, *k_cache's parts, *v_cache's parts)
    keys' parts = tqc::extend_...(key, state, out, query, *tables, *k_cache's parts)
    state' = tqc::advance_...(state, key)

`extend` takes what attention returned, so that no memory that attention reads is written before it has.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from onnx import FunctionProto
from torch import Tensor
from torch.fx import GraphModule, Node

from tqc import ops
from tqc.format import PackedFormat
from tqc.lowering.onnx.attend import attend_function
from tqc.lowering.onnx.builder import DOMAIN, DOMAIN_VERSION
from tqc.lowering.onnx.encode import table_arrays
from tqc.lowering.onnx.extend import extend_function, state_function
from tqc.lowering.onnx.layout import Part, parts_of
from tqc.lowering.onnx.windows import newest_function, newest_like
from tqc.ops import Op, PackedValue, example, is_packed, set_example


class CannotRealize(Exception):
    """An op of the dialect has no ONNX function yet: the message names it."""


@dataclass(frozen=True)
class Call:
    """Calls a function of the domain from a graph of torch.

    Attributes:
        like: of the operands, tensors with the shapes and dtypes of the results.
    """

    function: str
    like: Callable[..., list[Tensor]]

    @property
    def __name__(self) -> str:
        return self.function

    def __call__(self, *operands: Tensor) -> tuple[Tensor, ...]:
        likes = self.like(*operands)
        dtypes, shapes = [x.dtype for x in likes], [x.shape for x in likes]
        name = f"{DOMAIN}::{self.function}"
        return tuple(
            torch.onnx.ops.symbolic_multi_out(name, operands, dtypes=dtypes, shapes=shapes, version=DOMAIN_VERSION)
        )


@dataclass
class Cache:
    """A packed cache among the inputs of a realized graph.

    Attributes:
        name: such as "3.key".
        state: name of its state.
    """

    name: str
    fmt: PackedFormat
    heads: int
    dtype: torch.dtype
    state: str
    layout: list[Part]


@dataclass
class Realized:
    """What `realize` found and made.

    Attributes:
        inputs: the placeholders that it made, by the name that they have in a file.
        outputs: names of the results.
        functions: of the domain, by name.
        tables: names of the buffers of the graph that are tables, as they are called in a file.
    """

    inputs: dict[str, Node] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    functions: dict[str, FunctionProto] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)
    caches: list[Cache] = field(default_factory=list)
    states: dict[str, PackedFormat] = field(default_factory=dict)


def realize(gm: GraphModule, caches: Mapping[Node, str], capacity: int) -> Realized:
    """Replace the dialect's nodes of `gm` in place, and its packed inputs by their tensors.

    Args:
        caches: names of the inputs that are caches, dense ones too.
        capacity: most tokens of a packed cache.

    Raises:
        CannotRealize: for an op without a function, and for a cache that does not leave the graph.
    """
    realizer = _Realizer(gm, caches, capacity)
    realizer.run()
    return realizer.made


def state_name(fmt: PackedFormat) -> str:
    return "state" if fmt.keep is None else f"state.window{fmt.keep}"


class _Realizer:
    def __init__(self, gm: GraphModule, caches: Mapping[Node, str], capacity: int) -> None:
        self.gm, self.graph, self.caches, self.capacity = gm, gm.graph, dict(caches), capacity
        self.made = Realized()
        self.parts: dict[Node, dict[str, Node]] = {}
        self.past_states: dict[str, Node] = {}
        self.states: dict[str, Node] = {}  # those behind this call's tokens
        self.state_of: dict[Node, Node] = {}
        self.readers: dict[Node, list[Node]] = {}  # by a cache, what was made of it so far
        self.names: dict[Node, str] = {node: name for node, name in self.caches.items()}

    def run(self) -> None:
        for node, name in self.caches.items():
            if is_packed(node):
                self.split(node, name)
        for node in list(self.graph.nodes):
            if isinstance(node.target, Op):
                function = getattr(self, node.target.__name__, None)
                if function is None:
                    raise CannotRealize(f"the op {node.target.__name__} has no ONNX function")
                function(node)
            elif node.target is operator.getitem and (keep := self.keeps(node)):
                self.newest(node, keep)
        self.output()
        for node in reversed(list(self.graph.nodes)):
            if not node.users and (isinstance(node.target, Op) or node in self.parts):
                self.graph.erase_node(node)
        self.gm.recompile()

    def split(self, node: Node, name: str) -> None:
        """Placeholders of a packed input's tensors."""
        value = example(node)
        assert isinstance(value, PackedValue)
        fmt, heads = value.fmt, int(value.heads)
        state = state_name(fmt)
        layout = parts_of(fmt, heads, self.capacity)
        self.made.caches.append(Cache(name, fmt, heads, value.dtype, state, layout))
        if state not in self.past_states:
            self.past_states[state] = self.placeholder(f"past.{state}", torch.zeros(3, dtype=torch.int64))
            self.made.states[state] = fmt
        self.state_of[node] = self.past_states[state]
        self.parts[node] = {}
        for part in layout:
            dtype = getattr(torch, part.dtype) if part.dtype else value.dtype
            held = torch.zeros(2, *part.shape, dtype=dtype)
            self.parts[node][part.name] = self.placeholder(f"past.{name}.{part.name}", held)

    def placeholder(self, name: str, held: Tensor) -> Node:
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name.replace(".", "_"))
        set_example(node, held)
        self.made.inputs[name] = node
        return node

    def tables(self, node: Node, fmt: PackedFormat) -> list[Node]:
        found = []
        for name, array in table_arrays(fmt).items():
            buffer = name.replace(".", "_")
            if buffer not in self.made.tables:
                self.gm.register_buffer(buffer, torch.from_numpy(array.copy()))
                self.made.tables[buffer] = name
            with self.graph.inserting_before(node):
                found.append(self.graph.get_attr(buffer))
        return found

    def call(
        self, node: Node, function: FunctionProto, like: Callable[..., list[Tensor]], *operands: Any
    ) -> list[Node]:
        """A call of `function` in front of `node`; its results."""
        self.made.functions.setdefault(function.name, function)
        with self.graph.inserting_before(node):
            made = self.graph.call_function(Call(function.name, like), operands)
            return [self.graph.call_function(operator.getitem, (made, i)) for i in range(len(function.output))]

    def attend(self, node: Node) -> None:
        a = ops.attend.arguments(node)
        if a["is_causal"] or a["positions"] is not None or a["return_lse"]:
            raise CannotRealize("attention that is causal by itself or at given positions has no ONNX function")
        keys, values = a["keys"], a["values"]
        k_fmt, v_fmt = example(keys).fmt, example(values).fmt
        mask = a["attn_mask"]
        kind = None if mask is None else "bool" if example(mask).dtype == torch.bool else "float"
        new, sinks, scale, softcap = a["key"] is not None, a["sinks"] is not None, a["scale"], a["softcap"]
        name = f"attend_{_text(k_fmt)}_{_text(v_fmt)}_x{scale:g}"
        name += "" if new else "_read"
        name += f"_mask_{kind}" if kind else ""
        name += ("_sinks" if sinks else "") + (f"_cap{softcap:g}" if softcap else "")
        name = name.replace(".", "p").replace("-", "m")
        function = self.made.functions.get(name) or attend_function(
            name, k_fmt, v_fmt, new, kind, sinks, scale, softcap
        )
        given = [a[name] for name in ("key", "value", "attn_mask", "sinks") if a[name] is not None]
        tables = self.tables(node, k_fmt) + self.tables(node, v_fmt)
        parts = [*self.parts[keys].values(), *self.parts[values].values()]
        like = _OutputLike(v_fmt.head_dim)
        (out,) = self.call(node, function, like, a["query"], self.state_of[keys], *given, *tables, *parts)
        set_example(out, example(node))
        node.replace_all_uses_with(out)
        for cache in (keys, values):
            self.readers.setdefault(cache, []).append(out)

    def extend(self, node: Node) -> None:
        cache, new, query = ops.extend.arguments(node).values()
        fmt, balanced = example(cache).fmt, query is not None and example(cache).fmt.centred
        name = f"extend_{_text(fmt)}" + ("_balanced" if balanced else "")
        function = self.made.functions.get(name) or extend_function(name, fmt, balanced)
        state = state_name(fmt)
        after = self.readers.get(cache) or [new]
        parts = self.parts[cache]
        operands = [new, self.past_states[state], after[-1], *([query] if balanced else [])]
        made = self.call(node, function, _LastLike(len(parts)), *operands, *self.tables(node, fmt), *parts.values())
        self.parts[node] = dict(zip(parts, made, strict=True))
        if state not in self.states:
            function = state_function(f"advance_{_text(fmt)}", fmt)
            (self.states[state],) = self.call(node, function, _second, new, self.past_states[state])
        self.state_of[node] = self.states[state]
        self.names[node] = self.names[cache]

    def unfold(self, node: Node) -> None:
        with self.graph.inserting_before(node):
            made = self.graph.call_function(ops.unfold.reference, node.args, node.kwargs)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)

    def fold(self, node: Node) -> None:
        """Of a weight: folded for good."""
        weight, *how = ops.fold.arguments(node).values()
        if weight.op == "get_attr":
            held = operator.attrgetter(str(weight.target))(self.gm)
            buffer = f"folded_{node.name}"
            self.gm.register_buffer(buffer, ops.fold.reference(held.detach(), *how))
            with self.graph.inserting_before(node):
                made = self.graph.get_attr(buffer)
        else:
            with self.graph.inserting_before(node):
                made = self.graph.call_function(ops.fold.reference, node.args, node.kwargs)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)

    def keeps(self, node: Node) -> int | None:
        """How many of the last tokens of a dense cache a cut keeps; None for other nodes."""
        index = node.args[1]
        if not isinstance(index, tuple) or len(index) < 3 or self.source(node) is None:
            return None
        part = index[2]
        negative = isinstance(part, slice) and isinstance(part.start, int) and part.start < 0 and part.stop is None
        return -part.start if negative else None

    def newest(self, node: Node, keep: int) -> None:
        name = self.source(node)
        assert name
        (made,) = self.call(node, newest_function(keep), functools.partial(newest_like, keep), node.args[0])
        set_example(made, example(node))
        self.names[made] = name
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)

    def output(self) -> None:
        """Results by name: logits, dense caches, the parts of packed ones, states."""
        output = self.graph.output_node()
        named: dict[str, Node] = {}
        for node in output.all_input_nodes:
            if not isinstance(example(node), (Tensor, PackedValue)):
                continue
            name = self.names.get(node) or self.source(node)
            if name is None and "logits" in named and named["logits"] is not node:
                raise CannotRealize(f"the graph returns {node.name}, which is neither logits nor a cache")
            if name is None:
                named["logits"] = node
            elif node in self.parts:
                named |= {f"present.{name}.{part}": value for part, value in self.parts[node].items()}
            else:
                named[f"present.{name}"] = node
        named |= {f"present.{state}": node for state, node in self.states.items()}
        output.args = (tuple(named.values()),)
        self.made.outputs = list(named)

    def source(self, node: Node) -> str | None:
        """Name of the dense cache that a result was made of by concatenation and cuts."""
        while node not in self.names:
            tensors = node.args[0] if node.args else None
            tensors = tensors[0] if isinstance(tensors, (list, tuple)) and tensors else tensors
            if node.target not in (torch.cat, operator.getitem) or not isinstance(tensors, Node):
                return None
            node = tensors
        return self.names[node]


class _OutputLike:
    """The result of attention: the query with the head_dim of values."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim

    def __call__(self, query: Tensor, *rest: Tensor) -> list[Tensor]:
        return [query.new_empty(*query.shape[:3], self.head_dim)]


class _LastLike:
    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, *operands: Tensor) -> list[Tensor]:
        return list(operands[-self.count :])


def _second(new: Tensor, state: Tensor) -> list[Tensor]:
    return [state]


def _text(fmt: PackedFormat) -> str:
    """A format in the name of a function."""
    return "_".join(fmt.spec.split(":")[1:])
