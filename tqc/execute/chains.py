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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tqc.cache import preallocated
from tqc.cache.packed_tensor import PackedTensor
from tqc.cache.storage import Appending, Storage
from tqc.cache.views import family, hold, writable
from tqc.execute.instructions import AttendExtend, AttendSlide, AttendWrite
from tqc.execute.regions import Region
from tqc.execute.subgraph import extract, interface
from tqc.ops import example, is_packed

_ATTENTIONS = (AttendExtend, AttendSlide, AttendWrite)
# One attention alone gains nothing.
_MIN_ATTENTIONS = 2
# Tensors of the two caches of an attention: pages, dense and state of keys, then of values.
_CACHE_PARTS = 6
ABSENT = -1


@dataclass
class RegionStep:
    """A compiled region over slots of tensors; `add_region` of the kernels takes these fields.

    Attributes:
        entry: address of what Inductor's C++ wrapper exports.
        inputs, outputs: slots that it reads, and those that it fills.
        last: of each input, whether nobody reads the slot behind this step, so that the region may take it over.
    """

    kind: ClassVar = "region"

    entry: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    last: tuple[bool, ...] = ()

    @property
    def reads(self) -> tuple[int, ...]:
        return self.inputs


@dataclass
class AttentionStep:
    """Attention to caches, and the append of its new tokens; `add_attention` of the kernels takes these fields.

    Attributes:
        query, key, value, positions, attn_mask, sinks: slots, or ABSENT.
        caches: first of the slots with the parts of keys and values.
        out: slot of the output.
        dead: slots that nobody reads behind this step.
    """

    kind: ClassVar = "attention"

    query: int
    key: int
    value: int
    positions: int
    attn_mask: int
    sinks: int
    caches: int
    out: int
    scale: float
    softcap: float
    is_causal: bool
    dead: tuple[int, ...] = ()

    @property
    def reads(self) -> tuple[int, ...]:
        slots = (self.query, self.key, self.value, self.positions, self.attn_mask, self.sinks)
        return tuple(slot for slot in slots if slot != ABSENT)


Step = RegionStep | AttentionStep
_OPERANDS = ("query", "key", "value", "positions", "attn_mask", "sinks")


@dataclass(frozen=True)
class Site:
    """One attention of a chain: its instruction, which arguments its caches are, and how many tokens it appends."""

    instruction: AttendExtend | AttendSlide | AttendWrite
    operands: dict[str, Any]
    k_cache: int
    v_cache: int
    count: int

    @property
    def grows(self) -> bool:
        return isinstance(self.instruction, AttendExtend)

    @property
    def writes(self) -> bool:
        """Whether the new tokens come at positions that the device knows."""
        return isinstance(self.instruction, AttendWrite)

    def storage(self, cache: PackedTensor) -> Storage:
        """That of one of the caches, ready to be appended to."""
        if isinstance(self.instruction, AttendSlide):
            begin, end = self.operands["begin"], self.operands["end"]
            return preallocated.window(cache, begin, end, self.instruction.keep, self.count)
        return cache.room_behind(self.count) if self.grows else writable(cache)


@dataclass
class Program:
    """What a provider runs: steps over numbered slots. Inputs come first, then the parts of each site's caches.

    Attributes:
        tensors: of the chain's arguments, those that are inputs.
        returned: what the chain gives back: a slot, or (site, 0 for keys and 1 for values).
    """

    tensors: list[int] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    returned: list[int | tuple[int, int]] = field(default_factory=list)
    inputs: int = 0
    slots: int = 0


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
        if all(region.entry for region in self.module.children() if isinstance(region, Region)):
            self.run = CompiledChain(self.module)


