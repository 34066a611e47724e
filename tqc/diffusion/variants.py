"""One compiled variant of a transformer: for calls that compute and share the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from tqc.backend import tqai
from tqc.diffusion.state import Generation
from tqc.ops import example
from tqc.passes.finders.attention_kind import JOINT, SELF
from tqc.passes.rewrites.share_attention import FULL, HALF, OTHER, OWN, SharedSite, Sharing, share_attention


class Action(NamedTuple):
    """What a call does with the attention of one layer.

    Attributes:
        step: FULL or OWN: of self-attention and of joint attention.
        guidance: FULL, OTHER or HALF: of self-attention, which goes before `step`.
        keep: whether the next step reads the result.
        lend: whether the other branch reads it in this step.
    """

    step: str = FULL
    guidance: str = FULL
    keep: bool = False
    lend: bool = False

    def of_kind(self, kind: str) -> tuple[str, bool]:
        """Source of a site of that kind, and whether its result is kept."""
        if kind == SELF:
            source = self.step if self.guidance == FULL else self.guidance
            return source, self.keep or self.lend
        return (self.step, self.keep) if kind == JOINT else (FULL, False)


class Call(NamedTuple):
    """The call of a transformer that runs in a thread."""

    generation: Generation
    branch: str
    other: str | None


class Variant:
    """A backend for dynamo that compiles a transformer's graphs for one row of actions, one a layer.

    Attributes:
        sites: what became of each attention site, by graph.
    """

    def __init__(
        self, row: tuple[Action, ...], blocks: list[str], options: Mapping[str, Any], running: threading.local
    ) -> None:
        self.row, self.blocks, self.options, self.running = row, blocks, options, running
        self.sites: list[list[SharedSite]] = []

    def __call__(self, gm: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        if all(action == Action() for action in self.row):
            return tqai(gm, example_inputs, options=self.options)
        gm = _copy(gm)
        sharing = share_attention(gm, self._decide)
        self.sites.append(sharing.sites)
        if sharing.inputs or sharing.outputs:
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
                raise RuntimeError(
                    "attention that is shared between calls has no gradients: call the transformer under "
                    "torch.no_grad() or torch.inference_mode()"
                )
            placeholders = list(gm.graph.find_nodes(op="placeholder"))[len(example_inputs) :]
            example_inputs = [*example_inputs, *map(example, placeholders)]
        compiled = tqai(gm, example_inputs, options=self.options)
        return _StepGraph(compiled, sharing, self) if sharing.inputs or sharing.outputs else compiled

    def layer_of(self, name: str) -> int | None:
        """The layer that a site lies in; None outside all."""
        return next((n for n, block in enumerate(self.blocks) if name.startswith(f"{block}.")), None)

    def _decide(self, name: str, kind: str) -> tuple[str, bool]:
        layer = self.layer_of(name)
        return (FULL, False) if layer is None else self.row[layer].of_kind(kind)


def _copy(gm: GraphModule) -> GraphModule:
    """The same graph again: dynamo asks its own for where each input comes from, and ours gets more of them."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copied = GraphModule(gm, graph)
    copied.meta.update(gm.meta)
    return copied


class _StepGraph:
    """A graph that reads the state of its thread's generation, and adds to it."""

    def __init__(self, compiled: Callable[..., Any], sharing: Sharing, variant: Variant) -> None:
        self.compiled, self.running = compiled, variant.running
        self.inputs = [(site.source, self._key(site, variant)) for site in sharing.inputs]
        self.outputs = [self._key(site, variant) for site in sharing.outputs]
        self.taken = [self._key(site, variant) for site in sharing.inputs if site.source == OTHER and site.keep]

    @staticmethod
    def _key(site: SharedSite, variant: Variant) -> tuple[int, str]:
        layer = variant.layer_of(site.name)
        assert layer is not None
        return layer, site.name

    def __call__(self, *args: Any) -> Any:
        generation, branch, other = self.running.call
        states = [generation.read(branch if source == OWN else other, site) for source, site in self.inputs]
        results = self.compiled(*args, *states)
        count = len(results) - len(self.outputs)
        for site, state in zip(self.outputs, results[count:], strict=True):
            generation.keep(branch, site, state)
        for site in self.taken:
            generation.take_over(branch, other, site)
        return results[:count]


__all__ = ["FULL", "HALF", "OTHER", "OWN", "Action", "Call", "Variant"]
