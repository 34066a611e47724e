"""Cut a rewritten graph at the calls on packed tensors, and compile each kind of region between them once.

The regions of a decoder (from one layer's attention to the next's) differ in their weights alone, and weights are
inputs: all but the first and the last are one region, compiled once and called for every layer. No packed tensor
enters a region, so Inductor sees ordinary, mostly static graphs.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch.fx import Graph, GraphModule, Node

from tqc.execute import calls as runtime
from tqc.execute import chains
from tqc.execute.matrix_vector import decompositions
from tqc.passes.graph import is_packed, value

# Compiled regions and their entries, by text and wrapper: graphs that differ in what lies outside them share them.
_compiled: dict[tuple[str, bool], tuple[Callable[..., Any], int | None]] = {}
# A region that stands for this many layers gets Inductor's C++ wrapper: no Python runs between its kernels, which saves
# some 80 us a layer and costs a few seconds of compiling.
_WORTH_A_WRAPPER = 4
# void (AtenTensorHandle* inputs, AtenTensorHandle* outputs): what that wrapper exports.
_ENTRY = "_Z19inductor_entry_implPP16AtenTensorOpaqueS1_"


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
        return [value(node) for node in next(iter(reversed(self.module.graph.nodes))).args[0]]

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
        key = self.key, self.worth_a_wrapper
        if key not in _compiled:
            _compiled[key] = _inductor(self.module, self.examples, self.worth_a_wrapper)
        self.run, self.entry = _compiled[key]

    def forward(self, *args: Any) -> Any:
        return self.run(*args)


def _is_symbolic(example: Any) -> bool:
    if isinstance(example, Tensor):
        return any(isinstance(n, torch.SymInt) for n in (*example.shape, *example.stride()))
    return isinstance(example, (torch.SymInt, torch.SymFloat))


def _inductor(
    module: GraphModule, examples: list[Any], cpp_wrapper: bool = False
) -> tuple[Callable[..., Any], int | None]:
    """`module` compiled, and the address of its entry if C++ can call it. Where it neither writes nor aliases its
    inputs, AOTAutograd's wrapper around the compiled code would do nothing for some 20 us a call, and is left out."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    compiled: list[Any] = []

    def inner_compile(gm: GraphModule, inputs: Any, **kwargs: Any) -> Any:
        result = compile_fx_inner(gm, inputs, **kwargs)
        compiled.append((result, len(inputs)))
        return result

    context = TracingContext(detect_fake_mode(examples))
    # AOTAutograd's own cache would return the wrapper without asking for the code inside; Inductor's stays on.
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        tracing(context),
        functorch_config.patch(enable_autograd_cache=False),
        inductor_config.patch(cpp_wrapper=cpp_wrapper),
    ):
        function = compile_fx(module, examples, inner_compile=inner_compile, decompositions=decompositions())
    if len(compiled) != 1 or not _plain(context.fw_metadata) or compiled[0][1] != len(examples):
        return function, None
    code = compiled[0][0]
    return lambda *args: code(list(args)), _entry(code) if cpp_wrapper else None


def _entry(code: Any) -> int | None:
    """Address of the entry that a C++ wrapper exports, or None if Python does more than to call it with handles."""
    wrapper = code.current_callable
    names = getattr(wrapper, "__code__", None) and (*wrapper.__code__.co_names, *wrapper.__code__.co_varnames)
    handles = {"unsafe_alloc_void_ptrs_from_tensors", "alloc_tensors_by_stealing_from_void_ptrs"}
    if not names or not handles <= set(names) or not {"item", "constants_tensor"}.isdisjoint(names):
        return None
    library = ctypes.CDLL(wrapper.__closure__[0].cell_contents.__self__.__file__)
    return ctypes.cast(library[_ENTRY], ctypes.c_void_p).value if hasattr(library, _ENTRY) else None


def _plain(metadata: Any) -> bool:
    """Whether inputs and outputs of the compiled code are just those of the graph."""
    return (
        metadata is not None
        and not metadata.num_mutated_inp_runtime_indices
        and not metadata.num_outputs_aliased
        and not metadata.num_intermediate_bases
        and not metadata.tokens
    )


class SplitGraph:
    """A rewritten graph that runs as regions and calls on packed tensors in turn.

    A graph whose regions are all static runs eagerly once and is compiled at its second call: dynamo makes such
    graphs for lengths that it meets only once. Any other graph is compiled at once, while dynamo still collects the
    guards that Inductor adds, and so is one that is wanted `at_once`.
    """

    def __init__(self, gm: GraphModule, rest: str, at_once: bool = False) -> None:
        self.regions, self.outer = split(gm)
        self.chains = chains.link(self.outer) if rest == "inductor" else []
        self._forward = self.outer.forward
        self._calls = 0
        self._lazy = rest == "inductor"
        if self._lazy and (at_once or any(region.symbolic for region in self.regions)):
            self.compile()

    def compile(self) -> None:
        self._lazy = False
        for region in self.regions:
            region.compile_with_inductor()
        for chain in self.chains:
            chain.compile_with_provider()

    def __call__(self, *args: Any) -> Any:
        if self._lazy:
            self._calls += 1
            if self._calls == 2:
                self.compile()
        return self._forward(*args)


