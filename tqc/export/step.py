"""A captured graph as a module that torch.export takes: `(input_ids, attention_mask, logits_to_keep, *caches)`."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tqc.export.capture import CacheInput, Captured, ExportError
from tqc.export.repeat import outline
from tqc.lowering.onnx.realize import Call, CannotRealize, Realized, realize
from tqc.lowering.onnx.windows import columns_function, columns_like
from tqc.ops import example, is_packed


class Step(torch.nn.Module):
    """Masks and positions of a step, then the graph.

    Attributes:
        names: of the inputs behind the first three.
    """

    def __init__(self, captured: Captured, capacity: int) -> None:
        super().__init__()
        self.windows, self.float_masks = captured.windows, captured.float_masks
        gm = captured.gm
        _lift_weights(gm, captured)
        arguments = {role: node for node, role in captured.roles.items() if isinstance(role, str)}
        caches = {node: role for node, role in captured.roles.items() if isinstance(role, CacheInput)}
        self.dense = {f"past.{role.name}": (node, role) for node, role in caches.items() if not is_packed(node)}
        numbers = _sizes(gm, arguments, self.dense)
        try:
            self.realized: Realized = realize(gm, {node: role.name for node, role in caches.items()}, capacity)
        except CannotRealize as error:
            raise ExportError(str(error)) from None
        _erase(gm, numbers)
        self.arguments = list(arguments)
        self.given = {f"past.{role.name}": node for node, role in caches.items() if not is_packed(node)}
        self.given |= self.realized.inputs
        order = [*arguments.values(), *self.given.values()]
        _order_placeholders(gm, order)
        outline(gm)
        self.names = list(self.given)
        self.model = gm
        self.columns = Call("window_columns", columns_like)
        if any(role.window is not None for _, role in self.dense.values()):
            self.realized.functions["window_columns"] = columns_function()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: Tensor, *caches: Tensor) -> Any:
        count, total = input_ids.shape[1], attention_mask.shape[1]
        seen = attention_mask.to(torch.bool)
        positions = (attention_mask.cumsum(-1) - 1).masked_fill(~seen, 0)[:, total - count :]
        row = torch.arange(count)[:, None] + (total - count)
        column = torch.arange(total)[None, :]
        given = {"input_ids": input_ids, "position_ids": positions, "logits_to_keep": logits_to_keep}
        for name, window in self.windows.items():
            visible = column <= row
            if window is not None:
                visible = visible & (column > row - window)
            mask = seen[:, None, None, :] & visible
            if window is not None and (dense := self._window(caches)) is not None:
                (mask,) = self.columns(mask, dense, input_ids)
            if self.float_masks:
                mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
            given[name] = mask
        return self.model(*(given[name] for name in self.arguments), *caches)

    def _window(self, caches: tuple[Tensor, ...]) -> Tensor | None:
        """A dense cache that holds a window alone."""
        for name, held in zip(self.names, caches, strict=True):
            if name in self.dense and self.dense[name][1].window is not None:
                return held
        return None


def _lift_weights(gm: GraphModule, captured: Captured) -> None:
    """Let weights be attributes of the graph, not inputs."""
    lifted: dict[int, str] = {}
    for node, held in captured.held.items():
        if node in captured.roles or not isinstance(held, Tensor) or not node.users:
            continue
        if id(held) not in lifted:
            lifted[id(held)] = node.name.removeprefix("l_self_modules_").removeprefix("l_self_").rstrip("_")
            gm.register_buffer(lifted[id(held)], held.detach())
        with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
            weight = gm.graph.get_attr(lifted[id(held)])
        weight.meta = dict(node.meta)
        node.replace_all_uses_with(weight)


def _sizes(gm: GraphModule, arguments: dict[str, Node], dense: dict[str, tuple[Node, CacheInput]]) -> list[Node]:
    """Replace symbolic numbers among the inputs by sizes of tensors; returns the nodes that may be erased if unused."""
    ids = arguments["input_ids"]
    tensors = [ids, *(node for node, _ in dense.values())]
    made: dict[str, Node] = {}
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        anchor = gm.graph.call_function(operator.add, (0, 0))
    for node in gm.graph.find_nodes(op="placeholder"):
        held = example(node)
        if not isinstance(held, (torch.SymInt, int)) or not node.users:
            continue
        symbol = str(held)
        if symbol not in made:
            with gm.graph.inserting_before(anchor):
                found = next(
                    ((t, d) for t in tensors for d, size in enumerate(example(t).shape) if str(size) == symbol), None
                )
                if found:
                    made[symbol] = gm.graph.call_method("size", found)
                else:  # the past
                    mask = next(node for name, node in arguments.items() if name.startswith("mask"))
                    sizes = [gm.graph.call_method("size", (mask, 3)), gm.graph.call_method("size", (ids, 1))]
                    made[symbol] = gm.graph.call_function(operator.sub, tuple(sizes))
                made[symbol].meta = dict(node.meta)
        node.replace_all_uses_with(made[symbol])
    gm.graph.erase_node(anchor)
    return list(made.values())


def _erase(gm: GraphModule, numbers: list[Node]) -> None:
    """Erase what nothing reads: sizes, and calls that only tell torch that it was used."""
    for node in reversed(list(gm.graph.nodes)):
        silent = node.op == "get_attr" or node in numbers or isinstance(example(node), (int, torch.SymInt))
        silent = silent or (node.op.startswith("call") and example(node) is None and "log_api" in str(node.target))
        if not node.users and node.op not in ("output", "placeholder") and silent:
            gm.graph.erase_node(node)


def _order_placeholders(gm: GraphModule, order: list[Node]) -> None:
    """Leave the placeholders of `order` alone, in this order."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if node not in order:
            if node.users:
                raise ExportError(f"the graph has an input that is not understood: {node.name}")
            gm.graph.erase_node(node)
    first = next(iter(gm.graph.nodes))
    for node in order:
        if node is not first:
            first.prepend(node)
    if order:
        second = next(iter(gm.graph.nodes))
        if order[0] is not second:
            second.prepend(order[0])
    gm.graph.lint()
    gm.recompile()
