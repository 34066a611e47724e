"""Pass: attention that reads a packed cache becomes one call that attends and appends."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import GraphModule, Node

from tqc import runtime
from tqc.passes.edit import erase_unused, set_value
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

    Must run first: it needs the cache writes as the model spelled them.
    """
    sites = plan.with_action(FUSE)
    for site in sites:
        assert site.key
        {"grow": _fuse_growing, "read": _fuse_reading}[site.key.kind](gm, site)
    return len(sites)


def _fuse_growing(gm: GraphModule, site: Site) -> None:
    attention, key, val = site.attention, site.key, site.value
    assert key and val
    args: tuple[Any, ...] = (
        attention.query, key.new, val.new, key.past, val.past, attention.attn_mask, attention.sinks,
        attention.scale, attention.softcap, attention.is_causal, site.provider,
    )  # fmt: skip
    with gm.graph.inserting_before(attention.output):
        step = gm.graph.call_function(runtime.attend_extend, args)
        out, keys, values = (gm.graph.call_function(operator.getitem, (step, index)) for index in range(3))
    _set_output_value(out, site)
    for packed, write in ((keys, key), (values, val)):
        set_value(packed, value(write.past))
        write.node.replace_all_uses_with(packed, delete_user_cb=lambda user: user.op == "output")
    _replace(attention.output, out)


def _fuse_reading(gm: GraphModule, site: Site) -> None:
    attention, key, val = site.attention, site.key, site.value
    assert key and val
    args: tuple[Any, ...] = (
        attention.query, key.past, val.past, attention.attn_mask, attention.sinks,
        attention.scale, attention.softcap, site.provider,
    )  # fmt: skip
    with gm.graph.inserting_before(attention.output):
        out = gm.graph.call_function(runtime.attend, args)
    _set_output_value(out, site)
    _replace(attention.output, out)


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
