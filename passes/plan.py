"""Decide for every attention site what becomes of it and its cache, and say why."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tqc.config import Config, cacheable_dtype
from tqc.format import PackedFormat
from tqc.ops import TENSORS, example
from tqc.passes.finders.attention import find_attention
from tqc.passes.finders.cache import find_cache, find_latents, find_write, has_cache
from tqc.passes.finders.cache_write import CacheWrite
from tqc.passes.finders.preallocated import tokens, why_not_preallocated, why_not_slid
from tqc.passes.finders.projections import Projection, find_output_projection, find_value_projection
from tqc.passes.finders.site import Attention
from tqc.passes.graph import calls, layer_numbers, model_name, writers

# What becomes of a site.
FUSE = "fuse"  # attention reads the packed cache, new tokens are appended
PACK = "pack"  # attention is over this call's own tokens, and stays; the cache that leaves the graph is packed
READ = "read"  # the cache is packed, and decoded for what attention's keys and values are computed from
DENSE = "dense"
UNCACHED = "uncached"  # nothing is there to pack: no call before or behind this one shares its keys and values

EVICTED = (
    "would read or write a cache that holds groups of tokens by their scores, and only attention that is understood can"
)
SKIPPED = "named in skip_layers"


@dataclass
class Site:
    """One attention site and what is done with it.

    Attributes:
        index: in graph order.
        layer: of the cache, the same in all graphs of a model; None where there is no cache.
    """

    index: int
    attention: Attention
    layer: int | None = None
    action: str = DENSE
    reason: str = ""
    key: CacheWrite | None = None
    value: CacheWrite | None = None
    k_fmt: PackedFormat | None = None
    v_fmt: PackedFormat | None = None
    kernel: str = ""  # the provider that the target has chosen
    v_proj: Projection | None = None  # layers that the rotation of V is folded into, where `v_fmt` is folded
    o_proj: Projection | None = None
    notes: list[str] = field(default_factory=list)

    def mark(self, node: Node) -> Node:
        """Note on a node of the dialect which site it belongs to: all of a site's nodes get one provider."""
        node.meta |= {"layer": self.index, "formats": (self.k_fmt, self.v_fmt)}
        return node

    def to_dict(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "name": self.attention.name,
            "action": self.action,
            "reason": self.reason,
            "kernel": self.kernel,
            "keys": str(self.k_fmt or ""),
            "values": str(self.v_fmt or ""),
            "notes": self.notes,
        }

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"layer {self.layer} "
        return f"{layer}{self.attention.name}: {self.action}" + (f": {self.reason}" if self.reason else "")


@dataclass
class Plan:
    """Everything that the passes need to know about one graph, and what they report.

    Attributes:
        model: class of what the graph was traced in.
        unread: whether the graph writes a cache that no attention reads.
        rewritten: how many sites each pass rewrote.
        texts: the graph before the passes and after each that changed it, where somebody wants to see them.
        cuda_graph: whether the graph is recorded as a CUDA graph or why not; empty if nobody asked.
    """

    config: Config
    sites: list[Site]
    model: str = ""
    unread: bool = False
    rewritten: dict[str, int] = field(default_factory=dict)
    cuda_graph: str = ""
    texts: dict[str, str] = field(default_factory=dict)

    def with_action(self, action: str) -> list[Site]:
        return [site for site in self.sites if site.action == action]

    def why_dense(self) -> str | None:
        """Why nothing is packed of a graph that has a cache; None where something is, or nothing should be."""
        if any(site.action in (FUSE, PACK, READ) for site in self.sites):
            return None
        reasons = {site.reason for site in self.sites if site.action == DENSE} - {SKIPPED}
        if self.unread:
            reasons.add("no attention was found that reads the cache")
        return "; ".join(sorted(reasons)) or None


def make_plan(gm: GraphModule, config: Config) -> Plan:
    """Look at every attention site of `gm`; nothing is changed."""
    outputs = _outputs(gm)
    sites = [Site(index, attention) for index, attention in enumerate(find_attention(gm.graph))]
    _number_layers(sites)
    cached = sorted({site.layer for site in sites if site.layer is not None})
    skipped = {cached[layer] if -len(cached) <= layer < 0 else layer for layer in config.skip_layers}
    for site in sites:
        if site.layer is None:
            site.action, site.reason = UNCACHED, "no cache: no other call shares these keys and values"
        elif site.layer in skipped:
            site.reason = SKIPPED
        else:
            _decide(site, config, outputs)
    return Plan(config, sites, model_name(gm.graph), not cached and _writes_cache(gm, outputs))


