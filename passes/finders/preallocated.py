"""Why a preallocated cache and its attention are not of a form that is known: nothing else may read what is written."""

from __future__ import annotations

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tqc.ops import TENSORS, example
from tqc.ops import attention as attention_function
from tqc.passes.finders.cache_write import CacheWrite
from tqc.passes.finders.products import find_product
from tqc.passes.finders.sdpa import SDPA
from tqc.passes.finders.site import Attention
from tqc.passes.graph import argument, calls, rearranges, writers


def why_not_preallocated(attention: Attention, key: CacheWrite, value: CacheWrite) -> str | None:
    """Why a preallocated cache and its attention are not one of the two forms that are known.

    Either attention reads the whole cache under a mask, or it reads just up to the new tokens.
    """
    masks = attention.masks
    capacity = example(key.past).shape[2]
    if key.allocated_here:
        return None
    if key.prefix is None:
        tensors = [mask.node for mask in masks if mask.kind != "flex"]
        if len(tensors) < len(masks):
            return "flex_attention reads a preallocated cache"
        if not any(statically_known_true(example(node).shape[-1] == capacity) for node in tensors):
            return "attention reads a whole preallocated cache without a mask"
    else:
        first, count = example(key.positions), example(key.new).shape[2]
        if isinstance(first, torch.Tensor) or not statically_known_true(example(key.prefix) == first + count):
            return "attention reads a part of a preallocated cache that does not end with the new tokens"
    if attention.is_causal:
        return "is_causal over a preallocated cache is aligned to its start"
    for write in (key, value):
        assert write.past
        if others := _other_readers(write, attention):
            return f"the preallocated cache is also read by {', '.join(node.name for node in others)}"
    return None


def why_not_slid(attention: Attention, key: CacheWrite, value: CacheWrite) -> str | None:
    """Why a sliding window that is copied back is not the known form: new tokens are put behind those of the cache,
    attention reads both, and nothing else does."""
    if attention.is_causal and not key.starts_anew:
        return "is_causal over a preallocated cache is aligned to its start"
    if key.allocated_here and not key.starts_anew:
        return "a sliding window that is made in this graph is read before it is full"
    position = {node: index for index, node in enumerate(attention.output.graph.nodes)}
    for write in (key, value):
        assert write.past and write.operation
        fmt = example(write.past).fmt if write.packed else None
        if fmt and fmt.keep not in (None, write.keep):
            return f"the packed cache keeps {tokens(fmt.keep)} and this call {tokens(write.keep)}"
        if fmt and fmt.folded:
            return "the values of a preallocated cache are folded"
        if position[write.operation] > position[attention.output]:
            return "a sliding window is copied back behind its attention"
        if others := _other_readers_of_window(write, attention):
            return f"the sliding window is also read by {', '.join(node.name for node in others)}"
    return None


def _other_readers(write: CacheWrite, attention: Attention) -> list[Node]:
    """Nodes that read a preallocated cache, other than its write and the way to the site's attention."""
    assert write.past and write.operation
    products = {attention.output} | _above(attention.output)
    position = {node: index for index, node in enumerate(write.past.graph.nodes)}
    return [
        user
        for source in (write.past, write.operation)
        for user in source.users
        if user is not write.operation
        and isinstance(example(user), TENSORS)
        and user.op != "output"
        and not (position[user] > position[write.operation] and _leads_to(user, products))
    ]


def _other_readers_of_window(write: CacheWrite, attention: Attention) -> list[Node]:
    """Nodes that read the tokens of a sliding window, other than what makes and keeps them and the attention."""
    source = argument(write.operation, 1, "src")
    made = {write.operation, source, *source.all_input_nodes, *writers(source), *write.node.all_input_nodes}
    made -= {write.new}
    products = {attention.output} | _above(attention.output)
    read = [] if write.starts_anew else [write.node]
    return [
        user
        for node in {write.past: None, write.operation: None, **dict.fromkeys(made), **dict.fromkeys(read)}
        for user in node.users
        if user not in made | {write.node}
        and isinstance(example(user), TENSORS)
        and user.op != "output"
        and not (node in (*read, write.operation) and _leads_to(user, products))
    ]


def _leads_to(node: Node, products: set[Node]) -> bool:
    """Whether `node` is one of the attention's products, or a rearrangement that only they read."""
    if calls(node, *SDPA, attention_function) or find_product(node):
        return node in products
    users = [user for user in node.users if isinstance(example(user), TENSORS)]
    return rearranges(node) and all(_leads_to(user, products) for user in users)


def _above(node: Node, depth: int = 24) -> set[Node]:
    """Nodes that `node` was computed from, a few steps up: the way from a cache to its attention."""
    found: set[Node] = set()
    edge = {node}
    for _ in range(depth):
        edge = {source for reader in edge for source in reader.all_input_nodes} - found
        found |= edge
    return found


def tokens(keep: int | None) -> str:
    return "all tokens" if keep is None else f"{keep} tokens"
