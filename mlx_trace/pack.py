"""The passes on captured graphs: which caches of a model are packed, and programs that read and write them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import mlx.nn as nn
from torch.fx import GraphModule, Node

from tqc.config import Config
from tqc.mlx_trace import kernels
from tqc.mlx_trace.caches import leaves, may_pack
from tqc.mlx_trace.capture import Captured, capture
from tqc.mlx_trace.graph import CaptureError
from tqc.mlx_trace.packed_cache import Formats
from tqc.mlx_trace.realize import realize
from tqc.ops import PackedValue, example, set_example
from tqc.passes import rewrite
from tqc.passes.finders.cache import find_latents
from tqc.passes.plan import DENSE, FUSE, PACK, READ, SKIPPED, Plan, Site, make_plan

LATENTS = "the cache holds latents: keys and values are computed from what it holds, decoded"


@dataclass
class Choice:
    """What becomes of a model's caches.

    Attributes:
        formats: of keys and values, by the number of a cache that is packed.
        reasons: why others are not, by the layer.
        latents: layers whose keys and values are computed from one array of a cache that is packed.
    """

    formats: dict[int, Formats] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    latents: set[int] = field(default_factory=set)


def choose(model: nn.Module, caches: list[Any], batch: int, length: int, config: Config) -> Choice:
    """Ask the passes which caches can be packed, on a graph in which all of them grow.

    Raises:
        CaptureError: for what cannot be captured.
    """
    candidates = {at for at, cache in enumerate(leaves(caches)) if may_pack(cache)}
    plan = make_plan(capture(model, caches, batch, length, candidates).gm, config)
    choice = Choice(reasons={site.layer: site.reason for site in plan.with_action(DENSE) if site.layer is not None})
    for site in plan.with_action(PACK):
        assert site.key and site.key.past and site.k_fmt and site.v_fmt and site.layer is not None
        choice.formats[int(site.key.past.meta["path"].split(".")[1])] = (site.k_fmt, site.v_fmt)
    for site in plan.with_action(DENSE):
        if site.layer is not None and site.reason != SKIPPED and (found := _latents(site, config)):
            at, formats = found
            choice.formats[at] = formats
            choice.latents.add(site.layer)
            choice.reasons.pop(site.layer)
    return choice


def _latents(site: Site, config: Config) -> tuple[int, Formats] | None:
    """The cache of a site whose keys and values are computed from one array, as DeepSeek's are from its latents; the
    other array, the rotary key, is in the mask. And the formats of both."""
    held = find_latents(site.attention.key, site.attention.value)
    past = held[0].past if len(held) == 1 else None
    if past is None or held[0].keep is not None:
        return None
    at = past.meta["path"].split(".")[1]
    parts = [node for node in past.graph.nodes if node.meta.get("path", "").startswith(f"cache.{at}.")]
    shapes = [example(part).shape for part in parts]
    if len(parts) != 2 or any(shape[1] != shapes[0][1] or shape[3] % 8 for shape in shapes):
        return None
    sizes = int(shapes[0][3]), int(shapes[1][3])
    return int(at), config.of_layer(site.layer or 0, int(shapes[0][1]), *sizes).formats(*sizes, None, None)


def _ask_lengths_first(gm: GraphModule) -> None:
    """Move questions about the lengths of inputs to the inputs: a mask is in a trace where it is first used, which may
    be behind the op that consumes the cache."""
    last = gm.graph.find_nodes(op="placeholder")[-1]
    for node in gm.graph.find_nodes(op="call_method", target="size"):
        if isinstance(source := node.args[0], Node) and source.op == "placeholder":
            last.append(node)


def pack(captured: Captured, choice: Choice, config: Config, keep_texts: bool = False) -> Plan:
    """Rewrite and realize a graph that was captured with packed caches, in place.

    Args:
        keep_texts: as in `tqc.passes.rewrite`.

    Raises:
        CaptureError: if attention cannot read a cache that is packed.
    """
    for node in captured.gm.graph.find_nodes(op="placeholder"):
        kind, *rest = node.meta["path"].split(".")
        if kind == "cache" and int(rest[0]) in choice.formats:
            held, fmt = example(node), choice.formats[int(rest[0])][int(rest[1])]
            batch, heads, length, _ = held.shape
            set_example(node, PackedValue(fmt, batch, heads, length, held.dtype, held.device))
    _ask_lengths_first(captured.gm)
    dense = tuple(choice.reasons)
    plan = rewrite(captured.gm, replace(config, skip_layers=dense), keep_texts=keep_texts)
    for site in plan.with_action(DENSE):
        if site.layer in choice.latents:
            site.action, site.reason, site.kernel = READ, "", kernels.REFERENCE
            site.notes.append(LATENTS)
            continue
        if site.layer not in choice.reasons:
            raise CaptureError(f"{site.attention.name} cannot read its packed cache: {site.reason}")
        site.reason = choice.reasons[site.layer]
    for site in plan.with_action(FUSE):
        site.kernel = kernels.provider()
    realize(captured.gm)
    return plan
