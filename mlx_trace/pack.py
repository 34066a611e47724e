"""The passes on captured graphs: which caches of a model are packed, and programs that read and write them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import mlx.nn as nn

from tqc.config import Config
from tqc.mlx_trace import kernels
from tqc.mlx_trace.caches import leaves, may_pack
from tqc.mlx_trace.capture import Captured, capture
from tqc.mlx_trace.graph import CaptureError
from tqc.mlx_trace.packed_cache import Formats
from tqc.mlx_trace.realize import realize
from tqc.ops import PackedValue, example, set_example
from tqc.passes import rewrite
from tqc.passes.plan import DENSE, FUSE, PACK, Plan, make_plan


@dataclass
class Choice:
    """What becomes of a model's caches.

    Attributes:
        formats: of keys and values, by the number of a cache that is packed.
        reasons: why others are not, by the layer.
    """

    formats: dict[int, Formats] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)


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
        if site.notes:  # latents, which torch reads decoded
            choice.reasons[site.layer] = site.notes[0]
            continue
        choice.formats[int(site.key.past.meta["path"].split(".")[1])] = (site.k_fmt, site.v_fmt)
    return choice


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
    dense = tuple(choice.reasons)
    plan = rewrite(captured.gm, replace(config, skip_layers=dense), keep_texts=keep_texts)
    for site in plan.with_action(DENSE):
        if site.layer not in choice.reasons:
            raise CaptureError(f"{site.attention.name} cannot read its packed cache: {site.reason}")
        site.reason = choice.reasons[site.layer]
    for site in plan.with_action(FUSE):
        site.kernel = kernels.provider()
    realize(captured.gm)
    return plan
