"""One compiled variant of a transformer: for calls that compute and share the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from tqc.backend import tqai
from tqc.diffusion.flops import count_flops
from tqc.diffusion.state import Generation
from tqc.ops import example
from tqc.passes.finders.attention_kind import JOINT, SELF
from tqc.passes.rewrites.share_attention import FULL, HALF, NEAR, OTHER, OWN, SharedSite, Use, share_attention
from tqc.passes.rewrites.share_blocks import share_blocks
from tqc.passes.rewrites.step_state import ATTENTION, BLOCK, WINDOW, Sharing, StateGraph, StateKey

_OF_STATE = {FULL: FULL, ATTENTION: OWN, WINDOW: NEAR, BLOCK: FULL}


class Action(NamedTuple):
    """What a call does with one layer.

    Attributes:
        source: FULL, or what its states are of: ATTENTION and WINDOW of self-attention and joint attention, BLOCK of
            the whole layer.
        terms: of how many computed steps these are.
        guidance: FULL, OTHER or HALF: of self-attention that is computed.
        keep: the states that a later step reads.
        lend: whether the other branch reads what attention gives in this step.
    """

    source: str = FULL
    terms: int = 1
    guidance: str = FULL
    keep: tuple[str, ...] = ()
    lend: bool = False

    def of_kind(self, kind: str, window: float) -> Use:
        """What becomes of a site of that kind."""
        if kind not in (SELF, JOINT):
            return Use()
        source = _OF_STATE[self.source]
        keep = tuple(what for what in self.keep if what != BLOCK)
        if kind == SELF:
            source = source if self.guidance == FULL else self.guidance
            keep = (*keep, ATTENTION) if self.lend and ATTENTION not in keep else keep
        return Use(source, self.terms, keep, window)


class Call(NamedTuple):
    """The call of a transformer that runs in a thread."""

    generation: Generation
    name: str
    other: str | None


class Variant:
    """A backend for dynamo that compiles a transformer's graphs for one row of actions, one a layer.

    Attributes:
        sites: what became of each attention site, by graph.
        notes: why blocks are computed that were to be shared.
        flops: floating point operations of a call, by "attention" and "total".
    """

    def __init__(
        self,
        row: tuple[Action, ...],
        blocks: list[str],
        options: Mapping[str, Any],
        running: threading.local,
        window: float = 0.0,
    ) -> None:
        self.row, self.blocks, self.options, self.running, self.window = row, blocks, options, running, window
        self.sites: list[list[SharedSite]] = []
        self.notes: list[str] = []
        self.flops = {"attention": 0, "total": 0}

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        if all(action == Action() for action in self.row):
            self._count(gm)
            return tqai(gm, example_inputs, options=self.options)
        gm, sharing = self.rewrite(gm)
        if sharing.inputs or sharing.outputs:
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
                raise RuntimeError(
                    "attention that is shared between calls has no gradients: call the transformer under "
                    "torch.no_grad() or torch.inference_mode()"
                )
            placeholders = list(gm.graph.find_nodes(op="placeholder"))[len(example_inputs) :]
            example_inputs = [*example_inputs, *map(example, placeholders)]
        self._count(gm)
        compiled = tqai(gm, example_inputs, options=self.options)
        return StepGraph(compiled, sharing, self) if sharing.inputs or sharing.outputs else compiled

    def rewrite(self, gm: GraphModule) -> tuple[GraphModule, Sharing]:
        """A graph of dynamo's as this row has it, and the states it reads and keeps; `gm` stays as it is."""
        gm = copy_graph(gm)
        graph = StateGraph(gm)
        self.notes += share_blocks(graph, self.blocks, self._decide_block)
        self.sites.append(share_attention(graph, self._decide))
        return gm, graph.finish()

    def layer_of(self, key: StateKey) -> int:
        """The layer that a state is of."""
        layer = self._layer(key.name.partition("#")[0])
        assert layer is not None
        return layer

    def _count(self, gm: GraphModule) -> None:
        for name, count in count_flops(gm.graph).items():
            self.flops[name] += count

    def _layer(self, name: str) -> int | None:
        return next((n for n, block in enumerate(self.blocks) if f"{name}.".startswith(f"{block}.")), None)

    def _decide(self, name: str, kind: str) -> Use:
        layer = self._layer(name)
        return Use() if layer is None else self.row[layer].of_kind(kind, self.window)

    def _decide_block(self, layer: int) -> tuple[int, bool]:
        action = self.row[layer]
        return action.terms if action.source == BLOCK else 0, BLOCK in action.keep


def copy_graph(gm: GraphModule) -> GraphModule:
    """The same graph again: dynamo asks its own for where each input comes from, and ours gets more of them."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copied = GraphModule(gm, graph)
    copied.meta.update(gm.meta)
    return copied


class StepGraph:
    """A graph that reads the state of its thread's generation, and adds to it."""

    def __init__(self, compiled: Callable[..., Any], sharing: Sharing, variant: Variant) -> None:
        self.compiled, self.running, self.sharing = compiled, variant.running, sharing
        self.outputs = [(variant.layer_of(key), key) for key in sharing.outputs]
        others = [given.key for given in sharing.inputs if given.of_other]
        self.taken = [
            (layer, key._replace(what=what))
            for key in others
            for layer in [variant.layer_of(key)]
            for what in variant.row[layer].keep
            if what != BLOCK
        ]

    def __call__(self, *args: Any) -> Any:
        generation, branch, other = self.running.call
        states: list[Tensor] = []
        for given in self.sharing.inputs:
            of = other if given.of_other else branch
            states += [generation.read(of, given.key, n) for n in range(given.terms)]
            if given.terms > 1:
                states.append(generation.weights(of, given.key, given.terms).to(states[-1].device))
        results = self.compiled(*args, *states)
        count = len(results) - len(self.outputs)
        for (layer, key), state in zip(self.outputs, results[count:], strict=True):
            generation.keep(branch, layer, key, state)
        for layer, key in self.taken:
            generation.take_over(branch, other, layer, key)
        return results[:count]


__all__ = ["FULL", "HALF", "OTHER", "Action", "Call", "StepGraph", "Variant", "copy_graph"]
