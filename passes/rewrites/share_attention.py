"""Let attention of a denoising step be what it was before: in steps before, in a window, or in the other branch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.fx import Node

from tqc.ops import example
from tqc.passes.edit import insert
from tqc.passes.finders.attention import find_attention
from tqc.passes.finders.attention_kind import SELF, attention_kind
from tqc.passes.finders.sdpa import SDPA
from tqc.passes.finders.site import Attention
from tqc.passes.graph import argument, calls, layer_name, module_path
from tqc.passes.rewrites.half_batch import Half
from tqc.passes.rewrites.step_state import ATTENTION, WINDOW, StateGraph, StateInput, StateKey
from tqc.passes.rewrites.window_attention import why_no_window, window_attention
from tqc.torch_private import MODULE_STACK

FULL = "full"  # computed
OWN = "own"  # what it was in the steps before
NEAR = "near"  # computed in a window, and what that lacked in the last computed step
OTHER = "other"  # what it was in the guidance branch that was called before in this step
HALF = "half"  # computed for the second half of the batch, and used for both


class Use(NamedTuple):
    """What becomes of a site.

    Attributes:
        source: FULL, OWN, NEAR, OTHER or HALF.
        terms: of how many computed steps OWN is.
        keep: the states that leave the graph for a later call, where attention is computed: ATTENTION, WINDOW.
        window: share of the tokens that a query sees in a window.
    """

    source: str = FULL
    terms: int = 1
    keep: tuple[str, ...] = ()
    window: float = 0.0


@dataclass(frozen=True)
class SharedSite:
    """What became of one site.

    Attributes:
        name: path of its module, with a number behind where that has several.
        kind: see `attention_kind`.
        note: why it is computed though it was to be shared, if so.
    """

    name: str
    kind: str
    use: Use
    note: str = ""

    @property
    def source(self) -> str:
        return self.use.source


def share_attention(graph: StateGraph, decide: Callable[[str, str], Use]) -> list[SharedSite]:
    """Of each attention site, share what `decide(name, kind)` says.

    Before:  out = sdpa(linear(x), linear(x), linear(x)); return f(out)
    After:   OWN, OTHER: state = placeholder; return f(state.transpose(1, 2))      # the projections are gone
             NEAR:       near = window_attention(q, k, v); return f(near + state.transpose(1, 2))
             HALF:       half = sdpa(q, k, v of x.chunk(2)[1]); return f(cat([half, half]))
             keep:       return f(out), out.transpose(1, 2).contiguous()           # for windows, of out - near
    """
    names: dict[str, int] = {}
    return [_share(graph, site, _name(site, names), decide) for site in find_attention(graph.gm.graph)]


def _name(site: Attention, names: dict[str, int]) -> str:
    name = module_path(site.output) or layer_name(site.output)
    names[name] = names.get(name, 0) + 1
    return name if names[name] == 1 else f"{name}#{names[name]}"


def _share(graph: StateGraph, site: Attention, name: str, decide: Callable[[str, str], Use]) -> SharedSite:
    kind, output = attention_kind(site), site.output
    use, note = decide(name, kind), ""
    if use.source == HALF and not calls(output, *SDPA):
        use, note = use._replace(source=FULL), "this spelling of attention cannot be cut into the branches of a batch"
    if use.source == NEAR or WINDOW in use.keep:
        note = why_no_window(output) if kind == SELF else "only self-attention has windows"
        if note:
            keep = tuple(what for what in use.keep if what != WINDOW)
            use = use._replace(source=FULL if use.source == NEAR else use.source, keep=keep)
    key, result, near = StateKey(name, ATTENTION), output, None
    with graph.gm.graph.inserting_before(output):
        if use.source == HALF:
            result = _of_half(output)
        if use.source == NEAR or (WINDOW in use.keep and use.source in (FULL, HALF)):
            near = window_attention(output, use.window)
    if use.source in (OWN, OTHER):
        result = graph.read(StateInput(key, use.terms, use.source == OTHER), output, output)
    elif use.source == NEAR:
        lacked = graph.read(StateInput(key._replace(what=WINDOW)), output, output)
        with graph.gm.graph.inserting_before(output):
            result = insert(graph.gm.graph, torch.add, near, lacked)
    if result is not output:
        graph.replace(output, result)
    if use.source in (FULL, HALF):
        if ATTENTION in use.keep:
            graph.keep(key, result)
        if WINDOW in use.keep:
            with graph.gm.graph.inserting_after(result):
                graph.keep(key._replace(what=WINDOW), insert(graph.gm.graph, torch.sub, result, near))
    return SharedSite(name, kind, use, note)


def _of_half(output: Node) -> Node:
    half = Half(output.graph, example(output).shape[0])
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    tensors = [half(argument(output, i, name)) for i, name in enumerate(("query", "key", "value"))]
    rest = {name: value for i, name in enumerate(names, 3) if (value := argument(output, i, name)) is not None}
    mask = rest.get("attn_mask")
    if isinstance(mask, Node) and example(mask).dim() == 4 and example(mask).shape[0] == half.batch:
        rest["attn_mask"] = half.cut(mask)
    with_half = insert(output.graph, SDPA[0], *tensors, **rest)
    with_half.meta[MODULE_STACK] = output.meta.get(MODULE_STACK)
    return insert(output.graph, torch.cat, [with_half, with_half])
