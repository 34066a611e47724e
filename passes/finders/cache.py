"""Find where the keys and values of an attention site come from: how its cache is written."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tqc.ops import TENSORS, example, is_packed
from tqc.ops.effects import written
from tqc.passes.finders.cache_write import FULL, CacheWrite, along_length
from tqc.passes.finders.static_window import find_roll, find_window
from tqc.passes.graph import argument, calls, rearranges, writers


def find_cache(node: Node) -> CacheWrite | str:
    """How `node`, the keys or values of an attention site, is cached; or why that is not understood."""
    if window := find_window(node):
        return window
    if calls(node, torch.cat, torch.concat):
        return _match_cat(node)
    target, prefix = _strip_prefix(node)
    if calls(target, "index_copy_", "copy_"):
        target = target.args[0]
    if target.op == "placeholder" or calls(target, torch.zeros, "new_zeros", torch.zeros_like):
        written = writers(target)
        if written:
            return find_write(target, written, prefix)
        if is_packed(target) and prefix is None:
            return CacheWrite("read", target, target, None)
        if target.op == "placeholder" and prefix is None:
            return "keys and values are an input that this call does not write (generate_batch writes it elsewhere)"
    return _why_unknown(node)


def find_latents(*nodes: Node) -> list[CacheWrite]:
    """The growing caches that keys and values are expanded from, as DeepSeek's latent and rotary key are; in graph
    order, none where something else is cached above them."""
    found, edge, writes = set(nodes), set(nodes), dict[Node, CacheWrite]()
    while edge:
        for node in edge:
            write = _match_cat(node) if _extends_input(node) else None
            if isinstance(write, CacheWrite):
                writes[node] = write
        makers = [maker for node in edge if node not in writes for maker in (node, *writers(node))]
        edge = {source for maker in makers for source in maker.all_input_nodes} - found
        found |= edge
    return [writes[node] for node in nodes[0].graph.nodes if node in writes]


def has_cache(node: Node, others: set[Node]) -> bool:
    """Whether keys or values are taken from an earlier call, or kept for a later one.

    Args:
        node: the keys or values of an attention site.
        others: outputs of all attention sites, which keys are not looked for above of.
    """
    root = node
    while rearranges(root) and isinstance(root.args[0], Node):
        root = root.args[0]
    if is_packed(root) or _is_kept(root) or (_is_input(root) and example(root).dim() >= 3):
        return True
    found, edge = {node}, {node}
    while edge:
        if any(_holds_cache(source) for source in edge):
            return True
        edge = {source for reader in edge for source in reader.all_input_nodes} - found - others
        found |= edge
    return False


def _holds_cache(node: Node) -> bool:
    if is_packed(node):
        return True
    if _extends_input(node):
        return not _is_empty(argument(node, 0, "tensors")[0]) or _is_kept(node)
    if _is_input(node):
        return bool(writers(node))
    return calls(node, torch.zeros, "new_zeros", torch.zeros_like) and bool(writers(node)) and _is_kept(node)


def _is_input(node: Node) -> bool:
    """Whether `node` is a tensor that the caller gives, and no weight."""
    held = example(node)
    return node.op == "placeholder" and isinstance(held, TENSORS) and not isinstance(held, torch.nn.Parameter)


def _is_empty(node: Node) -> bool:
    return not is_packed(node) and statically_known_true(example(node).numel() == 0)


def _is_kept(node: Node) -> bool:
    """Whether the elements of `node` leave the graph, or are written into an input."""
    found, edge = {node}, [node]
    while edge:
        source = edge.pop()
        for user in source.users:
            targets = written(user)
            if user.op == "output" or any(_is_input(target) for target in targets if target is not source):
                return True
            if user not in found and (targets or rearranges(user) or calls(user, torch.cat, torch.concat)):
                found.add(user)
                edge += [user, *(target for target in targets if target not in found)]
    return False


def _why_unknown(node: Node) -> str:
    if calls(node, operator.getitem) and calls(node.args[0], torch.cat, torch.concat):
        return "attention reads a part of the cache (a sliding window: concatenated, then cut)"
    name = getattr(node.target, "__name__", node.target)
    found, edge = {node}, {node}
    for _ in range(16):
        edge = {source for reader in edge for source in reader.all_input_nodes} - found
        found |= edge
        if held := next((source for source in edge if _extends_input(source)), None):
            what = "the cache holds latents: " if _is_projected(held, found) else ""
            return f"{what}keys or values are computed from what the cache holds (by {name}), not read from it"
    return f"no write to a cache that is known was found above the keys or values (which {name} makes)"


def _is_projected(node: Node, among: set[Node]) -> bool:
    """Whether a linear layer is on the way from `node` down through `among`."""
    edge, seen = [node], {node}
    while edge:
        readers = [user for user in edge.pop().users if user in among and user not in seen]
        if any(calls(user, torch.nn.functional.linear, torch.matmul, operator.matmul, torch.bmm) for user in readers):
            return True
        seen.update(readers)
        edge += readers
    return False


def _extends_input(node: Node) -> bool:
    tensors = argument(node, 0, "tensors") if calls(node, torch.cat, torch.concat) else None
    if not isinstance(tensors, (list, tuple)) or not tensors:
        return False
    past = tensors[0]
    if not isinstance(past, Node) or not isinstance(example(past), TENSORS):
        return False
    if is_packed(past) or _is_empty(past):
        return True
    dim, dims = argument(node, 1, "dim", 0), example(node).dim()
    along_length = isinstance(dim, int) and dims in (3, 4) and dim % dims == dims - 2
    return along_length and any(_is_input(_part_of(held) or held) for held in tensors)


def _part_of(node: Node) -> Node | None:
    """The tensor that `node` is a slice of."""
    return node.args[0] if calls(node, operator.getitem) and isinstance(example(node.args[0]), TENSORS) else None


def _match_cat(node: Node) -> CacheWrite | str:
    """`torch.cat([past, new], dim=-2)`, as transformers' DynamicCache writes it."""
    tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 2 or dim not in (2, -2):
        return "the concatenation is not of a cache and new tokens along the length"
    past, new = tensors
    if example(new).dim() != 4:
        return f"new keys or values have {example(new).dim()} dimensions, not 4"
    if writers(node) or writers(past):
        return "the cache is also written in place"
    kept, keep = _kept(node)
    if not is_packed(past) and example(past).numel() == 0:
        return CacheWrite("grow", node, None, new, kept=kept, keep=keep)
    if past.op != "placeholder" and (whole := _part_of(past)) and whole.op == "placeholder":
        return "attention reads a part of the cache and new tokens (a sliding window: cut, then concatenated)"
    if past.op != "placeholder":
        return "the cache before the concatenation is not an input of the graph"
    if example(past).dtype != example(new).dtype:
        return f"the cache is {example(past).dtype} and new tokens are {example(new).dtype}"
    return CacheWrite("grow", node, past, new, kept=kept, keep=keep)


