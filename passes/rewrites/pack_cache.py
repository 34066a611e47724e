"""Pass: a cache that leaves the graph dense leaves it packed."""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

from tqc import ops
from tqc.passes.edit import insert, query_of, size, update_input
from tqc.passes.finders.cache_write import CacheWrite
from tqc.passes.masks import combine_masks
from tqc.passes.plan import PACK, Plan, Site
from tqc.passes.scores import score_tokens


def pack_cache(gm: GraphModule, plan: Plan) -> int:
    """Pack the caches of each site that starts one.

    Before:
        keys = cat([empty, key], -2)
        out = attention(query, keys, ...)
        return (keys, f(out))
    After:
        out = attention(query, key, ...)
        return (pack(key, spec), f(out))

    Where the cache keeps the last tokens alone (`cat([empty, key], -2)[:, :, -511:]` is returned, and attention reads
    all), so does its format.

    A cache that holds dense tokens already (`cat([past, key])`) is packed whole: attention reads it dense this once.
    So is a preallocated one that starts in this graph (`zeros`, then `index_copy_`). One that the caller allocated is
    packed by `adopt` behind its last dense use, and `update` says so at the end of the graph. A sliding window that new
    tokens fill alone (`cache.copy_(key[:, :, -512:])`) needs no dense one.

    Where the format has groups, `score` says which of their tokens are kept, and both packs follow it:
        scored = score(key, value, query, spec)
        return (pack(key, spec, query=query, score=scored[0], ...), pack(value, spec, score=scored[0]), f(out))
    """
    sites = plan.with_action(PACK)
    packed: dict[Node, Node] = {}
    for site in sites:
        assert site.key and site.value
        dense = not site.key.allocated_here and not site.key.packed
        if site.key.kind in ("write", "slide") and dense:
            _adopt(gm, site)
            continue
        scored = _score(gm, site)
        for write, fmt in ((site.key, site.k_fmt), (site.value, site.v_fmt)):
            if write.node not in packed:
                packed[write.node] = _pack(gm, site, write, str(fmt), scored)
    return len(sites)


def _score(gm: GraphModule, site: Site) -> dict[str, Node]:
    """What `pack` of keys takes of their scores; nothing where the format has no groups."""
    assert site.key and site.value and site.k_fmt
    if not site.k_fmt.groups:
        return {}
    with gm.graph.inserting_before(site.attention.output.next):
        mask = combine_masks(gm.graph, site.attention, size(gm.graph, site.key.new, 2))
        query = query_of(gm.graph, site.attention)
        return score_tokens(gm.graph, site, query, site.key.new, site.value.new, attn_mask=mask)


def _pack(gm: GraphModule, site: Site, write: CacheWrite, spec: str, scored: dict[str, Node]) -> Node:
    dense = write.node if write.kind == "grow" and write.past is not None else write.new
    assert dense is not None
    # Right behind the attention, so that the dense keys and values of a layer can go before the next one runs.
    last = scored["state_rows"] if scored else site.attention.output
    with gm.graph.inserting_before(last.next):
        where = (write.positions, size(gm.graph, write.past, 2)) if write.kind == "write" else ()
        how = {"query": query_of(gm.graph, site.attention), **scored}
        if write is site.value:
            how = {name: node for name, node in how.items() if name == "score"}
        packed = site.mark(insert(gm.graph, ops.pack, dense, spec, *where, **how))
    if write.kind == "slide":
        _slide(write, packed)
        return packed
    for source in filter(None, (write.leaves, write.operation)):
        source.replace_all_uses_with(packed, lambda user: user.op == "output")
    if write.kind == "grow" and dense is not write.node:
        write.node.replace_all_uses_with(dense)
    return packed


def _slide(write: CacheWrite, packed: Node) -> None:
    """Let a window that starts anew be `packed`; nothing has read it in this graph."""
    operation, past = write.operation, write.past
    assert operation and past
    operation.replace_all_uses_with(past)
    operation.graph.erase_node(operation)
    past.replace_all_uses_with(packed, lambda user: user.op == "output")
    if not write.allocated_here:
        update_input(past, packed)


def _adopt(gm: GraphModule, site: Site) -> None:
    key, val = site.key, site.value
    assert key and val and key.past and val.past
    with gm.graph.inserting_before(site.attention.output.next):
        slides = key.kind == "slide"  # and is full by now
        positions, count = (0, key.keep) if slides else (key.positions, size(gm.graph, key.new, 2))
        mask = None if slides or key.prefix is not None else combine_masks(gm.graph, site.attention, None)
        specs = (str(site.k_fmt), str(site.v_fmt))
        operands = (
            key.past,
            val.past,
            positions,
            count,
            mask,
            *specs,
            slides or key.counted,
            query_of(gm.graph, site.attention),
        )
        adopted = site.mark(insert(gm.graph, ops.adopt, *operands))
        parts = [insert(gm.graph, operator.getitem, adopted, index) for index in (0, 1)]
    for write, part in zip((key, val), parts, strict=True):
        for source in filter(None, (write.past, write.operation)):
            source.replace_all_uses_with(part, lambda user: user.op == "output")
        update_input(write.past, part)
