"""Cut a rewritten graph at the calls on packed tensors, and compile each kind of region between them once.

The regions of a decoder (from one layer's attention to the next's) differ in their weights alone, and weights are
inputs: all but the first and the last are one region, compiled once and called for every layer. No packed tensor
enters a region, so Inductor sees ordinary, mostly static graphs.
"""

from __future__ import annotations

import hashlib
import operator
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from tqc.execute.instructions import Instruction
from tqc.execute.matrix_vector import decompositions
from tqc.execute.subgraph import extract, interface
from tqc.ops import example, is_packed, set_example
from tqc.torch_private import inductor_compile, inductor_state

# Compiled regions and their entries, by text, wrapper and what else Inductor's code depends on: graphs that differ in
# what lies outside them share them. Those of symbolic sizes are not here: their guards are those of one graph.
_compiled: OrderedDict[tuple[str, bool, str], tuple[Callable[..., Any], int | None]] = OrderedDict()
MAX_COMPILED = 256
# A region that stands for this many layers gets Inductor's C++ wrapper: no Python runs between its kernels, which saves
# some 80 us a layer and costs a few seconds of compiling.
_WORTH_A_WRAPPER = 4


class Region(torch.nn.Module):
    """A piece of a graph without packed tensors: runs eagerly until `compile` has been called."""

    def __init__(self, module: GraphModule, examples: list[Any], key: str) -> None:
        super().__init__()
        self.module = module
        self.examples = examples
        self.key = key
        self.calls = 0
        self.entry: int | None = None
        self.run: Callable[..., Any] = module.forward

    @property
    def symbolic(self) -> bool:
        return any(_is_symbolic(example) for example in self.examples)

    @property
    def results(self) -> list[Any]:
        """Examples of what it returns."""
        return [example(node) for node in next(iter(reversed(self.module.graph.nodes))).args[0]]

    @property
    def worth_a_wrapper(self) -> bool:
        on_cpu = all(x.device.type == "cpu" for x in self.examples if isinstance(x, Tensor))
        return on_cpu and self.calls >= _WORTH_A_WRAPPER

    @property
    def can_be_linked(self) -> bool:
        """Whether its entry, if it will have one, takes and gives nothing but tensors."""
        tensors = all(isinstance(example, Tensor) for example in (*self.examples, *self.results))
        return self.worth_a_wrapper and tensors and not self.symbolic

    def compile_with_inductor(self) -> None:
        key = self.key, self.worth_a_wrapper, inductor_state()
        found = _compiled.pop(key, None) or self._compile()
        self.run, self.entry = found
        if not self.symbolic:
            _compiled[key] = found
            if len(_compiled) > MAX_COMPILED:
                _compiled.popitem(last=False)

    def _compile(self) -> tuple[Callable[..., Any], int | None]:
        return inductor_compile(self.module, self.examples, self.worth_a_wrapper, decompositions())

    def forward(self, *args: Any) -> Any:
        return self.run(*args)


def _is_symbolic(held: Any) -> bool:
    if isinstance(held, Tensor):
        return any(isinstance(n, torch.SymInt) for n in (*held.shape, *held.stride()))
    return isinstance(held, (torch.SymInt, torch.SymFloat))


def split(gm: GraphModule, outside: Collection[Node] = ()) -> tuple[list[Region], GraphModule]:
    """The distinct regions of `gm`, and the graph that calls them, with the nodes of `outside` in it."""
    outer = Graph()
    env: dict[Node, Node] = {}
    modules = torch.nn.Module()
    regions: dict[str, Region] = {}
    symbols = {
        str(example(node)): node
        for node in gm.graph.nodes
        if node.op == "placeholder" and isinstance(example(node), torch.SymInt)
    }
    for piece in pieces(gm.graph, outside):
        if isinstance(piece, Node):
            for source in piece.all_input_nodes:
                if source.op == "get_attr" and source not in env:
                    name = str(source.target).replace(".", "_")
                    setattr(modules, name, operator.attrgetter(str(source.target))(gm))
                    env[source] = outer.get_attr(name)
            env[piece] = outer.node_copy(piece, env.__getitem__)
            continue
        inputs, outputs = interface(piece)
        inputs += _hidden_symbols(inputs, symbols)
        key = _key(piece, inputs, outputs)
        if key not in regions:
            module = extract(gm, piece, inputs, outputs)
            regions[key] = Region(module, [example(node) for node in inputs], key)
            modules.add_module(f"region_{len(regions) - 1}", regions[key])
        regions[key].calls += 1
        call = outer.call_module(f"region_{list(regions).index(key)}", tuple(env[node] for node in inputs))
        for index, node in enumerate(outputs):
            env[node] = outer.call_function(operator.getitem, (call, index))
            set_example(env[node], example(node))
    return list(regions.values()), GraphModule(modules, outer)


def pieces(graph: Graph, outside: Collection[Node] = ()) -> Iterator[Node | list[Node]]:
    """Nodes that stay outside, those of `outside` among them, and lists of nodes that form a region, in order."""
    region: list[Node] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or node in outside or _on_packed(node):
            if region and node.op != "placeholder":
                yield region
                region = []
            yield node
        elif node.op != "get_attr":
            region.append(node)


def _on_packed(node: Node) -> bool:
    """Whether `node` makes, reads, unpacks or measures packed tensors."""
    if isinstance(node.target, Instruction) or any(map(is_packed, node.all_input_nodes)):
        return True
    return node.target is operator.getitem and isinstance(node.args[0].target, Instruction)


def _hidden_symbols(inputs: list[Node], symbols: dict[str, Node]) -> list[Node]:
    """Symbols that stand in the shape of an input only inside an expression: they come in as inputs of their own."""
    plain, needed = set(), {}
    for node in inputs:
        held = example(node)
        for size in (*held.shape, *held.stride()) if isinstance(held, Tensor) else (held,):
            if isinstance(size, torch.SymInt):
                plain.add(str(size))
                if isinstance(held, Tensor):
                    needed.update(dict.fromkeys(str(symbol) for symbol in size.node.expr.free_symbols))
    return [symbols[name] for name in needed if name not in plain and name in symbols]


def _key(nodes: Iterable[Node], inputs: Iterable[Node], outputs: Iterable[Node]) -> str:
    """Text that is equal for nodes which compile to the same code, with these inputs and outputs."""
    names: dict[Node, _Name] = {}
    lines = []

    def name(node: Node) -> _Name:
        if node not in names:
            names[node] = _Name(f"%{len(names)}")
            if node.op == "get_attr":
                lines.append(_contents(operator.attrgetter(str(node.target))(node.graph.owning_module)))
        return names[node]

    lines += [f"{name(node)} {_describe(example(node))}" for node in inputs]
    for node in nodes:
        operands = torch.fx.node.map_arg((node.args, node.kwargs), name)
        lines.append(f"{name(node)} {node.op} {node.target} {operands}")
    return "\n".join([*lines, str([name(node) for node in outputs])])


def _contents(constant: Any) -> str:
    """Text that tells constants apart by what they hold."""
    if isinstance(constant, Tensor):
        digest = hashlib.sha256(constant.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return f"{_describe(constant)} {digest.hexdigest()}"
    return _key(constant.graph.nodes, (), ()) if isinstance(constant, GraphModule) else repr(constant)


class _Name(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _describe(held: Any) -> str:
    if isinstance(held, Tensor):
        return f"{held.dtype}{tuple(held.shape)}{held.stride()} {held.device} {held.requires_grad}"
    return repr(held)
