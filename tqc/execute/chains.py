"""Run the layers of a step by one call: attention and regions in turn, with no Python between them.

    attention, region, attention, ..., region, attention    ->    chain

A chain takes the place of such a run of nodes in the graph that `regions.split` made, where every attention has its new
tokens appended to a packed cache and every region is compiled with Inductor's C++ wrapper. The provider runs it, on
handles of tensors; what Python still does, once a step for all layers, is to make room in the caches before and to note
their new lengths behind.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.operator_schemas import normalize_function

from tqc.cache.packed_tensor import PackedTensor
from tqc.cache.storage import Storage
from tqc.execute import calls as runtime
from tqc.passes.graph import is_packed, value

_ATTENTION = (runtime.attend_extend, runtime.attend_write)
# One attention alone gains nothing.
_MIN_ATTENTIONS = 2


@dataclass(frozen=True)
class Site:
    """One attention of a chain: where its caches are among the arguments, and what its node says."""

    k_cache: int
    v_cache: int
    count: int
    grows: bool
    arguments: dict[str, Any]


class Chain(torch.nn.Module):
    """A run of layers; in Python until `compile` has been called."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__()
        self.module = module
        self.run: Callable[..., Any] = module.forward

    def forward(self, *args: Any) -> Any:
        return self.run(*args)

    def compile_with_provider(self) -> None:
        """Make one call of it, unless a region turned out to have no entry that C++ can call."""
        regions = [getattr(self.module, node.target) for node in self.module.graph.nodes if node.op == "call_module"]
        if all(region.entry for region in regions):
            self.run = CompiledChain(self.module)


def _with_room(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return function(*args)


# CPython keeps frames in chunks of 16 KB and, where one is full, maps and unmaps the next at every call, 17 us each.
# The frame of a step's graph with its hundreds of weights leaves it to chance how full; this one takes a chunk anew.
_with_room.__code__ = _with_room.__code__.replace(co_stacksize=2048)


class CompiledChain:
    """The instructions for a provider's `make_chain`, and what has to be done around a run of them."""

    def __init__(self, module: GraphModule) -> None:
        self.in_python = module.forward
        self.tensors: list[int] = []
        self.sites: list[Site] = []
        self.outputs: list[int | tuple[int, int]] = []
        nodes = list(module.graph.nodes)
        slots: dict[Node, Any] = {}
        for index, node in enumerate(node for node in nodes if node.op == "placeholder"):
            if is_packed(node):
                slots[node] = index
            else:
                slots[node] = len(self.tensors)
                self.tensors.append(index)
        attentions = [node for node in nodes if node.target in _ATTENTION]
        first_cache = len(self.tensors)
        inputs = temporary = first_cache + 6 * len(attentions)
        instructions: list[tuple[Any, ...]] = []
        for node in nodes:
            if node.op == "call_module":
                region = getattr(module, node.target)
                slots[node] = tuple(range(temporary, temporary + len(region.results)))
                instructions.append((region.entry, tuple(slots[source] for source in node.args), slots[node]))
                temporary += len(region.results)
            elif node.target in _ATTENTION:
                site = self._add_site(node, slots)
                caches = first_cache + 6 * (len(self.sites) - 1)
                given = site.arguments
                names = ("query", "key", "value", "positions", "attn_mask", "sinks")
                read = tuple(-1 if given.get(name) is None else slots[given[name]] for name in names)
                capacity = -1 if site.grows else value(given["k_cache"]).shape[2]
                how = (given["scale"], given["softcap"], given.get("is_causal", False))
                instructions.append((read, caches, temporary, capacity, *how))
                slots[node] = (temporary, *((len(self.sites) - 1, i) for i in (0, 1))) if site.grows else temporary
                temporary += 1
            elif node.target is operator.getitem:
                slots[node] = slots[node.args[0]][node.args[1]]
            elif node.op == "output":
                self.outputs = [slots[source] for source in node.args[0]]
        self.kernels = runtime.provider_module(self.sites[0].arguments["provider"])
        returned = tuple(slot for slot in self.outputs if isinstance(slot, int))
        program = tuple(_with_last_uses(instructions, returned))
        self.chain = self.kernels.make_chain(inputs, temporary, program, returned)

    def _add_site(self, node: Node, slots: dict[Node, Any]) -> Site:
        arguments = _arguments(node)
        caches = slots[arguments["k_cache"]], slots[arguments["v_cache"]]
        grows = node.target is runtime.attend_extend
        self.sites.append(Site(*caches, value(arguments["key"]).shape[2], grows, arguments))
        return self.sites[-1]

    def seconds(self) -> tuple[float, float, float]:
        """Spent in regions, in attention and in appending since last asked."""
        return self.kernels.chain_seconds(self.chain)

    def __call__(self, *args: Any) -> Any:
        return _with_room(self._call, args)

    def _call(self, *args: Any) -> Any:
        storages = self._storages(args)
        if len({id(storage) for storage in storages}) < len(storages):
            return self.in_python(*args)  # layers that share a cache must see each other's tokens
        lengths = [args[site.k_cache].shape[2] for site in self.sites]
        tensors = [args[index] for index in self.tensors]
        for storage in storages:
            tensors += (storage.pages, storage.dense, storage.state)
        specs = [storage.fmt.spec for storage in storages]
        in_python = functools.partial(self._attend_in_python, args)
        try:
            results = self.kernels.run_chain(self.chain, tensors, specs, in_python)
        except BaseException:
            for storage in storages:
                storage.written_on_device()
            raise
        for index, site in enumerate(self.sites):
            for storage in storages[2 * index : 2 * index + 2]:
                if site.grows:
                    storage.appended(site.count)
                else:
                    storage.written_on_device()
        tensor = iter(results)
        return tuple(
            next(tensor)
            if isinstance(output, int)
            else PackedTensor(storages[2 * output[0] + output[1]], lengths[output[0]] + self.sites[output[0]].count)
            for output in self.outputs
        )

    def _storages(self, args: tuple[Any, ...]) -> list[Storage]:
        """Those of keys and values of each site, ready to be appended to."""
        storages = []
        for site in self.sites:
            for cache in (args[site.k_cache], args[site.v_cache]):
                storage = cache.packed_storage
                if site.grows:
                    length = cache.shape[2]
                    storage = storage.writable(length)
                    storage.reserve(length + site.count)
                storages.append(storage)
        return storages

    def _attend_in_python(self, args: tuple[Any, ...], index: int, tensors: list[Tensor]) -> Tensor:
        """Attention and write of one site whose write is not an append."""
        site, given = self.sites[index], iter(tensors)
        read = {
            name: None if site.arguments[name] is None else next(given)
            for name in ("query", "key", "value", "positions", "attn_mask", "sinks")
        }
        caches = {"k_cache": args[site.k_cache], "v_cache": args[site.v_cache]}
        return runtime.attend_write(**{**site.arguments, **read, **caches})


def _with_last_uses(instructions: list[tuple[Any, ...]], returned: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """The instructions, with `~slot` for what a region may take over, and with the slots that die at an attention."""
    used = set(returned)
    finished: list[tuple[Any, ...]] = []
    for first, second, *rest in reversed(instructions):
        if isinstance(first, tuple):
            dead = tuple({slot for slot in first if slot >= 0} - used)
            used.update(first)
            finished.append((first, second, *rest, dead))
            continue
        inputs = []
        for slot in reversed(second):
            inputs.append(slot if slot in used else ~slot)
            used.add(slot)
        finished.append((first, tuple(reversed(inputs)), *rest))
    return reversed(finished)


def _arguments(node: Node) -> dict[str, Any]:
    """Arguments of an attention by the names of its function."""
    normalized = normalize_function(node.target, node.args, node.kwargs, normalize_to_only_use_kwargs=True)
    return dict(normalized.kwargs)


def link(outer: GraphModule) -> list[Chain]:
    """Replace runs of layers in a cut graph by chains, in place."""
    chains = [_replace(outer, nodes, f"chain_{index}") for index, nodes in enumerate(list(_runs(outer)))]
    outer.recompile()
    return chains


def _replace(outer: GraphModule, nodes: list[Node], name: str) -> Chain:
    chain = _make_chain(outer, nodes)
    outer.add_submodule(name, chain)
    with outer.graph.inserting_after(nodes[-1]):
        call = last = outer.graph.call_module(name, tuple(_inputs(nodes)))
    for index, node in enumerate(_outputs(nodes)):
        with outer.graph.inserting_after(last):
            last = outer.graph.call_function(operator.getitem, (call, index))
        last.meta = node.meta
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in nodes)
    for node in reversed(nodes):
        outer.graph.erase_node(node)
    return chain


def _inputs(nodes: list[Node]) -> list[Node]:
    members = set(nodes)
    return list(dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in members))


