"""One dynamo graph for prefill and decode of a decoder: any batch, any number of new tokens, behind any number of past
ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tqc.backend import settle_floats, tqai, type_caches
from tqc.config import Config
from tqc.passes import rewrite
from tqc.passes.plan import Plan
from tqc.torch_private import attends_eagerly


class ExportError(ValueError):
    """A model or an option that cannot be exported; the message is one line."""


@dataclass(frozen=True)
class CacheInput:
    """Keys or values of one layer that a graph takes.

    Attributes:
        layer: its number in the model's cache.
        part: "key" or "value".
        window: how many tokens attention sees, where it is not all; None for all.
    """

    layer: int
    part: str
    window: int | None = None

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.part}"


@dataclass
class Captured:
    """A graph that the passes have rewritten.

    Attributes:
        roles: what each placeholder is: a `CacheInput`, or the name of an argument of the step.
        held: example inputs, one a placeholder; weights among them.
        windows: by the name of a mask, how many tokens it lets a token see; None for all.
    """

    gm: GraphModule
    plan: Plan | None
    roles: dict[Node, CacheInput | str]
    held: dict[Node, Any]
    windows: dict[str, int | None]
    float_masks: bool
    sizes: dict[str, int] = field(default_factory=dict)
    name: str = ""


class _Captured(Exception):
    pass


def capture(model: Any, config: Config) -> Captured:
    """Trace a step of `model` behind a cache, and rewrite it as torch.compile would.

    Raises:
        ExportError: for a model without a cache that grows, or whose step is more than one graph.
    """
    text_config = model.config.get_text_config()
    sizes = _sizes(text_config)
    cache = _filled_cache(model, config, sizes)
    windows, masks = _masks(model, text_config, sizes)
    arguments: dict[str, Tensor] = {
        "input_ids": _ids(sizes["batch"], sizes["sequence"]),
        "position_ids": torch.arange(sizes["sequence"]).expand(sizes["batch"], -1) + sizes["past"],
        "logits_to_keep": torch.arange(2),
    }
    named = {id(tensor): name for name, tensor in (arguments | masks).items()}
    caches = {
        id(getattr(layer, f"{part}s")): CacheInput(number, part, _window(layer))
        for number, layer in enumerate(cache.layers)
        for part in ("key", "value")
        if getattr(layer, "keys", None) is not None
    }
    given = masks["mask"] if set(masks) == {"mask"} else {name.removeprefix("mask."): m for name, m in masks.items()}
    found: list[Captured] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        settle_floats(gm)
        type_caches(gm)
        placeholders = gm.graph.find_nodes(op="placeholder")
        held = dict(zip(placeholders, inputs, strict=True))
        roles = {node: named.get(id(x)) or caches.get(id(x)) for node, x in held.items()}
        plan = None if config.off else rewrite(gm, config)
        known = {node: role for node, role in roles.items() if role is not None}
        float_masks = next(iter(masks.values())).is_floating_point()
        found.append(Captured(gm, plan, known, held, windows, float_masks, sizes, type(model).__name__))
        raise _Captured

    try:
        # Sizes are symbols, numbers of the model (its window) are not.
        with torch.no_grad(), torch._dynamo.config.patch(specialize_int=True):
            torch.compile(model, backend=backend, dynamic=True, fullgraph=True)(
                **arguments, attention_mask=given, past_key_values=cache, use_cache=True
            )
    except Exception as error:
        if not found:
            raise ExportError(f"{type(model).__name__} cannot be traced as one graph: {_line(error)}") from error
    return found[0]


def _filled_cache(model: Any, config: Config, sizes: Mapping[str, int]) -> Any:
    """A cache that a prompt was run through, packed as the backend packs it."""
    import dataclasses

    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    call = model if config.off else torch.compile(model, backend=tqai, options={**options, "rest": "eager"})
    with torch.no_grad():
        call(_ids(sizes["batch"], sizes["past"]), past_key_values=cache, use_cache=True)
    for number, layer in enumerate(cache.layers):
        if not isinstance(getattr(layer, "keys", None), Tensor):
            raise ExportError(
                f"layer {number} of {type(model).__name__} has a state that is no keys and values "
                f"({type(layer).__name__}): it is not exported"
            )
    return cache


def _sizes(text_config: Any) -> dict[str, int]:
    """Example sizes that differ from each other and from the model's own, so that symbols are told apart."""
    taken = {value for value in vars(text_config).values() if isinstance(value, int)}
    free = (n for n in itertools.count(5) if n not in taken and n + 1 not in taken)
    batch, sequence, past = (next(free) for _ in range(3))
    return {"batch": batch, "sequence": sequence, "past": past}


def _masks(model: Any, text_config: Any, sizes: Mapping[str, int]) -> tuple[dict[str, int | None], dict[str, Tensor]]:
    """Masks as the model takes them, all visible, by name; and their windows."""
    shape = (sizes["batch"], 1, sizes["sequence"], sizes["past"] + sizes["sequence"])
    window = getattr(text_config, "sliding_window", None)
    windows: dict[str, int | None] = {}
    # As `create_masks_for_generate` of transformers makes them: one a type of layers, or one for all.
    for kind in dict.fromkeys(getattr(text_config, "layer_types", ("",))):
        if kind not in ("full_attention", "sliding_attention", ""):
            raise ExportError(f"{type(model).__name__} has layers of type {kind!r}, which are not exported")
        slides = kind == "sliding_attention" or (kind == "" and window is not None)
        windows[f"mask.{kind}" if kind else "mask"] = window if slides else None
    full = (
        torch.zeros(shape, dtype=model.dtype) if attends_eagerly(text_config) else torch.ones(shape, dtype=torch.bool)
    )
    return windows, {name: full.clone() for name in windows}


def _window(layer: Any) -> int | None:
    return getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None


def _ids(batch: int, count: int) -> Tensor:
    return torch.ones(batch, count, dtype=torch.int64)


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
