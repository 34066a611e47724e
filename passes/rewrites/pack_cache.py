"""Pass: a cache that leaves the graph dense leaves it packed."""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

from tqc import ops
from tqc.passes.edit import insert, query_of, size, update_input
from tqc.passes.finders.cache import CacheWrite
from tqc.passes.masks import combine_masks
from tqc.passes.plan import PACK, Plan, Site


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
    packed by `adopt` behind its last dense use, and `update` says so at the end of the graph.
    """
    sites = plan.with_action(PACK)
    packed: dict[Node, Node] = {}
    for site in sites:
        assert site.key and site.value
        if site.key.kind == "write" and not site.key.allocated_here:
            _adopt(gm, site)
            continue
        for write, fmt in ((site.key, site.k_fmt), (site.value, site.v_fmt)):
            if write.node not in packed:
                packed[write.node] = _pack(gm, site, write, str(fmt))
    return len(sites)


def _pack(gm: GraphModule, site: Site, write: CacheWrite, spec: str) -> Node:
    dense = write.node if write.kind == "grow" and write.past is not None else write.new
    assert dense is not None
    # Right behind the attention, so that the dense keys and values of a layer can go before the next one runs.
    with gm.graph.inserting_before(site.attention.output.next):
        where = (write.positions, size(gm.graph, write.past, 2)) if write.kind == "write" else ()
        balanced = {"query": query_of(gm.graph, site.attention)} if write is site.key else {}
        packed = site.mark(insert(gm.graph, ops.pack, dense, spec, *where, **balanced))
    for source in filter(None, (write.leaves, write.operation)):
        source.replace_all_uses_with(packed, lambda user: user.op == "output")
    if write.kind == "grow" and dense is not write.node:
        write.node.replace_all_uses_with(dense)
    return packed


def _adopt(gm: GraphModule, site: Site) -> None:
    key, val = site.key, site.value
    assert key and val and key.past and val.past
    with gm.graph.inserting_before(site.attention.output.next):
        count = size(gm.graph, key.new, 2)
        mask = None if key.prefix is not None else combine_masks(gm.graph, site.attention, None)
        specs = (str(site.k_fmt), str(site.v_fmt))
        operands = (
            key.past,
            val.past,
            key.positions,
            count,
            mask,
            *specs,
            key.counted,
            query_of(gm.graph, site.attention),
        )
        adopted = site.mark(insert(gm.graph, ops.adopt, *operands))
        parts = [insert(gm.graph, operator.getitem, adopted, index) for index in (0, 1)]
    for write, part in zip((key, val), parts, strict=True):
        for source in filter(None, (write.past, write.operation)):
            source.replace_all_uses_with(part, lambda user: user.op == "output")
        update_input(write.past, part)