def _kept(node: Node) -> tuple[Node | None, int | None]:
    """The slice `node[:, :, -keep:]` that leaves the graph where `node` does not, and `keep`."""
    if any(user.op == "output" for user in node.users):
        return None, None
    for user in node.users:
        part = along_length(user)
        leaves = bool(user.users) and all(reader.op == "output" for reader in user.users)
        if leaves and part and isinstance(part.start, int) and part.start < 0 and part.stop is None:
            return user, -part.start
    return None, None


def _strip_prefix(node: Node) -> tuple[Node, Any]:
    """`cache[:, :, :stop]` or `cache[:, :, :stop, :]`: the cache and `stop`; of anything else, itself and None."""
    part = along_length(node)
    if part is None or part.start not in (None, 0) or part.stop is None:
        return node, None
    return node.args[0], part.stop


def find_write(cache: Node, written: list[Node], prefix: Any) -> CacheWrite | str:
    """One write of new tokens into a preallocated tensor: `index_copy_`, `cache[:, :, positions] = new`, or a slice."""
    if example(cache).dim() != 4:
        return f"the preallocated cache has {example(cache).dim()} dimensions, not 4"
    if len(written) != 1:
        return "the preallocated cache is written more than once"
    operation = written[0]
    if calls(operation, "index_copy_"):
        dim, positions, new = (argument(operation, i, name) for i, name in ((1, "dim"), (2, "index"), (3, "source")))
        found = dim in (2, -2)
    elif calls(operation, operator.setitem) and operation.args[0] is cache:
        index, new = operation.args[1:]
        found = isinstance(index, tuple) and len(index) in (3, 4)
        found = found and all(isinstance(part, slice) and part == FULL for part in (*index[:2], *index[3:]))
        positions = index[2] if found else None
    elif calls(operation, "copy_"):
        window = find_roll(cache, operation) if prefix is None else None
        return window or "the preallocated cache is overwritten as a whole"
    else:
        found = False
    if not found or not isinstance(new, Node) or not isinstance(example(new), Tensor) or example(new).dim() != 4:
        return "the preallocated cache is not written along its length"
    counted = False
    if isinstance(positions, slice):
        if positions.step not in (None, 1):
            return "the preallocated cache is written with a stride"
        positions, counted = (0 if positions.start is None else positions.start), True
    elif not isinstance(positions, Node) or not isinstance(example(positions), Tensor) or example(positions).dim() != 1:
        return "the preallocated cache is not written at positions in one dimension"
    elif example(positions).dtype not in (torch.int64, torch.int32):
        return f"the positions of new tokens are {example(positions).dtype}"
    else:
        counted = _counts_up(positions)
    if example(new).dtype != example(cache).dtype or example(new).shape[:2] != example(cache).shape[:2]:
        return "new tokens differ from the preallocated cache in dtype, batch or heads"
    return CacheWrite("write", cache, cache, new, operation, positions, counted, prefix)


def _counts_up(positions: Node) -> bool:
    """Whether positions are `arange(n)` plus a single number."""
    if not calls(positions, operator.add, torch.add, "add"):
        return calls(positions, torch.arange)
    left, right = positions.args
    if not calls(left, torch.arange):
        left, right = right, left
    single = not isinstance(example(right), Tensor) or example(right).numel() == 1
    return calls(left, torch.arange) and len(left.args) in (1, 2) and single
