"""Replay whole steps as CUDA graphs: `torch.compile(model, backend="tqai", mode="reduce-overhead")`.

A step whose caches are preallocated launches the same kernels on the same memory every time, regions and attention
alike, so it is recorded once for each signature of its inputs. The first call with a signature runs as ever, which
compiles and loads every kernel; the second one is recorded, and from then on it is replayed.

torch's own `cudagraph_trees` are made for graphs of plain tensors whose memory they trace: they run the first call in
the graph's pool, where the tables that kernels keep for good would be overwritten, and packed tensors they cannot see.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tqc.cache.packed_tensor import PackedTensor
from tqc.cache.views import writable
from tqc.execute.instructions import Adopt, Attend, AttendExtend, AttendWrite, Instruction, Pack, Read
from tqc.execute.split_graph import SplitGraph
from tqc.ops import PackedValue, example, is_packed
from tqc.ops.effects import written
from tqc.torch_private import STATIC_INPUT, TENSOR_DICT, storage_key

log = logging.getLogger(__name__)

DEVICE = "cuda"
# Signatures that are remembered: with more caches than this in turn, steps are recorded again and again.
MAX_SIGNATURES = 8

STARTS_A_CACHE = "it starts a cache"
_WHY_NOT: dict[type[Instruction], str] = {
    AttendExtend: "a cache grows, so its memory moves: give the model a StaticCache",
    Pack: STARTS_A_CACHE,
    Adopt: STARTS_A_CACHE,
    Attend: "attention reads a cache of which the host must know the length",
}


def why_not(gm: GraphModule) -> str | None:
    """Why a rewritten graph cannot be recorded, or None."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    held = [node for node in placeholders if isinstance(example(node), (Tensor, PackedValue))]
    for node in held:
        device = example(node).device
        if device.type != DEVICE or device != example(held[0]).device:
            return f"input {node.name} is on {device}, and all must be on one CUDA device"
    for node in gm.graph.nodes:
        if reason := _why_not_node(node):
            return reason
    memory = {storage_key(example(node)) for node in held if not is_packed(node)}
    output = next(node for node in gm.graph.nodes if node.op == "output")
    for node in output.all_input_nodes:
        if node not in placeholders and isinstance(example(node), Tensor) and storage_key(example(node)) in memory:
            return f"output {node.name} is a view of an input"
    return None


def _why_not_node(node: Node) -> str | None:
    instruction = node.target
    if isinstance(instruction, AttendWrite):
        positions = example(instruction.operands(node)["positions"])
        if not isinstance(positions, Tensor) or positions.device.type != DEVICE:
            return "the positions of new tokens are not on the device"
        if not instruction.counted:
            return "the positions of new tokens are not known to be consecutive, so the host must look at them"
    elif isinstance(instruction, Instruction) and not isinstance(instruction, Read):
        return _WHY_NOT.get(type(instruction), f"{instruction.__name__} runs on the host")
    elif not isinstance(instruction, Instruction):
        return None
    if instruction.provider.waits_for_device:
        return f"the kernels of {instruction.provider.name!r} wait for the device"
    return None


# What becomes of an input.
UNUSED, VALUE, ADDRESS, COPY = "unused", "value", "address", "copy"


