"""The dynamo backend: `torch.compile(model, backend="tqai", options={...})`."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tqc import optimized_module, recompiles, report
from tqc.cache.packed_tensor import PackedTensor
from tqc.config import Config
from tqc.execute import cuda_graphs
from tqc.execute.realize import realize
from tqc.execute.split_graph import SplitGraph
from tqc.execute.watch import watch
from tqc.lowering.select import named
from tqc.ops import Op, PackedValue, example, set_example
from tqc.ops.effects import written
from tqc.passes import rewrite
from tqc.passes.edit import fake_mode
from tqc.passes.plan import Plan
from tqc.torch_private import compile_fx, frame_number

log = logging.getLogger(__name__)
_numbers = itertools.count()


def tqai(
    gm: GraphModule, example_inputs: list[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compile one dynamo graph with packed caches; `options` are the fields of `Config`, `mode` names a preset or is
    "reduce-overhead", which sets `cuda_graphs`.

    Raises:
        ValueError, TypeError: for options that do not exist or do not fit.
        RuntimeError: if gradients are wanted of a graph with a packed cache; codes have none.
    """
    config = Config.from_options(options, mode)
    named(config.provider)
    if config.off:
        return _rest(gm, example_inputs, config)
    number = next(_numbers)
    settle_floats(gm)
    type_caches(gm)
    plan = rewrite(gm, config, number, keep_texts=report.wants_texts())
    report.record(plan)
    report.warn_if_dense(plan)
    if not any(isinstance(node.target, Op) for node in gm.graph.nodes):
        return _rest(gm, example_inputs, config)
    recompiles.count(frame_number())
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        raise RuntimeError(
            'backend="tqai" compiles inference only, a packed cache has no gradients: call the model under '
            "torch.no_grad() or torch.inference_mode()"
        )
    for layer, (name, refusals) in realize(gm, config.provider).items():
        plan.sites[layer].kernel = name
        plan.sites[layer].notes += refusals
    if config.watcher:
        site = watch(gm, config.watcher, [site.layer for site in plan.sites])
        if site is not None:
            plan.sites[site].notes.append(f"watched by monitor {config.watcher.name}")
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


def settle_floats(gm: GraphModule) -> None:
    """Put numbers in the place of symbolic floats, which dynamo makes of a module's attributes (`dynamic=True`, or two
    models that differ in one): a scale is part of how attention is realized, and a region cannot read one from a
    tensor. To ask for the number is a guard on it."""
    for node in gm.graph.nodes:
        if isinstance(example(node), torch.SymFloat):
            number = float(example(node))
            for user in list(node.users):
                swap = functools.partial(_instead, node, number)
                user.args, user.kwargs = torch.fx.node.map_arg((user.args, user.kwargs), swap)
            if node.op != "placeholder":
                gm.graph.erase_node(node)


def _instead(node: Node, number: float, operand: Node) -> Any:
    return number if operand is node else operand


def type_caches(gm: GraphModule) -> None:
    """Give the nodes that hold packed tensors the dialect's type; what torch ops make of them is dense."""
    for node in gm.graph.nodes:
        held = example(node)
        if not isinstance(held, PackedTensor):
            continue
        batch, heads, length, _ = held.shape
        value = PackedValue(held.fmt, batch, heads, length, held.dtype, held.device)
        with fake_mode(gm.graph):
            set_example(node, value if node.op == "placeholder" or written(node) else value.empty())


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
    patches = {"triton.cudagraphs": True} if config.cuda_graphs else None
    return compile_fx(gm, example_inputs, config_patches=patches)


tqai.reset = recompiles.forget  # type: ignore[attr-defined]  # called by torch._dynamo.reset
optimized_module.install(tqai)
recompiles.install()