def _number_layers(sites: list[Site]) -> None:
    """Number the sites that have a cache as their modules are numbered, by the first number in which their paths
    differ; in order where the paths have none.

    So a layer has the same number in each graph, whatever else is in it: a vision tower, an encoder or, where dynamo
    broke the graph, no other layer.
    """
    outputs = {site.attention.output for site in sites}
    cached = [site for site in sites if any(has_cache(node, outputs) for node in _keys_and_values(site, outputs))]
    paths = [layer_numbers(site.attention.output) for site in cached]
    depth = min(map(len, paths), default=0)
    at = next((at for at in range(depth) if len({path[at] for path in paths}) > 1), 0)
    for order, (site, path) in enumerate(zip(cached, paths, strict=True)):
        site.layer = path[at] if depth else order


def _keys_and_values(site: Site, outputs: set[Node]) -> list[Node]:
    """What is known of them: a site that is not understood may know its values alone."""
    return [node for node in (site.attention.key, site.attention.value) if node not in outputs]


def _writes_cache(gm: GraphModule, outputs: set[Node]) -> bool:
    grown = (node for node in outputs if calls(node, torch.cat, torch.concat))
    if any(isinstance(find_cache(node), CacheWrite) for node in grown):
        return True
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder" and isinstance(example(node), TENSORS)]
    return any(isinstance(find_write(node, found, None), CacheWrite) for node in inputs if (found := writers(node)))


def _outputs(gm: GraphModule) -> set[Node]:
    output = next(node for node in gm.graph.nodes if node.op == "output")
    return {node for node in output.all_input_nodes}


def _decide(site: Site, config: Config, outputs: set[Node]) -> None:
    attention = site.attention
    if attention.reason:
        site.reason = attention.reason
        return
    key, val = find_cache(attention.key), find_cache(attention.value)
    computed = ""  # how, where keys and values are not what the cache holds
    if isinstance(key, str) and isinstance(val, str) and len(held := find_latents(attention.key, attention.value)) == 2:
        computed, (key, val) = key, held
    for found in (key, val):
        if isinstance(found, str):
            site.reason = found
            return
    assert isinstance(key, CacheWrite) and isinstance(val, CacheWrite)
    site.key, site.value = key, val
    names = ("kind", "packed", "positions", "prefix", "keep", "begin", "end")
    if any(getattr(key, name) != getattr(val, name) for name in names):
        site.reason = "keys and values are cached in different ways"
        return
    if key.node is val.node:
        site.reason = "keys and values are one tensor"
        return
    if computed and key.keep is not None:
        site.reason = computed
        return
    if key.kind == "slide" and (reason := why_not_slid(site.attention, key, val)):
        site.reason = reason
        return

    fmts = [example(write.past).fmt for write in (key, val)] if key.packed else []
    if fmts:
        site.k_fmt, site.v_fmt = (replace(fmt, keep=key.keep) for fmt in fmts) if key.kind == "slide" else fmts
    if fmts and key.starts_anew:
        action = PACK
    elif fmts:
        site.reason = "" if computed else _why_not_fused(site) or ""
        if fmts[0].groups and (computed or site.reason):
            raise NotImplementedError(f"{site.attention.name}: {computed or site.reason}; it {EVICTED}")
        action = READ if computed else FUSE
    else:
        site.reason = _why_not_packed(site, config, outputs) or ""
        if not site.reason:
            shapes = [example(write.new).shape for write in (key, val)]
            k_head_dim, v_head_dim = (int(shape[-1]) for shape in shapes)
            own = config.of_layer(site.layer, int(shapes[0][1]), k_head_dim, v_head_dim)
            repeats = None
            if config.strategy and (why_not := computed or _why_not_grouped(site)):
                site.notes.append(f"{config.strategy} left out, all tokens kept: {why_not}")
            elif config.strategy:
                repeats = attention.heads // int(shapes[0][1])
            site.k_fmt, site.v_fmt = own.formats(k_head_dim, v_head_dim, key.keep, repeats)
        action = PACK
    if site.reason:
        return
    site.action = action
    if computed:
        site.notes.append(computed)
    elif config.fold_values or (site.v_fmt and site.v_fmt.folded):
        _fold(site, config)


