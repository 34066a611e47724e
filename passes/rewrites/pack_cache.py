"""Pass: a cache that leaves the graph dense leaves it packed."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from tqc.execute import calls as runtime
from tqc.passes.edit import erase_unused, set_value
from tqc.passes.finders.cache import CacheWrite
from tqc.passes.graph import value
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

    A cache that holds dense tokens already (`cat([past, key])`) is packed whole: attention reads it dense this once.
    So is a preallocated one that starts in this graph (`zeros`, then `index_copy_`). One that the caller allocated is
    left to `adopt`, which turns the caller's tensor itself into a packed one behind its last dense use.
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
    with gm.graph.inserting_after(site.attention.output):
        if write.kind == "write":
            args = (dense, write.positions, value(write.past).shape[2], spec, site.provider)
            packed = gm.graph.call_function(runtime.pack_at, args)
        else:
            packed = gm.graph.call_function(runtime.pack, (dense, spec, site.provider))
    set_value(packed, value(write.node))
    write.node.replace_all_uses_with(packed, delete_user_cb=lambda user: user.op == "output")
    if write.operation is not None:
        write.operation.replace_all_uses_with(packed, delete_user_cb=lambda user: user.op == "output")
    elif dense is not write.node:
        write.node.replace_all_uses_with(dense)
        erase_unused(write.node)
    return packed


def _adopt(gm: GraphModule, site: Site) -> None:
    key, val = site.key, site.value
    assert key and val
    with gm.graph.inserting_after(site.attention.output):
        count = value(key.new).shape[2]
        if not isinstance(count, int):
            count = gm.graph.call_method("size", (key.new, 2))
            set_value(count, value(key.new).shape[2])
    with gm.graph.inserting_after(count if isinstance(count, Node) else site.attention.output):
        mask = None if key.prefix is not None else _mask_of_columns(site)
        specs = (str(site.k_fmt), str(site.v_fmt))
        gm.graph.call_function(
            runtime.adopt,
            (key.past, val.past, key.positions, count, key.counted, mask, *specs, site.provider),
        )


def _mask_of_columns(site: Site) -> Node:
    """The mask that says which columns of the preallocated cache are visible."""
    assert site.key
    capacity = value(site.key.past).shape[2]
    return next(mask.node for mask in site.attention.masks if value(mask.node).shape[-1] == capacity)
