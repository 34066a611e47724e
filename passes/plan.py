"""Decide for every attention site what becomes of it and its cache, and say why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tqc.config import Config, cacheable_dtype
from tqc.format import PackedFormat
from tqc.lowering import choose
from tqc.passes.find_attention import Attention, find_attention
from tqc.passes.find_cache import CacheWrite, find_cache
from tqc.passes.graph import value

# What becomes of a site.
FUSE = "fuse"  # attention reads the packed cache, new tokens are appended
PACK = "pack"  # attention is over this call's own tokens, and stays; the cache that leaves the graph is packed
DENSE = "dense"


@dataclass
class Site:
    """One attention site and what is done with it."""

    layer: int
    attention: Attention
    action: str = DENSE
    reason: str = ""
    key: CacheWrite | None = None
    value: CacheWrite | None = None
    k_fmt: PackedFormat | None = None
    v_fmt: PackedFormat | None = None
    provider: str = ""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "name": self.attention.name,
            "action": self.action,
            "reason": self.reason,
            "kernel": self.provider,
            "keys": str(self.k_fmt or ""),
            "values": str(self.v_fmt or ""),
            "notes": self.notes,
        }

    def __str__(self) -> str:
        what = f"{self.action} ({self.provider})" if self.provider else self.action
        return f"layer {self.layer} {self.attention.name}: {what}" + (f": {self.reason}" if self.reason else "")


@dataclass
class Plan:
    """Everything that the passes need to know about one graph, and what they report."""

    config: Config
    sites: list[Site]
    rewritten: dict[str, int] = field(default_factory=dict)

    def with_action(self, action: str) -> list[Site]:
        return [site for site in self.sites if site.action == action]


def make_plan(gm: GraphModule, config: Config) -> Plan:
    """Look at every attention site of `gm`; nothing is changed."""
    outputs = _outputs(gm)
    attentions = find_attention(gm.graph)
    sites = [Site(layer, attention) for layer, attention in enumerate(attentions)]
    skipped = {layer % len(sites) for layer in config.skip_layers if -len(sites) <= layer < len(sites)} if sites else set()
    for site in sites:
        if site.layer in skipped:
            site.reason = "named in skip_layers"
        else:
            _decide(site, config, outputs)
    return Plan(config, sites)


def _outputs(gm: GraphModule) -> set[Node]:
    output = next(node for node in gm.graph.nodes if node.op == "output")
    return {node for node in output.all_input_nodes}


def _decide(site: Site, config: Config, outputs: set[Node]) -> None:
    attention = site.attention
    key, val = find_cache(attention.key), find_cache(attention.value)
    for found in (key, val):
        if isinstance(found, str):
            site.reason = found
            return
    assert isinstance(key, CacheWrite) and isinstance(val, CacheWrite)
    site.key, site.value = key, val
    if key.kind != val.kind or key.packed != val.packed:
        site.reason = "keys and values are cached in different ways"
        return

    if key.packed:
        site.k_fmt, site.v_fmt = value(key.past).fmt, value(val.past).fmt
        site.reason = attention.reason or _why_not_fused(site) or ""
        action = FUSE
    else:
        site.reason = _why_not_packed(site, outputs) or ""
        if not site.reason:
            heads = [value(write.new).shape[-1] for write in (key, val)]
            site.k_fmt, site.v_fmt = config.formats(int(heads[0]), int(heads[1]))
        action = PACK
    if site.reason:
        return
    query = value(attention.query)
    assert site.k_fmt and site.v_fmt
    site.provider, refusals = choose(site.k_fmt, site.v_fmt, query.dtype, query.device.type, config.provider)
    site.notes = refusals
    site.action = action


def _why_not_packed(site: Site, outputs: set[Node]) -> str | None:
    assert site.key and site.value
    for name, write in (("keys", site.key), ("values", site.value)):
        if write.kind == "read":
            return f"the {name} are an input that this call does not write"
        if write.kind == "grow" and write.node not in outputs:
            return f"the concatenated {name} do not leave the graph as they are (a sliding window, or no cache)"
        new = value(write.new)
        if not cacheable_dtype(new.dtype):
            return f"the {name} are {new.dtype}"
        if int(new.shape[-1]) % 8:
            return f"the head_dim of the {name} is {new.shape[-1]}, not a multiple of 8"
    return None


def _why_not_fused(site: Site) -> str | None:
    assert site.key and site.value
    attention = site.attention
    query, key = value(attention.query), value(attention.key)
    if query.dim() != 4:
        return f"the query has {query.dim()} dimensions, not 4"
    if query.shape[1] % key.shape[1]:
        return f"{query.shape[1]} query heads are not a multiple of {key.shape[1]} key heads"
    if attention.is_causal and site.key.kind != "read":
        return "is_causal over a longer cache is aligned to its start, not to its end"
    if attention.is_causal:
        return "is_causal over a cache that is not written in this call"
    mask = attention.attn_mask
    if isinstance(mask, Node) and value(mask).dtype not in (torch.bool, torch.float32, torch.bfloat16, torch.float16):
        return f"attn_mask is {value(mask).dtype}"
    return None