def _outputs(nodes: list[Node]) -> list[Node]:
    members = set(nodes)
    return [node for node in nodes if any(user not in members for user in node.users)]


def _make_chain(outer: GraphModule, nodes: list[Node]) -> Chain:
    graph = Graph()
    env: dict[Node, Node] = {}
    for index, node in enumerate(_inputs(nodes)):
        env[node] = graph.placeholder(f"arg{index}")
        env[node].meta = dict(node.meta)
    for node in nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in _outputs(nodes)))
    return Chain(GraphModule(outer, graph))


def _runs(outer: GraphModule) -> Iterator[list[Node]]:
    """Nodes from a first attention to a last one with nothing between that a chain cannot run."""
    run: list[Node] = []
    for node in (*outer.graph.nodes, None):
        if node is not None and _fits(outer, node, run):
            if run or node.target in _ATTENTION:
                run.append(node)
            continue
        last = max((index for index, member in enumerate(run) if _end(member)), default=-1)
        if sum(member.target in _ATTENTION for member in run) >= _MIN_ATTENTIONS:
            yield run[: last + 1]
        run = []
        if node is not None and node.target in _ATTENTION and _fits(outer, node, run):
            run.append(node)


def _end(node: Node) -> bool:
    """Whether a chain can end here: at an attention or one of its results."""
    return node.target in _ATTENTION or (node.target is operator.getitem and node.args[0].target in _ATTENTION)


def _fits(outer: GraphModule, node: Node, run: list[Node]) -> bool:
    """Whether `node` can be run behind the nodes of `run`."""
    if node.op == "call_module":
        return outer.get_submodule(node.target).can_be_linked
    if node.target is operator.getitem:
        return node.args[0] in run
    if node.target not in _ATTENTION:
        return False
    arguments = _arguments(node)
    tensors = [arguments[name] for name in ("query", "key", "value")]
    known = all(isinstance(value(x), Tensor) and isinstance(value(x).shape[2], int) for x in tensors)
    rows = known and all(value(x).stride(3) == 1 or value(x).shape[3] == 1 for x in tensors)
    if not rows or any(arguments[name] in run for name in ("k_cache", "v_cache")):
        return False
    if node.target is runtime.attend_write:
        if not isinstance(arguments["positions"], Node) or not isinstance(value(arguments["k_cache"]).shape[2], int):
            return False
        if not arguments["counted"] and value(arguments["key"]).shape[2] != 1:
            return False
    provider = arguments["provider"]
    return hasattr(runtime.provider_module(provider), "make_chain") and all(
        _arguments(other)["provider"] == provider for other in run if other.target in _ATTENTION
    )
