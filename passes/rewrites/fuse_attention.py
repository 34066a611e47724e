"""Pass: attention that reads a packed cache becomes one call that attends and appends."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import GraphModule, Node

from tqc.execute import calls as runtime
from tqc.passes.edit import combine_masks, erase_unused, insert, set_value
from tqc.passes.graph import value
from tqc.passes.plan import FUSE, Plan, Site


def fuse_attention(gm: GraphModule, plan: Plan) -> int:
    """Fuse each site that reads a packed cache.

    Before:
        keys = cat([k_cache, key], -2); values = cat([v_cache, value], -2)
        out = scaled_dot_product_attention(query, repeat_kv(keys), repeat_kv(values), attn_mask)
        return (keys, values, f(out))
    After:
        out, keys, values = attend_extend(query, key, value, k_cache, v_cache, attn_mask, ...)
        return (keys, values, f(out))

    Where the cache is preallocated, `k_cache.index_copy_(2, positions, key)` and the attention become `attend_write`;
    where it is only read, or another site has extended it in this call, the attention becomes `attend`.

    Must run before `pack_cache` and `read_cache`: it needs the cache writes as the model spelled them.
    """
    sites = plan.with_action(FUSE)
    extended: dict[Node, Node] = {}
    for site in sites:
        assert site.key and site.value
        attention = site.attention
        with gm.graph.inserting_before(attention.output):
            mask = combine_masks(gm.graph, attention.masks, _columns(gm, site))
            if site.key.kind == "grow" and site.key.node not in extended:
                out = _fuse_growing(gm, site, mask, extended)
            elif site.key.kind == "write":
                out = _fuse_writing(gm, site, mask)
            else:
                caches = [extended.get(write.node, write.past) for write in (site.key, site.value)]
                out = _fuse_reading(gm, site, mask, caches)
            _set_output_value(out, site)
            if value(out).dtype != value(attention.output).dtype:
                cast = gm.graph.call_method("to", (out, value(attention.output).dtype))
                set_value(cast, value(out).to(value(attention.output).dtype))
                out = cast
        _replace(attention.output, out)
    # Only now: until here, later sites are recognized by the writes of earlier ones.
    position = {node: index for index, node in enumerate(gm.graph.nodes)}
    for write, packed in extended.items():
        write.replace_all_uses_with(packed, delete_user_cb=lambda user, at=position[packed]: position[user] > at)
        erase_unused(write)
    for site in sites:
        for cache in (site.key, site.value):
            if cache and cache.operation and cache.kind == "write":
                _erase_write(cache.operation)
    return len(sites)


def _columns(gm: GraphModule, site: Site) -> Any:
    """How many keys the site attends to, where a mask must be made: a node or an int."""
    assert site.key
    if not any(mask.kind == "flex" for mask in site.attention.masks):
        return None
    past, new = site.key.past, site.key.new if site.key.kind == "grow" else None
    sizes: list[Any] = []
    for tensor in filter(None, (past, new)):
        size = value(tensor).shape[2]
        if not isinstance(size, int):
            node = gm.graph.call_method("size", (tensor, 2))
            set_value(node, size)
            size = node
        sizes.append(size)
    if len(sizes) == 2 and any(isinstance(size, Node) for size in sizes):
        return insert(gm.graph, operator.add, *sizes)
    return sum(sizes)


def _fuse_growing(gm: GraphModule, site: Site, mask: Node | None, extended: dict[Node, Node]) -> Node:
    attention, key, val = site.attention, site.key, site.value
    assert key and val
    args: tuple[Any, ...] = (
        attention.query, key.new, val.new, key.past, val.past, mask, attention.sinks,
        attention.scale, attention.softcap, attention.is_causal, site.provider,
    )  # fmt: skip
    step = gm.graph.call_function(runtime.attend_extend, args)
    out, keys, values = (gm.graph.call_function(operator.getitem, (step, index)) for index in range(3))
    for packed, write in ((keys, key), (values, val)):
        set_value(packed, value(write.past))
        extended[write.node] = packed
    return out


def _fuse_writing(gm: GraphModule, site: Site, mask: Node | None) -> Node:
    attention, key, val = site.attention, site.key, site.value
    assert key and val
    args: tuple[Any, ...] = (
        attention.query, key.new, val.new, key.past, val.past, key.positions, key.counted, mask, attention.sinks,
        attention.scale, attention.softcap, site.provider,
    )  # fmt: skip
    return gm.graph.call_function(runtime.attend_write, args)


def _fuse_reading(gm: GraphModule, site: Site, mask: Node | None, caches: list[Any]) -> Node:
    attention = site.attention
    args: tuple[Any, ...] = (
        attention.query, *caches, mask, attention.sinks, attention.scale, attention.softcap, site.provider,
    )  # fmt: skip
    return gm.graph.call_function(runtime.attend, args)


def _set_output_value(out: Node, site: Site) -> None:
    """Kernels lay the output out as [batch, n, query_heads, head_dim], which is how models read it next."""
    assert site.v_fmt
    query = value(site.attention.query)
    batch, heads, rows, _ = query.shape
    set_value(out, query.new_empty(batch, rows, heads, site.v_fmt.head_dim).transpose(1, 2))


def _replace(old: Node, new: Node) -> None:
    new.meta["nn_module_stack"] = old.meta.get("nn_module_stack")
    old.replace_all_uses_with(new)
    erase_unused(old)


def _erase_write(operation: Node) -> None:
    """Erase an in-place write that the fused call does instead."""
    operation.replace_all_uses_with(operation.args[0])
    operation.graph.erase_node(operation)
