"""Find `flex_attention`: its mask function becomes a mask tensor, its score function must be a softcap or nothing."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tqc.ops import example
from tqc.passes.finders.site import Attention, Mask, strip_heads
from tqc.passes.graph import calls, strip_casts

FLEX = torch.ops.higher_order.flex_attention
# What a mask function may be made of: it is run on broadcast indices instead of single ones.
_ELEMENTWISE = {
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg),
    *(operator.le, operator.lt, operator.ge, operator.gt, operator.eq, operator.ne),
    *(operator.and_, operator.or_, operator.invert, operator.getitem),
    *(torch.logical_and, torch.logical_or, torch.logical_not, torch.abs),
    *("add", "sub", "mul", "le", "lt", "ge", "gt", "eq", "ne", "abs", "to", "bool"),
    *("logical_and", "logical_or", "logical_not", "new_ones", "new_zeros", "__and__", "__or__"),
    *(torch.ops.aten.index, torch.ops.aten.index.Tensor),
}


def match_flex(node: Node) -> Attention | None:
    """`flex_attention(query, key, value, score_mod, block_mask, scale, kernel_options, buffers, mask_buffers)`."""
    if node.target is not FLEX:
        return None
    query, key, val, score_mod, block_mask, scale = node.args[:6]
    parts = {user.args[1]: user for user in node.users if calls(user, operator.getitem)}
    output = parts.get(0)
    if output is None:
        return None
    site = Attention(output, query, key, val)
    if len(node.users) > len(parts) or any(part.users for index, part in parts.items() if index != 0):
        site.reason = "the log-sum-exp of flex_attention is used"
    elif not isinstance(scale, (int, float)):
        site.reason = "the scale of flex_attention is not a number"
    else:
        softcap = _softcap(_function(node, score_mod))
        if softcap is None:
            site.reason = "score_mod of flex_attention is neither the identity nor a softcap"
        elif odd := _not_elementwise(_function(node, block_mask[-1])):
            site.reason = f"mask_mod of flex_attention calls {odd}"
        else:
            site.scale, site.softcap, site.masks = float(scale), softcap, (Mask(node, "flex"),)
            strip_heads(site)
    return site


def _function(node: Node, attribute: Node) -> GraphModule:
    module: Any = node.graph.owning_module
    for name in str(attribute.target).split("."):
        module = getattr(module, name)
    return module


def _softcap(function: GraphModule) -> float | None:
    """0 for score -> score, c for score -> c * tanh(score / c), else None."""
    score = next(node for node in function.graph.nodes if node.op == "placeholder")
    result = next(node for node in function.graph.nodes if node.op == "output").args[0]
    result = strip_casts(result[0] if isinstance(result, (tuple, list)) else result)
    if result is score:
        return 0.0
    if not calls(result, operator.mul):
        return None
    tanh, cap = result.args
    if not isinstance(cap, (int, float)):
        tanh, cap = cap, tanh
    if not isinstance(cap, (int, float)) or not calls(tanh, torch.tanh, "tanh"):
        return None
    divided = tanh.args[0]
    same = calls(divided, operator.truediv) and divided.args[0] is score and divided.args[1] == cap
    return float(cap) if same else None


def _not_elementwise(function: GraphModule) -> str | None:
    for node in function.graph.nodes:
        if node.op in ("call_function", "call_method") and node.target not in _ELEMENTWISE:
            return str(getattr(node.target, "__name__", node.target))
        if node.op in ("call_module", "get_attr"):
            return f"{node.target}"
    return None


def visible(
    wanted: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    kv_num_blocks: torch.Tensor,
    kv_indices: torch.Tensor,
    full_kv_num_blocks: torch.Tensor | None,
    full_kv_indices: torch.Tensor | None,
    q_block_size: int,
    kv_block_size: int,
) -> torch.Tensor:
    """The mask of a BlockMask: full blocks, and those elements of partial ones that its function wants.

    Args:
        wanted: bool, the mask function on all indices, broadcastable to [batch, heads, n, columns].
        rows, columns: indices, int64 [n] and [columns].
    """

    def blocks(count: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        total = indices.shape[-1]
        named = torch.arange(total, device=indices.device) < count[..., None]
        at = torch.where(named, indices.long(), total)
        table = torch.nn.functional.pad(torch.zeros_like(indices, dtype=torch.bool), (0, 1))
        table = table.scatter(-1, at, torch.ones_like(named))
        return table[:, :, (rows // q_block_size)[:, None], (columns // kv_block_size)[None, :]]

    result = blocks(kv_num_blocks, kv_indices) & wanted
    if full_kv_num_blocks is not None and full_kv_indices is not None:
        result = result | blocks(full_kv_num_blocks, full_kv_indices)
    return result


def block_mask_of(node: Node) -> tuple[Any, ...]:
    """Arguments of `visible` behind the first three, of a `flex_attention` node."""
    _, _, kv_num_blocks, kv_indices, full_num_blocks, full_indices, *rest = node.args[4]
    q_block_size, kv_block_size = rest[-3:-1]
    return kv_num_blocks, kv_indices, full_num_blocks, full_indices, q_block_size, kv_block_size


def mask_function(node: Node) -> tuple[GraphModule, tuple[Any, ...]]:
    """The mask function of a `flex_attention` node, and what it is called with behind the four indices."""
    return _function(node, node.args[4][-1]), tuple(node.args[8])


def shape_of(node: Node) -> tuple[int, int, Any]:
    """Batch, query heads and rows of a `flex_attention` node."""
    return tuple(example(node.args[0]).shape[:3])
