"""Pass: a cache that leaves the graph dense leaves it packed."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from tqc import runtime
from tqc.passes.edit import erase_unused, set_value
from tqc.passes.find_cache import CacheWrite
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
    """
    sites = plan.with_action(PACK)
    packed: dict[Node, Node] = {}
    for site in sites:
        for write, fmt in ((site.key, site.k_fmt), (site.value, site.v_fmt)):
            assert write
            if write.node not in packed:
                packed[write.node] = _pack(gm, site, write, str(fmt))
    return len(sites)


def _pack(gm: GraphModule, site: Site, write: CacheWrite, spec: str) -> Node:
    dense = write.new if write.past is None else write.node
    assert dense is not None
    # Right behind the attention, so that the dense keys and values of a layer can go before the next one runs.
    with gm.graph.inserting_after(site.attention.output):
        packed = gm.graph.call_function(runtime.pack, (dense, spec, site.provider))
    set_value(packed, value(write.node))
    write.node.replace_all_uses_with(packed, delete_user_cb=lambda user: user.op == "output")
    if dense is not write.node:
        write.node.replace_all_uses_with(dense)
        erase_unused(write.node)
    return packed