def _with_room(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return function(*args)


# CPython keeps frames in chunks of 16 KB and, where one is full, maps and unmaps the next at every call, 17 us each.
# The frame of a step's graph with its hundreds of weights leaves it to chance how full; this one takes a chunk anew.
_with_room.__code__ = _with_room.__code__.replace(co_stacksize=2048)


class CompiledChain:
    """A program as a provider's kernels run it, and what has to be done around a run."""

    def __init__(self, module: GraphModule) -> None:
        self.in_python = module.forward
        program = assemble(module)
        self.tensors, self.sites, self.returned = program.tensors, program.sites, program.returned
        self.counts = [None if site.writes else site.count for site in self.sites for _ in range(2)]
        self.kernels = self.sites[0].instruction.provider.kernels
        slots = tuple(slot for slot in self.returned if isinstance(slot, int))
        self.chain = self.kernels.make_chain(program.inputs, program.slots, program.steps, slots)

    def seconds(self) -> tuple[float, float, float]:
        """Spent in regions, in attention and in appending since last asked."""
        return self.kernels.chain_seconds(self.chain)

    def __call__(self, *args: Any) -> Any:
        return _with_room(self._call, args)

    def _call(self, *args: Any) -> Any:
        storages = self._storages(args)
        if len({id(storage) for storage in storages}) < len(storages):
            return self.in_python(*args)  # layers that share a cache must see each other's tokens
        if any(storage.opens(count) for storage, count in zip(storages, self.counts, strict=True)):
            return self.in_python(*args)  # keys are balanced by the queries of this step
        if any(site.writes and args[site.k_cache].begin for site in self.sites):
            return self.in_python(*args)  # positions in a window that has dropped tokens
        if any(
            storage.fmt.groups and storage.packs(count) for storage, count in zip(storages, self.counts, strict=True)
        ):
            return self.in_python(*args)  # a scorer sorts the tokens that leave the window in this step
        tensors = [args[index] for index in self.tensors]
        for storage in storages:
            tensors += (storage.pages, storage.dense, storage.state)
        specs = [storage.fmt.spec for storage in storages]
        capacities = [args[site.k_cache].shape[2] if site.writes else ABSENT for site in self.sites]
        in_python = functools.partial(self._in_python, args)
        with Appending(storages, self.counts):
            results = self.kernels.run_chain(self.chain, tensors, specs, capacities, in_python)
        for index, site in enumerate(self.sites):
            if isinstance(site.instruction, AttendSlide):
                hold(family(args[site.k_cache]), storages[2 * index])
                hold(family(args[site.v_cache]), storages[2 * index + 1])
        tensor = iter(results)
        return tuple(
            next(tensor) if isinstance(output, int) else self._grown(args, storages, *output)
            for output in self.returned
        )

    def _grown(self, args: tuple[Any, ...], storages: list[Storage], index: int, part: int) -> PackedTensor:
        site = self.sites[index]
        return PackedTensor.up_to(storages[2 * index + part], args[site.k_cache].end + site.count)

    def _storages(self, args: tuple[Any, ...]) -> list[Storage]:
        """Those of keys and values of each site, ready to be appended to."""
        return [site.storage(args[index]) for site in self.sites for index in (site.k_cache, site.v_cache)]

    def _in_python(self, args: tuple[Any, ...], index: int, tensors: list[Tensor]) -> Tensor:
        """Attention and write of one site whose write is not an append."""
        site, given = self.sites[index], iter(tensors)
        read: dict[str, Any] = {name: None if site.operands[name] is None else next(given) for name in _OPERANDS}
        instruction: Any = site.instruction
        return instruction(**read, k_cache=args[site.k_cache], v_cache=args[site.v_cache])


def assemble(module: GraphModule) -> Program:
    """The program of a chain's graph, whose nodes are those that `_fits` lets pass."""
    program = Program()
    slots: dict[Node, Any] = {}
    nodes = list(module.graph.nodes)
    for index, node in enumerate(node for node in nodes if node.op == "placeholder"):
        slots[node] = index if is_packed(node) else len(program.tensors)
        if not is_packed(node):
            program.tensors.append(index)
    first_cache = len(program.tensors)
    attentions = sum(map(_attends, nodes))
    program.inputs = program.slots = first_cache + _CACHE_PARTS * attentions
    for node in nodes:
        if node.op == "call_module":
            region = module.get_submodule(node.target)
            slots[node] = tuple(range(program.slots, program.slots + len(region.results)))
            program.slots += len(region.results)
            program.steps.append(RegionStep(region.entry, tuple(slots[source] for source in node.args), slots[node]))
        elif _attends(node):
            site = _site(node, slots)
            how, given, index = site.instruction, site.operands, len(program.sites)
            read: dict[str, Any] = {name: ABSENT if given[name] is None else slots[given[name]] for name in _OPERANDS}
            program.steps.append(
                AttentionStep(
                    **read,
                    caches=first_cache + _CACHE_PARTS * index,
                    out=program.slots,
                    scale=how.scale,
                    softcap=how.softcap,
                    is_causal=how.is_causal,
                )
            )
            slots[node] = (program.slots, (index, 0), (index, 1)) if site.grows else program.slots
            program.sites.append(site)
            program.slots += 1
        elif node.target is operator.getitem:
            slots[node] = slots[node.args[0]][node.args[1]]
        elif node.op == "output":
            program.returned = [slots[source] for source in node.args[0]]
    _note_last_uses(program)
    return program


def _site(node: Node, slots: dict[Node, Any]) -> Site:
    operands = {name: None for name in _OPERANDS} | node.target.operands(node)
    caches = slots[operands["k_cache"]], slots[operands["v_cache"]]
    return Site(node.target, operands, *caches, example(operands["key"]).shape[2])


def _note_last_uses(program: Program) -> None:
    used = {slot for slot in program.returned if isinstance(slot, int)}
    for step in reversed(program.steps):
        if isinstance(step, AttentionStep):
            step.dead = tuple(set(step.reads) - used)
        else:
            # Of a slot that is read twice, the last reading.
            later = [used | set(step.inputs[index + 1 :]) for index in range(len(step.inputs))]
            step.last = tuple(slot not in rest for slot, rest in zip(step.inputs, later, strict=True))
        used.update(step.reads)


def link(outer: GraphModule) -> list[Chain]:
    """Replace runs of layers in a cut graph by chains, in place."""
    chains = [_replace(outer, nodes, f"chain_{index}") for index, nodes in enumerate(list(_runs(outer)))]
    outer.recompile()
    return chains


def _replace(outer: GraphModule, nodes: list[Node], name: str) -> Chain:
    inputs, outputs = interface(nodes)
    chain = Chain(extract(outer, nodes, inputs, outputs))
    outer.add_submodule(name, chain)
    with outer.graph.inserting_after(nodes[-1]):
        call = last = outer.graph.call_module(name, tuple(inputs))
    for index, node in enumerate(outputs):
        with outer.graph.inserting_after(last):
            last = outer.graph.call_function(operator.getitem, (call, index))
        last.meta = node.meta
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in nodes)
    for node in reversed(nodes):
        outer.graph.erase_node(node)
    return chain