def roles(gm: GraphModule, outer: GraphModule) -> list[str]:
    """What a recorded graph does with each input of `gm`.

    Parameters, buffers, packed caches, what is marked static and what is written are used where they lie (ADDRESS).
    Other tensors are copied to a place of their own before each replay (COPY). Numbers are part of what was recorded
    (VALUE), unless nothing uses them: dynamo passes strides and offsets of inputs that way.

    Args:
        outer: the graph that calls the regions, with the same placeholders.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    used = [bool(node.users) for node in outer.graph.nodes if node.op == "placeholder"]
    changed = [target for node in gm.graph.nodes for target in written(node)]
    memory = {storage_key(example(target)) for target in changed if not is_packed(target)}

    def role(node: Node) -> str:
        x = example(node)
        if is_packed(node):
            return ADDRESS
        if not isinstance(x, Tensor):
            return VALUE
        fixed = _mark(node) or isinstance(x, torch.nn.Parameter) or storage_key(x) in memory
        return ADDRESS if fixed else COPY

    return [role(node) if used else UNUSED for node, used in zip(placeholders, used, strict=True)]


def _mark(node: Node) -> Any:
    return node.meta.get(TENSOR_DICT, {}).get(STATIC_INPUT)


@dataclass
class Recording:
    """A recorded step: its graph, the places of copied inputs (None for others), and its outputs."""

    graph: Any
    places: list[Tensor | None]
    outputs: tuple[Any, ...]


class CudaGraphs:
    """A compiled step that records and replays itself.

    Args:
        step: takes the graph's inputs, returns its outputs.
        gm: the graph, for which `why_not` knows no reason.
        failed: called with the reason if nothing can be recorded after all; the step runs as it is from then on.
    """

    def __init__(self, step: SplitGraph, gm: GraphModule, failed: Callable[[str], None]) -> None:
        self._step = step
        self._failed = failed
        self._gave_up = False
        self._roles = roles(gm, step.outer)
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        output = next(node for node in gm.graph.nodes if node.op == "output")
        self._passed_on = [placeholders.index(n) if n in placeholders else None for n in output.args[0]]
        self._written = [
            placeholders.index(node.target.operands(node)[name])
            for node in gm.graph.nodes
            if isinstance(node.target, AttendWrite)
            for name in ("k_cache", "v_cache")
        ]
        self._recordings: OrderedDict[tuple[Any, ...], Recording | None] = OrderedDict()
        self._pool: Any = None

    def __call__(self, *args: Any) -> Any:
        if self._gave_up:
            return self._step(*args)
        for index in self._written:
            writable(args[index])
        signature = tuple(map(_signature, args, self._roles))
        if signature not in self._recordings:
            if len(self._recordings) == MAX_SIGNATURES:
                if not any(self._recordings.values()):
                    self._give_up(f"no two of {MAX_SIGNATURES} calls had the same sizes, numbers and addresses")
                    return self._step(*args)
                self._recordings.popitem(last=False)
            self._recordings[signature] = None
            return self._step(*args)
        self._recordings.move_to_end(signature)
        recording = self._recordings[signature]
        if recording is None:
            try:
                recording = self._recordings[signature] = self._record(args)
            except RuntimeError as error:
                self._give_up(f"recording failed: {str(error).splitlines()[0]}")
                return self._step(*args)
        for place, x in zip(recording.places, args, strict=True):
            if place is not None:
                place.copy_(x)
        recording.graph.replay()
        for index in self._written:
            args[index].packed_storage.forget()
        # Copies, since the next replay overwrites what the graph returns.
        return tuple(
            args[source] if source is not None else output.clone() if isinstance(output, Tensor) else output
            for source, output in zip(self._passed_on, recording.outputs, strict=True)
        )

    def _give_up(self, reason: str) -> None:
        self._gave_up = True
        self._recordings.clear()
        self._failed(reason)

    def _record(self, args: tuple[Any, ...]) -> Recording:
        """Nothing runs while it is recorded, so the step is not done twice."""
        if self._pool is None:
            # One for all signatures: between two replays nothing of it is in use.
            self._pool = torch.cuda.graph_pool_handle()
        with torch.inference_mode(False):
            places = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
                if role == COPY
                else None
                for x, role in zip(args, self._roles, strict=True)
            ]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = self._step(*(x if place is None else place for x, place in zip(args, places, strict=True)))
        return Recording(graph, places, outputs)


def _signature(x: Any, role: str) -> Any:
    if role == UNUSED:
        return None
    if isinstance(x, PackedTensor):
        storage = x.packed_storage
        return storage.pages.data_ptr(), storage.dense.data_ptr(), storage.state.data_ptr()
    if role == ADDRESS:
        return x.data_ptr()
    return (x.shape, x.stride()) if role == COPY else x
