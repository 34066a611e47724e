"""Pass: whatever still reads or writes a packed cache as if it were dense gets dense tokens."""

from __future__ import annotations

import logging

import torch
from torch.fx import GraphModule, Node

from tqc import ops
from tqc.ops import Op, example, is_packed
from tqc.passes.edit import insert, size, update_input
from tqc.passes.finders.cache import find_cache, find_write
from tqc.passes.finders.cache_write import CacheWrite
from tqc.passes.graph import MEASURES, calls, is_in_place, writers
from tqc.passes.plan import EVICTED, READ, Plan, Site

log = logging.getLogger(__name__)


def read_cache(gm: GraphModule, plan: Plan) -> int:
    """Decode each packed cache that a torch op reads.

    Before:
        y = some_op(k_cache)
    After:
        dense = read(k_cache); y = some_op(dense)

    One that grows without an attention that is understood, or holds latents, is extended and decoded:
        keys = cat([k_cache, key], -2); y = some_op(keys); return (keys, y)
    becomes
        keys = extend(k_cache, key); dense = read(keys); y = some_op(dense); return (keys, y)

    One that is written in place along its length becomes a `write`; one that is written in any other way is decoded for
    the whole graph and packed anew at its end.

    Must run last: the other passes turn reads into fused ones. The sites where this happens are correct but slow, and
    the plan says why they were not understood.
    """
    for node in gm.graph.nodes:
        if is_packed(node) and example(node).fmt.groups and not is_in_place(node) and (users := _torch_users(node)):
            raise NotImplementedError(f"{users[0].name} {EVICTED}")
    caches = [node for node in gm.graph.nodes if is_packed(node) and not is_in_place(node) and _torch_users(node)]
    sites = {write.past: site for site in plan.with_action(READ) for write in (site.key, site.value) if write}
    for cache in caches:
        if grown := _grown(cache):
            _extend(gm, cache, grown, sites.get(cache))
            if not _torch_users(cache):
                continue
        written = writers(cache)
        write = find_write(cache, written, None) if written else None
        if isinstance(write, CacheWrite) and write.kind == "write" and write.operation:
            _write(gm, write, write.operation)
        elif written:
            _decode_for_good(gm, cache)
        else:
            _read(gm, cache)
    return len(caches)


def _torch_users(cache: Node) -> list[Node]:
    """Those that are more than a question about its shape, in graph order."""
    users = {user for user in cache.users if not isinstance(user.target, Op) and user.op != "output"}
    return [node for node in cache.graph.nodes if node in users and not isinstance(example(node), MEASURES)]


def _grown(cache: Node) -> Node | None:
    """The concatenation of a packed cache and new tokens that leaves the graph."""
    if example(cache).fmt.keep is not None:  # what leaves may be longer
        return None
    for user in cache.users:
        leaves = any(reader.op == "output" for reader in user.users)
        if leaves and calls(user, torch.cat, torch.concat) and isinstance(find_cache(user), CacheWrite):
            return user
    return None


def _extend(gm: GraphModule, cache: Node, grown: Node, site: Site | None) -> None:
    write = find_cache(grown)
    assert isinstance(write, CacheWrite) and write.new
    with gm.graph.inserting_before(grown):
        extended = insert(gm.graph, ops.extend, cache, _folded(cache, write.new))
        dense = insert(gm.graph, ops.read, extended)
    if site:
        site.mark(extended)
        site.mark(dense)
    grown.replace_all_uses_with(extended, lambda user: user.op == "output")
    grown.replace_all_uses_with(dense)
    gm.graph.erase_node(grown)


def _read(gm: GraphModule, cache: Node) -> None:
    users = _torch_users(cache)
    consumers = {user for user in cache.users if isinstance(user.target, Op) and user.target.consumes}
    first = next(node for node in gm.graph.nodes if node is users[0] or node in consumers)
    with gm.graph.inserting_before(first):
        dense = insert(gm.graph, ops.read, cache)
    for user in users:
        user.replace_input_with(cache, dense)


def _write(gm: GraphModule, write: CacheWrite, operation: Node) -> None:
    cache = write.past
    assert cache
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    behind = [user for user in (*_torch_users(cache), *operation.users) if order[user] > order[operation]]
    with gm.graph.inserting_before(operation):
        # Nobody knows who looks at what lies behind the new tokens.
        length = size(gm.graph, cache, 2)
        shown = insert(gm.graph, torch.ones, (1, length), dtype=torch.bool, device=example(cache).device)
        new = insert(gm.graph, ops.write, cache, _folded(cache, write.new), write.positions, shown, write.counted)
    for user in behind:
        for source in (cache, operation):
            user.replace_input_with(source, new)
    gm.graph.erase_node(operation)
    cache.replace_all_uses_with(new, lambda user: user.op == "output")
    update_input(cache, new)
    for left in (cache, new):
        if _torch_users(left):
            _read(gm, left)


def _folded(cache: Node, dense: Node) -> Node:
    """Tokens as the cache takes them."""
    fmt = example(cache).fmt
    return insert(cache.graph, ops.fold, dense, fmt.spec) if fmt.folded else dense


def _decode_for_good(gm: GraphModule, cache: Node) -> None:
    log.warning("input %s, a packed cache, is written in an unknown way: each call packs it anew, slowly", cache.name)
    users = _torch_users(cache)
    with gm.graph.inserting_before(users[0]):
        dense = insert(gm.graph, ops.read, cache)
    for user in users:
        user.replace_input_with(cache, dense)
    updates = gm.graph.find_nodes(op="call_function", target=ops.update)
    with gm.graph.inserting_before(next(iter(updates), gm.graph.output_node())):
        packed = insert(gm.graph, ops.pack, _folded(cache, dense), example(cache).fmt.spec)
    cache.replace_all_uses_with(packed, lambda user: user.op == "output")
    update_input(cache, packed)