def _runs(outer: GraphModule) -> Iterator[list[Node]]:
    """Nodes from a first attention to a last one with nothing between that a chain cannot run."""
    run: list[Node] = []
    for node in (*outer.graph.nodes, None):
        if node is not None and _fits(outer, node, run):
            if run or _attends(node):
                run.append(node)
            continue
        last = max((index for index, member in enumerate(run) if _end(member)), default=-1)
        if sum(map(_attends, run)) >= _MIN_ATTENTIONS:
            yield run[: last + 1]
        run = []
        if node is not None and _attends(node) and _fits(outer, node, run):
            run.append(node)


def _attends(node: Node) -> bool:
    return isinstance(node.target, _ATTENTIONS)


def _end(node: Node) -> bool:
    """Whether a chain can end here: at an attention or one of its results."""
    return _attends(node) or (node.target is operator.getitem and _attends(node.args[0]))


def _fits(outer: GraphModule, node: Node, run: Sequence[Node]) -> bool:
    """Whether `node` can be run behind the nodes of `run`."""
    if node.op == "call_module":
        return outer.get_submodule(node.target).can_be_linked
    if node.target is operator.getitem:
        return node.args[0] in run
    if not _attends(node):
        return False
    instruction, given = node.target, node.target.operands(node)
    tensors = [example(given[name]) for name in ("query", "key", "value")]
    known = all(isinstance(x, Tensor) and isinstance(x.shape[2], int) for x in tensors)
    rows = known and all(x.stride(3) == 1 or x.shape[3] == 1 for x in tensors)
    if not rows or instruction.return_lse or any(given[name] in run for name in ("k_cache", "v_cache")):
        return False
    if isinstance(instruction, AttendSlide) and any(isinstance(given[name], Node) for name in ("begin", "end")):
        return False
    if isinstance(instruction, AttendWrite):
        if not isinstance(given["positions"], Node):
            return False
        if not instruction.counted and tensors[1].shape[2] != 1:
            return False
    same = all(other.target.provider is instruction.provider for other in run if _attends(other))
    return instruction.provider.chains and same
