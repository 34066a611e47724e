"""Pass: attention to a packed cache becomes an op of the dialect, and so does what writes the cache."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, GraphModule, Node

from tqc import ops
from tqc.ops import example
from tqc.passes.edit import insert, query_of, size, update_input
from tqc.passes.finders.cache_write import CacheWrite
from tqc.passes.finders.site import Mask
from tqc.passes.graph import writers
from tqc.passes.masks import combine_masks
from tqc.passes.plan import FUSE, Plan, Site
from tqc.passes.scores import score_tokens
from tqc.torch_private import MODULE_STACK


def fuse_attention(gm: GraphModule, plan: Plan) -> int:
    """Rewrite each site that reads a packed cache.

    Before:
        keys = cat([k_cache, key], -2); values = cat([v_cache, value], -2)
        out = scaled_dot_product_attention(query, repeat_kv(keys), repeat_kv(values), attn_mask)
        return (keys, values, f(out))
    After:
        out = attend(query, k_cache, v_cache, key, value, attn_mask=attn_mask, ...)
        keys = extend(k_cache, key); values = extend(v_cache, value)
        return (keys, values, f(out))

    Where the cache is preallocated, `k_cache.index_copy_(2, positions, key)` becomes `keys = write(k_cache, key,
    positions, ...)` and, at the end of the graph, `update(k_cache, keys)`. A cache that is only read, or that another
    site has extended in this call, is attended to without new tokens. Where two sites extend one cache in different
    ways, the second extends a `fork` of it. A cache that keeps the last tokens alone (`keys[:, :, -511:]` is returned)
    does so by its format: `extend` drops what leaves it, and a second site looks at a `fork` from before. Where such a
    cache is preallocated (`k_cache.copy_(cat([k_cache[:, :, 1:], key], -2))`), `window(k_cache, 1, length, length)` is
    what is attended to and extended, and `update` says that the cache becomes that.

    Where the format has groups, `score` stands between the two and `extend` takes what it gives (see `pack_cache`).

    Must run before `pack_cache` and `read_cache`: it needs the cache writes as the model spelled them.
    """
    sites = plan.with_action(FUSE)
    combined: dict[tuple[Mask, ...], Node | None] = {}
    stored: dict[Node, Node] = {}  # by a write as the model spelled it, the cache with its tokens
    consumed: dict[Node, Node] = {}  # by a cache that has been stored into, the attention in front of that
    for site in sites:
        assert site.key and site.value
        output = site.attention.output
        with gm.graph.inserting_before(output):
            masks = site.attention.masks
            if masks not in combined or any(writers(mask.node) for mask in masks):  # layers share what is made of them
                combined[masks] = combine_masks(gm.graph, site.attention, _columns(gm, site))
            mask = combined[masks]
            for cache in (site.key, site.value):
                if cache.past in consumed and (cache.node not in stored or cache.keep is not None):
                    with gm.graph.inserting_before(consumed[cache.past]):
                        cache.past = insert(gm.graph, ops.fork, cache.past)
            for cache in (site.key, site.value):
                if cache.kind == "slide":
                    cache.past = insert(gm.graph, ops.window, cache.past, cache.begin, cache.end, cache.keep)
            out = _attend(gm.graph, site, mask, stored)
            out.meta[MODULE_STACK] = output.meta.get(MODULE_STACK)
            scored = _score(gm.graph, site, mask, out, stored)
            for cache in (site.key, site.value):
                if cache.kind != "read" and cache.node not in stored:
                    stored[cache.node] = _store(gm.graph, site, cache, mask, out.args[0], scored)
                    consumed.setdefault(cache.past, out)
            if example(output).dim() == 3:
                out = insert(gm.graph, "reshape", out, (-1, size(gm.graph, out, 2), size(gm.graph, out, 3)))
            if example(out).dtype != example(output).dtype:
                out = insert(gm.graph, "to", out, example(output).dtype)
        output.replace_all_uses_with(out)
    # Only now: until here, later sites are recognized by the writes of earlier ones.
    position = {node: index for index, node in enumerate(gm.graph.nodes)}
    gone = {site.attention.output for site in sites}
    writes = {cache.node: cache for site in sites for cache in (site.key, site.value) if cache and cache.node in stored}
    for write, cache in writes.items():
        new = stored[write]
        if cache.kind in ("write", "slide"):
            _replace_write(cache, new)
        elif cache.kept:
            cache.kept.replace_all_uses_with(new)
        else:
            write.replace_all_uses_with(new, lambda user, at=position[new]: user not in gone and position[user] > at)
    return len(sites)


def _columns(gm: GraphModule, site: Site) -> Any:
    """How many keys the site attends to, where a mask must be made: a node or an int."""
    assert site.key
    if not any(mask.kind == "flex" for mask in site.attention.masks):
        return None
    past, new = site.key.past, site.key.new if site.key.kind in ("grow", "slide") else None
    sizes: list[Any] = [size(gm.graph, tensor, 2) for tensor in (past, new) if tensor]
    if len(sizes) == 2 and any(isinstance(held, Node) for held in sizes):
        return insert(gm.graph, operator.add, *sizes)
    return sum(sizes)


def _attend(graph: Graph, site: Site, mask: Node | None, stored: dict[Node, Node]) -> Node:
    """Attention of a site, without new tokens where another site has stored them."""
    attention, key, val = site.attention, site.key, site.value
    assert key and val
    how: dict[str, Any] = {"attn_mask": mask, "sinks": attention.sinks, "scale": attention.scale}
    how |= {"softcap": attention.softcap, "is_causal": attention.is_causal}
    # A sliding window with the new tokens in it has lost some that these still look at.
    behind = {} if key.keep is not None else stored
    operands = [query_of(graph, attention), *(behind.get(cache.node, cache.past) for cache in (key, val))]
    if key.kind != "read" and key.node not in behind:
        operands += [key.new, val.new]
        if key.kind == "write":
            how |= {"positions": key.positions, "counted": key.counted}
    return site.mark(insert(graph, ops.attend, *operands, **how))


def _score(graph: Graph, site: Site, mask: Node | None, out: Node, stored: dict[Node, Node]) -> dict[str, Node]:
    """What `extend` of keys takes of the new tokens' scores; nothing where the format has no groups."""
    key, val = site.key, site.value
    assert key and val and site.k_fmt
    if not site.k_fmt.groups or key.kind != "grow" or key.node in stored:
        return {}
    return score_tokens(graph, site, out.args[0], key.new, val.new, key.past, val.past, attn_mask=mask)


def _store(
    graph: Graph, site: Site, cache: CacheWrite, mask: Node | None, query: Node, scored: dict[str, Node]
) -> Node:
    if cache.kind in ("grow", "slide"):
        how = {"query": query, **scored}
        if cache is site.value:
            how = {name: node for name, node in how.items() if name == "score"}
        return site.mark(insert(graph, ops.extend, cache.past, cache.new, **how))
    return site.mark(insert(graph, ops.write, cache.past, cache.new, cache.positions, mask, cache.counted))


def _replace_write(cache: CacheWrite, new: Node) -> None:
    """Let a write of the dialect stand for one in place: at the end of the graph the input is what it made."""
    operation = cache.operation
    assert operation
    past = operation.args[0]
    for source in (operation, past):
        source.replace_all_uses_with(new, lambda user: user.op == "output")
    operation.replace_all_uses_with(past)
    operation.graph.erase_node(operation)
    update_input(past, new)
