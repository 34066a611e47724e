"""Let attention of a denoising step be what it was before: in the last step, or in the other guidance branch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from tqc.ops import TENSORS, example, set_example
from tqc.passes.edit import fake_mode, insert
from tqc.passes.finders.attention import find_attention
from tqc.passes.finders.attention_kind import attention_kind
from tqc.passes.finders.sdpa import SDPA
from tqc.passes.finders.site import Attention
from tqc.passes.graph import argument, calls, layer_name, writers
from tqc.torch_private import MODULE_STACK

FULL = "full"  # computed
OWN = "own"  # what it was in the last step
OTHER = "other"  # what it was in the guidance branch that was called before in this step
HALF = "half"  # computed for the second half of the batch, and used for both
# As dynamo spells the children of the module that it was called with.
_MODULES = re.compile(r"(?:__dict__\['_modules'\]|_modules)\['([^']+)'\]")


@dataclass(frozen=True)
class SharedSite:
    """What becomes of one site.

    Attributes:
        name: path of its module, with a number behind where that has several.
        kind: see `attention_kind`.
        source: FULL, OWN, OTHER or HALF.
        keep: whether its result leaves the graph for a later call, where it is computed.
        note: why it is computed though it was to be shared, if so.
    """

    name: str
    kind: str
    source: str
    keep: bool
    note: str = ""


@dataclass
class Sharing:
    """A graph after `share_attention`: the inputs and outputs behind its own, by the sites that they belong to."""

    sites: list[SharedSite] = field(default_factory=list)
    inputs: list[SharedSite] = field(default_factory=list)
    outputs: list[SharedSite] = field(default_factory=list)


def share_attention(gm: GraphModule, decide: Callable[[str, str], tuple[str, bool]]) -> Sharing:
    """Of each attention site, share what `decide(name, kind)` says, which gives `source` and `keep` of a site.

    Before:  out = sdpa(linear(x), linear(x), linear(x)); return f(out)
    After:   OWN, OTHER: state = placeholder; return f(state.transpose(1, 2))      # the projections are gone
             HALF:       half = sdpa(q.chunk(2)[1], k.chunk(2)[1], v.chunk(2)[1]); return f(cat([half, half]))
             keep:       return f(out), out.transpose(1, 2).contiguous()

    A state of four dimensions is [batch, n, query_heads, head_dim], which is how kernels lay it out. A graph in which
    nothing is shared or kept stays as it was.
    """
    sharing, kept, gone = Sharing(), [], []
    last = next((node for node in reversed(gm.graph.nodes) if node.op == "placeholder"), None)
    if last is None:
        return sharing
    names: dict[str, int] = {}
    for site in find_attention(gm.graph):
        name = _MODULES.sub(r"\1", layer_name(site.output))
        names[name] = names.get(name, 0) + 1
        name = name if names[name] == 1 else f"{name}#{names[name]}"
        kind = attention_kind(site)
        source, keep = decide(name, kind)
        note = ""
        if source == HALF and not calls(site.output, *SDPA):
            source, note = FULL, "this spelling of attention cannot be cut into the branches of a batch"
        shared = SharedSite(name, kind, source, keep, note)
        sharing.sites.append(shared)
        result = site.output
        if source in (OWN, OTHER):
            with gm.graph.inserting_after(last):
                last = _state_input(gm, site, f"step_state_{len(sharing.inputs)}")
            sharing.inputs.append(shared)
            with gm.graph.inserting_before(site.output):
                result = _swapped(gm, last)
        elif source == HALF:
            with gm.graph.inserting_before(site.output):
                result = _of_half(gm, site)
        if result is not site.output:
            site.output.replace_all_uses_with(result)
            gone.append(site.output)
        if keep and source in (FULL, HALF):
            sharing.outputs.append(shared)
            kept.append(result)
    if kept:
        _add_outputs(gm, kept)
    if gone:
        _settle_casts(gm)
        _erase(gm, gone)
    if kept or gone:
        gm.graph.lint()
        gm.recompile()
    return sharing


def _swapped(gm: GraphModule, node: Node) -> Node:
    return insert(gm.graph, "transpose", node, 1, 2) if example(node).dim() == 4 else node


def _state_input(gm: GraphModule, site: Attention, name: str) -> Node:
    node = gm.graph.placeholder(name)
    held = example(site.output)
    shape = held.transpose(1, 2).shape if held.dim() == 4 else held.shape
    with fake_mode(gm.graph):
        set_example(node, torch.empty(shape, dtype=held.dtype, device=held.device))
    return node


def _of_half(gm: GraphModule, site: Attention) -> Node:
    output, graph = site.output, gm.graph

    def half(node: Node) -> Node:
        return insert(graph, "__getitem__", insert(graph, "chunk", node, 2), 1)

    batch = example(output).shape[0]
    tensors = {name: argument(output, i, name) for i, name in enumerate(("query", "key", "value"))}
    halves = {name: half(node) for name, node in tensors.items()}
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    rest = {name: value for i, name in enumerate(names, 3) if (value := argument(output, i, name)) is not None}
    mask = rest.get("attn_mask")
    if isinstance(mask, Node) and example(mask).dim() == 4 and example(mask).shape[0] == batch:
        rest["attn_mask"] = half(mask)
    with_half = insert(graph, SDPA[0], *halves.values(), **rest)
    with_half.meta[MODULE_STACK] = output.meta.get(MODULE_STACK)
    return insert(graph, torch.cat, [with_half, with_half])


def _add_outputs(gm: GraphModule, kept: list[Node]) -> None:
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        extra = [insert(gm.graph, "contiguous", _swapped(gm, node)) for node in kept]
    output.args = ((*output.args[0], *extra),)


def _settle_casts(gm: GraphModule) -> None:
    """Cast to a dtype where a tensor is asked for nothing else: `out.type_as(query)` would keep the query."""
    for node in list(gm.graph.nodes):
        if calls(node, "type_as"):
            like = example(argument(node, 1, "other"))
            with gm.graph.inserting_before(node):
                cast = insert(gm.graph, "to", node.args[0], like.device, like.dtype)
            cast.meta[MODULE_STACK] = node.meta.get(MODULE_STACK)
            node.replace_all_uses_with(cast)
            gm.graph.erase_node(node)


def _erase(gm: GraphModule, gone: list[Node]) -> None:
    """Erase what led to these and to nothing else, writes in place into it included."""
    behind: set[Node] = set()
    waiting = list(gone)
    while waiting:
        node = waiting.pop()
        if node not in behind and node.op not in ("placeholder", "get_attr"):
            behind.add(node)
            waiting += [*node.all_input_nodes, *(writers(node) if isinstance(example(node), TENSORS) else ())]
    alive = set()
    waiting = [node for node in gm.graph.nodes if node not in behind]
    while waiting:
        node = waiting.pop()
        if node not in alive:
            alive.add(node)
            waiting += [*node.all_input_nodes, *(writers(node) if isinstance(example(node), TENSORS) else ())]
    for node in reversed(list(gm.graph.nodes)):
        if node not in alive:
            gm.graph.erase_node(node)