def _fold(site: Site, config: Config) -> None:
    """Decide whether the rotation of V is folded into weights: for both layers or, where the cache is folded already,
    for each alone. Where it is not, the vectors themselves are rotated."""
    assert site.value and site.v_fmt
    if site.action == FUSE and not site.v_fmt.folded:
        site.notes.append("values not folded: the cache holds them as they are")
        return
    if not config.fold_values:
        site.notes.append("values rotated outside of the kernel: the cache came folded, and fold_values is off")
        return
    if site.action == PACK and (site.value.kind != "grow" or site.value.past is not None):
        site.notes.append("values not folded: the cache holds dense ones, or is preallocated")
        return
    v_proj = find_value_projection(site.attention, site.value) if site.value.new else None
    o_proj = find_output_projection(site.attention)
    reasons = [found for found in (v_proj, o_proj) if isinstance(found, str)]
    if site.action == PACK and reasons:
        site.notes.append(f"values not folded: {'; '.join(reasons)}")
        return
    site.v_proj = v_proj if isinstance(v_proj, Projection) else None
    site.o_proj = o_proj if isinstance(o_proj, Projection) else None
    site.v_fmt = replace(site.v_fmt, folded=True)
    rest = f"partly, {'; '.join(reasons)}" if reasons else "into weights"
    site.notes.append(f"values folded {rest}")


def _why_not_packed(site: Site, config: Config, outputs: set[Node]) -> str | None:
    assert site.key and site.value
    stay = config.sink_tokens + config.residual_window
    if site.key.keep is not None and site.key.keep <= stay:
        return f"the cache keeps {site.key.keep} tokens (a sliding window), no more than the {stay} that stay dense"
    for name, write in (("keys", site.key), ("values", site.value)):
        if write.kind == "read":
            return f"the {name} are an input that this call does not write"
        if write.kind == "grow" and any(calls(user, "to") and user in outputs for user in write.node.users):
            return f"the concatenated {name} leave the graph for another device (an offloaded cache)"
        if write.kind == "grow" and write.leaves not in outputs:
            return _what_leaves(write.node, name)
        if write.kind in ("write", "slide") and write.allocated_here and not outputs & {write.past, write.operation}:
            return f"the {name} are written into a tensor that does not leave the graph"
        if write.kind == "write" and write.allocated_here and not write.counted and example(write.new).shape[2] != 1:
            return f"the positions of new {name} are not known to be consecutive"
        new = example(write.new)
        if not cacheable_dtype(new.dtype):
            return f"the {name} are {new.dtype}"
        if int(new.shape[-1]) % 8:
            return f"the head_dim of the {name} is {new.shape[-1]}, not a multiple of 8"
    if site.key.kind == "write":
        return why_not_preallocated(site.attention, site.key, site.value)
    return None


def _what_leaves(concatenated: Node, name: str) -> str:
    """Why the cache is not what attention reads."""
    if any(
        calls(user, operator.getitem) and any(reader.op == "output" for reader in user.users)
        for user in concatenated.users
    ):
        return f"the cache keeps a part of the {name} alone, and not their last tokens"
    return f"the concatenated {name} do not leave the graph as they are"


def _why_not_fused(site: Site) -> str | None:
    assert site.key and site.value
    attention = site.attention
    query, key = example(attention.query), example(attention.key)
    if site.key.kind == "grow" and site.k_fmt and site.key.keep != site.k_fmt.keep:
        return f"the packed cache keeps {tokens(site.k_fmt.keep)} and this call {tokens(site.key.keep)}"
    if query.dim() == 4 and query.shape[0] != key.shape[0]:
        return f"queries are of batch {query.shape[0]} and keys of batch {key.shape[0]}"
    if attention.heads % key.shape[1]:
        return f"{attention.heads} query heads are not a multiple of {key.shape[1]} key heads"
    if attention.is_causal and site.key.kind != "read":
        return "is_causal over a longer cache is aligned to its start, not to its end"
    if attention.is_causal:
        return "is_causal over a cache that is not written in this call"
    for mask in attention.masks:
        if mask.kind != "flex" and statically_known_true(example(mask.node).shape[-1] == 1):
            return "attn_mask has one column for all keys"
        if mask.kind != "flex" and example(mask.node).dtype not in (
            torch.bool,
            torch.float32,
            torch.bfloat16,
            torch.float16,
        ):
            return f"attn_mask is {example(mask.node).dtype}"
    if site.key.kind == "write" and site.v_fmt and site.v_fmt.folded:
        return "the values of a preallocated cache are folded"
    if site.key.kind == "write":
        return why_not_preallocated(site.attention, site.key, site.value)
    return None


def _why_not_grouped(site: Site) -> str | None:
    """Why a cache that starts here holds its tokens one as the other, whatever their scores."""
    assert site.key and site.value
    key, attention = site.key, site.attention
    if key.kind != "grow":
        return "the cache is preallocated"
    if key.keep is not None:
        return "the cache is a sliding window"
    if key.past is not None:
        return "the cache came with tokens whose queries are not known"
    queries = example(attention.query).shape
    if not statically_known_true(queries[-2] == example(key.new).shape[2]):
        return "queries are of other tokens than keys (cross attention)"
    if attention.heads % int(example(key.new).shape[1]):
        return f"{attention.heads} query heads are not a multiple of {example(key.new).shape[1]} key heads"
    return None
