"""The dynamo backend: `torch.compile(model, backend="tqai", options={...})`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from tqc import optimized_module, report, runtime
from tqc.config import Config
from tqc.passes import rewrite
from tqc.regions import SplitGraph

log = logging.getLogger(__name__)
_numbers = itertools.count()
optimized_module.install()


def tqai(
    gm: GraphModule, example_inputs: list[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile one dynamo graph with packed caches; `options` are the fields of `Config`, `mode` names a preset.

    Raises:
        ValueError, TypeError: for options that do not exist or do not fit.
        RuntimeError: if gradients are wanted; codes have none.
    """
    config = Config.from_options(options, mode)
    if config.off:
        return _rest(gm, example_inputs, config)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        raise RuntimeError(
            'backend="tqai" compiles inference only, a packed cache has no gradients: call the model under '
            "torch.no_grad() or torch.inference_mode()"
        )
    number = next(_numbers)
    plan = rewrite(gm, config, number)
    report.record(plan)
    if not any(node.target in runtime.BOUNDARY for node in gm.graph.nodes):
        return _rest(gm, example_inputs, config)
    graph = SplitGraph(gm, config.rest)
    log.info("graph %d: %d kinds of regions", number, len(graph.regions))
    return graph


def _rest(gm: GraphModule, example_inputs: list[Any], config: Config) -> Callable[..., Any]:
    """What compiles a graph without packed tensors: just what Inductor alone would do, or nothing."""
    if config.rest == "eager":
        return gm.forward
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, example_inputs)
