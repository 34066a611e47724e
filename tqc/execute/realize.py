"""Realize a rewritten graph for torch: choose kernels, fuse attention with what stores its tokens, drop the functional.

    out = attend(query, k_cache, v_cache, key, value, ...)      out, keys, values =
    keys = extend(k_cache, key)                            ->       AttendExtend(...)(query, key, value, k_cache, ...)
    values = extend(v_cache, value)

A `write` that an `update` belongs to happens in place, so that its result is the input itself and the update goes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tqc import ops
from tqc.execute.instructions import (
    Adopt,
    Attend,
    AttendExtend,
    AttendSlide,
    AttendWrite,
    Become,
    Extend,
    FoldWeights,
    Fork,
    Instruction,
    Pack,
    Read,
    Reference,
    Write,
)
from tqc.format import PackedFormat
from tqc.lowering.provider import Provider
from tqc.lowering.select import choose
from tqc.ops import Op, PackedValue, example, set_example

# By the number of an attention site: the name of its provider, and why better ones were passed over.
Choices = dict[int, tuple[str, list[str]]]


def realize(gm: GraphModule, requested: str) -> Choices:
    """Replace the dialect's nodes of `gm` by instructions, in place.

    Args:
        requested: name of the provider, or "auto".

    Raises:
        ValueError: if a provider was requested by name and cannot serve.
    """
    realizer = _Realizer(gm, requested)
    for node in list(gm.graph.nodes):
        if isinstance(node.target, Op) and not node._erased:
            realizer.of_op.get(node.target, realizer.reference)(node)
    realizer.fold_weights()
    gm.graph.lint()
    gm.recompile()
    return realizer.choices


class _Realizer:
    def __init__(self, gm: GraphModule, requested: str) -> None:
        self.graph, self.requested = gm.graph, requested
        self.choices: Choices = {}
        self.weights: list[Node] = []
        self.packs = bool(gm.graph.find_nodes(op="call_function", target=ops.pack))
        self.of_op: dict[Op, Callable[[Node], None]] = {
            ops.attend: self.attend,
            ops.extend: self.extend,
            ops.write: self.write,
            ops.pack: self.pack,
            ops.read: self.read,
            ops.adopt: self.adopt,
            ops.update: self.update,
            ops.fold: self.fold,
            ops.fork: self.fork,
            ops.window: self.window,
        }

    def provider(self, node: Node, dtype: torch.dtype, device: torch.device, *formats: PackedFormat) -> Provider:
        """That of the node's attention site, so that all its nodes have one; else one for these formats."""
        formats = node.meta.get("formats", formats)
        provider, refusals = choose(formats[0], formats[-1], dtype, device.type, self.requested)
        if "layer" in node.meta:
            self.choices.setdefault(node.meta["layer"], (provider.name, refusals))
        return provider

    def of_cache(self, node: Node, cache: PackedValue) -> Provider:
        return self.provider(node, cache.dtype, cache.device, cache.fmt)

    def call(self, node: Node, instruction: Instruction, *operands: Any) -> Node:
        """`instruction` in front of `node`."""
        with self.graph.inserting_before(node):
            return self.graph.call_function(instruction, operands)

    def replace(self, node: Node, instruction: Instruction, *operands: Any) -> Node:
        """`instruction` in the place of `node`."""
        call = self.call(node, instruction, *operands)
        set_example(call, example(node))
        self.put(call, node)
        return call

    def put(self, new: Node, old: Node) -> None:
        new.meta = {**old.meta, **new.meta}
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def attend(self, node: Node) -> None:
        a = ops.attend.arguments(node)
        keys, values = example(a["keys"]), example(a["values"])
        query = example(a["query"])
        provider = self.provider(node, query.dtype, query.device, keys.fmt, values.fmt)
        how = (provider, *(a[name] for name in ("scale", "softcap", "is_causal", "counted", "return_lse")))
        rest = (a["attn_mask"], a["sinks"])
        new = (a["key"], a["value"])
        stored = [_stored(a[cache], token) for cache, token in (("keys", a["key"]), ("values", a["value"]))]
        slides = [_slides(a[cache]) for cache in ("keys", "values")]
        if all(slides):
            windows = [ops.window.arguments(a[cache]) for cache in ("keys", "values")]
            read = [window["cache"] for window in windows] + [windows[0]["begin"], windows[0]["end"]]
            slide = AttendSlide(*how, keep=windows[0]["keep"])
            self.replace(node, slide, a["query"], *new, *read, *rest)
            for window, store in zip(windows, stored, strict=True):
                self.written_in_place(store, window["cache"])
            for name in ("keys", "values"):
                self.graph.erase_node(a[name])
        elif all(store and store.target is ops.extend for store in stored):
            scores = {part for store in stored for part in _scored(store)}
            call = self.call(node, AttendExtend(*how), a["query"], *new, a["keys"], a["values"], *rest)
            set_example(call, (example(node), *map(example, stored)))
            call.meta |= {name: node.meta[name] for name in ("layer", "formats") if name in node.meta}
            self.result(call, 0, node)
            for index, store in enumerate(stored, 1):
                self.result(call, index, store)
            self.drop_scores(scores)
        elif all(store and store.target is ops.write and _update(store) for store in stored):
            caches = (a["keys"], a["values"])
            self.replace(node, AttendWrite(*how), a["query"], *new, *caches, a["positions"], *rest)
            for cache, store in zip(caches, stored, strict=True):
                self.written_in_place(store, cache)
        else:
            self.replace(node, Attend(*how), a["query"], a["keys"], a["values"], *new, a["positions"], *rest)

    def result(self, call: Node, index: int, node: Node) -> None:
        """Result `index` of a call in the place of `node`."""
        with self.graph.inserting_before(node):
            part = self.graph.call_function(operator.getitem, (call, index))
        set_example(part, example(node))
        self.put(part, node)

    def drop_scores(self, parts: set[Node]) -> None:
        """The instruction scores its tokens itself."""
        scores = {part.args[0] for part in parts}
        for node in (*parts, *scores):
            if not node.users:
                self.graph.erase_node(node)

    def written_in_place(self, store: Node, cache: Node) -> None:
        for update in [user for user in store.users if user.target is ops.update]:
            self.graph.erase_node(update)
        store.replace_all_uses_with(cache)
        self.graph.erase_node(store)

    def extend(self, node: Node) -> None:
        a = ops.extend.arguments(node)
        extend = Extend(self.of_cache(node, example(node)))
        self.replace(node, extend, a["cache"], a["new"], a["query"], a["score"], a["state_rows"])

    def write(self, node: Node) -> None:
        a = ops.write.arguments(node)
        update = _update(node)
        write = Write(self.of_cache(node, example(node)), a["counted"], update is not None)
        call = self.replace(node, write, a["cache"], a["new"], a["positions"], a["attn_mask"])
        if update:
            self.graph.erase_node(update)
            call.replace_all_uses_with(a["cache"])

    def pack(self, node: Node) -> None:
        a = ops.pack.arguments(node)
        pack = Pack(self.of_cache(node, example(node)), a["spec"])
        self.replace(node, pack, a["new"], a["start"], a["capacity"], a["query"], a["score"], a["state_rows"])

    def read(self, node: Node) -> None:
        self.replace(node, Read(self.of_cache(node, example(node.args[0]))), node.args[0])

    def adopt(self, node: Node) -> None:
        a = ops.adopt.arguments(node)
        k_cache, v_cache = example(node)
        provider = self.provider(node, k_cache.dtype, k_cache.device, k_cache.fmt, v_cache.fmt)
        operands = (a["keys"], a["values"], a["positions"], a["count"], a["attn_mask"], a["query"])
        self.call(node, Adopt(provider, a["k_spec"], a["v_spec"], a["counted"]), *operands)
        for part in list(node.users):  # the caller's tensors become these
            for update in list(part.users):
                if update.target is ops.update:
                    self.graph.erase_node(update)
            part.replace_all_uses_with(a["keys"] if part.args[1] == 0 else a["values"])
            self.graph.erase_node(part)
        self.graph.erase_node(node)

    def window(self, node: Node) -> None:
        if not _slides(node):
            self.reference(node)

    def fork(self, node: Node) -> None:
        self.replace(node, Fork(), *node.args)

    def update(self, node: Node) -> None:
        self.replace(node, Become(), *node.args)

    def fold(self, node: Node) -> None:
        weight = node.args[0]
        if isinstance(weight, Node) and weight.op == "placeholder" and isinstance(example(weight), torch.nn.Parameter):
            self.weights.append(node)
        else:
            self.reference(node)

    def fold_weights(self) -> None:
        """One call makes all folded weights, above everything else, so that it cuts no region."""
        if not self.weights:
            return
        arguments = [list(ops.fold.arguments(node).values()) for node in self.weights]
        instruction = FoldWeights(tuple(tuple(how) for _, *how in arguments), self.packs)
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        call = self.call(first, instruction, *(weight for weight, *_ in arguments))
        set_example(call, tuple(map(example, self.weights)))
        for index, node in enumerate(self.weights):
            with self.graph.inserting_after(call):
                part = self.graph.call_function(operator.getitem, (call, index))
            set_example(part, example(node))
            self.put(part, node)

    def reference(self, node: Node) -> None:
        """An op that torch has no instruction for."""
        assert isinstance(node.target, Op)
        named = node.kwargs  # which go with the node
        self.replace(node, Reference(node.target), *node.args).kwargs = named


def _stored(cache: Node, new: Node | None) -> Node | None:
    """The node that stores these new tokens in a cache."""
    stores = (user for user in cache.users if user.target in (ops.extend, ops.write))
    return next((store for store in stores if new is not None and store.args[1] is new), None)


def _slides(cache: Node) -> bool:
    """Whether a cache is a window that one attention reads, and whose tokens and new ones become the cache's own."""
    if cache.target is not ops.window:
        return False
    stores = [user for user in cache.users if user.target is ops.extend]
    readers = [user for user in cache.users if user.target is ops.attend]
    if len(stores) != 1 or len(readers) != 1 or len(cache.users) != 2 or _scored(stores[0])[:1]:
        return False
    update = next((user for user in stores[0].users if user.target is ops.update), None)
    return update is not None and update.args[0] is cache.args[0]


def _scored(node: Node) -> list[Node]:
    """The results of `score` that an `extend` takes."""
    arguments = ops.extend.arguments(node)
    return [arguments[name] for name in ("score", "state_rows") if arguments[name] is not None]


def _update(node: Node) -> Node | None:
    """The update by which an input becomes what `node` made of it."""
    updates = (user for user in node.users if user.target is ops.update)
    return next((update for update in updates if update.args[0] is node.args[0]), None)
