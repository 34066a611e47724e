"""The dynamo backend: `torch.compile(model, backend="tqai", options={...})`."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from tqc import optimized_module, report
from tqc.config import Config
from tqc.execute import calls as runtime
from tqc.execute import cuda_graphs
from tqc.execute.regions import SplitGraph
from tqc.passes import rewrite
from tqc.passes.plan import Plan

log = logging.getLogger(__name__)
_numbers = itertools.count()
optimized_module.install()


def tqai(
    gm: GraphModule, example_inputs: list[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile one dynamo graph with packed caches; `options` are the fields of `Config`, `mode` names a preset or is
    "reduce-overhead", which sets `cuda_graphs`.

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
    reason = cuda_graphs.why_not(gm) if config.cuda_graphs else None
    recorded = config.cuda_graphs and reason is None
    graph = SplitGraph(gm, config.rest, at_once=recorded)
    log.info("graph %d: %d kinds of regions", number, len(graph.regions))
    if reason:
        _say_not_recorded(plan, number, reason)
    if not recorded:
        return graph
    plan.cuda_graph = "recorded as a CUDA graph"
    return cuda_graphs.CudaGraphs(graph, gm, functools.partial(_say_not_recorded, plan, number))


def _say_not_recorded(plan: Plan, number: int, reason: str) -> None:
    plan.cuda_graph = f"not recorded as a CUDA graph: {reason}"
    level = logging.INFO if reason == cuda_graphs.STARTS_A_CACHE else logging.WARNING
    log.log(level, "graph %d is %s", number, plan.cuda_graph)


def _rest(gm: GraphModule, example_inputs: list[Any], config: Config) -> Callable[..., Any]:
    """What compiles a graph without packed tensors: just what Inductor alone would do, or nothing."""
    if config.rest == "eager":
        if config.cuda_graphs:
            log.warning("a graph without a packed cache is not recorded as a CUDA graph: rest='eager' leaves it alone")
        return gm.forward
    from torch._inductor.compile_fx import compile_fx

    patches = {"triton.cudagraphs": True} if config.cuda_graphs else None
    return compile_fx(gm, example_inputs, config_patches=patches)