def split(gm: GraphModule) -> tuple[list[Region], GraphModule]:
    """The distinct regions of `gm`, and the graph that calls them."""
    outer = Graph()
    env: dict[Node, Node] = {}
    modules = torch.nn.Module()
    regions: dict[str, Region] = {}
    symbols = {
        str(value(node)): node
        for node in gm.graph.nodes
        if node.op == "placeholder" and isinstance(value(node), torch.SymInt)
    }
    for piece in _pieces(gm.graph):
        if isinstance(piece, Node):
            env[piece] = outer.node_copy(piece, env.__getitem__)
            continue
        inputs, outputs = _interface(piece, symbols)
        region = _make_region(gm, piece, inputs, outputs)
        if region.key in regions:
            region = regions[region.key]
        else:
            regions[region.key] = region
            modules.add_module(f"region_{len(regions) - 1}", region)
        name = next(name for name, module in modules.named_children() if module is region)
        region.calls += 1
        call = outer.call_module(name, tuple(env[node] for node in inputs))
        for index, node in enumerate(outputs):
            env[node] = outer.call_function(operator.getitem, (call, index))
            env[node].meta["example_value"] = value(node)
    return list(regions.values()), GraphModule(modules, outer)


def _pieces(graph: Graph) -> Iterator[Node | list[Node]]:
    """Nodes that stay outside, and lists of nodes that form a region, in order."""
    region: list[Node] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or _on_packed(node):
            if region and node.op != "placeholder":
                yield region
                region = []
            yield node
        elif node.op != "get_attr":
            region.append(node)


def _on_packed(node: Node) -> bool:
    """Whether `node` makes, reads, unpacks or measures packed tensors."""
    if node.target in runtime.BOUNDARY or any(is_packed(source) for source in node.all_input_nodes):
        return True
    return node.target is operator.getitem and node.args[0].target in runtime.BOUNDARY


def _interface(region: list[Node], symbols: dict[str, Node]) -> tuple[list[Node], list[Node]]:
    """Nodes that a region reads from outside, in order of first use, and those of its own that others read."""
    members = set(region)
    inputs = dict.fromkeys(
        source
        for node in region
        for source in node.all_input_nodes
        if source not in members and source.op != "get_attr"
    )
    # A symbol that stands in some input's shape only inside an expression must come in as an input of its own.
    plain, needed = set(), {}
    for node in inputs:
        example = value(node)
        if isinstance(example, torch.SymInt):
            plain.add(str(example))
        elif isinstance(example, Tensor):
            for size in (*example.shape, *example.stride()):
                if isinstance(size, torch.SymInt):
                    plain.add(str(size))
                    needed.update(dict.fromkeys(str(symbol) for symbol in size.node.expr.free_symbols))
    inputs.update(dict.fromkeys(symbols[name] for name in needed if name not in plain and name in symbols))
    outputs = [node for node in region if any(user not in members for user in node.users)]
    return list(inputs), outputs


def _make_region(gm: GraphModule, nodes: list[Node], inputs: list[Node], outputs: list[Node]) -> Region:
    graph = Graph()
    env: dict[Node, Node] = {}
    for index, node in enumerate(inputs):
        env[node] = graph.placeholder(f"arg{index}")
        env[node].meta["example_value"] = value(node)
    constants: list[Node] = []
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in env:
                env[source] = graph.node_copy(source)
                constants.append(source)
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in outputs))
    examples = [value(node) for node in inputs]
    return Region(GraphModule(gm, graph), examples, _key(graph, examples, constants))


def _key(graph: Graph, examples: list[Any], constants: list[Node]) -> str:
    """Text that is equal for regions which compile to the same code."""
    names = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    lines = [_describe(example) for example in examples]
    for node in graph.nodes:
        args = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: _Name(names[n]))
        lines.append(f"{names[node]} {node.op} {node.target if node.op != 'placeholder' else ''} {args}")
    if constants:
        lines.append(f"constants of {[id(node) for node in constants]}")
    if any(_is_symbolic(example) for example in examples):
        lines.append(f"symbols of {id(detect_fake_mode(examples))}")
    return "\n".join(lines)


class _Name(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _describe(example: Any) -> str:
    if isinstance(example, Tensor):
        return f"{example.dtype}{tuple(example.shape)}{example.stride()} {example.device} {example.requires_grad}"
    return repr(example)
