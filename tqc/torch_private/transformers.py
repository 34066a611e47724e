"""Layers of transformers' caches."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tqc.torch_private.lookup import find

# The kinds of layers that are saved, and what each counts beside its keys and values; older versions have fewer.
LAYER_COUNTERS: dict[str, tuple[str, ...]] = {
    "DynamicLayer": (),
    "DynamicSlidingWindowLayer": ("sliding_window", "cumulative_length", "record_past"),
    "StaticLayer": ("max_cache_len", "cumulative_length"),
    "StaticSlidingWindowLayer": ("max_cache_len", "cumulative_length", "cumulative_length_int"),
    "DummyLayer": (),
}


def cache_grows(cache: Any) -> bool:
    """Whether a cache makes a layer when one is missing: what its constructor was told, and no method tells."""
    return cache.layer_class_to_replicate is not None


def new_layer(kind: str, numbers: Mapping[str, int]) -> Any:
    """An empty layer for as many tokens as its counters say.

    Raises:
        AttributeError: if this transformers has no such kind.
    """
    sizes = {name: numbers[name] for name in ("sliding_window", "max_cache_len") if name in numbers}
    if kind == "StaticSlidingWindowLayer":
        sizes["sliding_window"] = numbers["max_cache_len"]
    return getattr(importlib.import_module("transformers.cache_utils"), kind)(**sizes)


@cache
def layer_counters(kind: str) -> tuple[str, ...]:
    """Those of `LAYER_COUNTERS` that a layer has in this transformers. 5.0 lacks `record_past`, counts of `StaticLayer`
    and `cumulative_length_int`. No method gives or takes them.

    Raises:
        AttributeError: if this transformers has no such kind.
    """
    layer = new_layer(kind, dict.fromkeys(LAYER_COUNTERS[kind], 1))
    return tuple(name for name in LAYER_COUNTERS[kind] if hasattr(layer, name))


def fill_layer(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Give an empty layer its keys and values. The public `lazy_initialization` of a static one would first allocate
    dense ones of full length."""
    if hasattr(layer, "max_cache_len"):
        layer.device, layer.is_initialized = keys.device, True
        if _layers_have_a_dtype():
            layer.dtype = keys.dtype
        # 5.0 has the size of the batch by another name, which its `Cache` has too.
        batch_size = "max_batch_size" if find("transformers.cache_utils.Cache.max_batch_size") else "batch_size"
        setattr(layer, batch_size, keys.shape[0])
        layer.num_heads, layer.k_head_dim, layer.v_head_dim = keys.shape[1], keys.shape[-1], values.shape[-1]
        if isinstance(getattr(layer, "cumulative_length", None), Tensor):
            layer.cumulative_length = layer.cumulative_length.to(keys.device)
    else:
        layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


@cache
def _layers_have_a_dtype() -> bool:
    """From 5.24 on they have none: keys and values may differ in it."""
    layer, one = new_layer("StaticLayer", {"max_cache_len": 1}), torch.zeros(1, 1, 1, 1)
    layer.lazy_initialization(one, one)
    return hasattr(layer, "dtype")


def attends_eagerly(config: Any) -> bool:
    """Whether a model adds its masks to the scores instead of giving them to `scaled_dot_product_attention`. What
    `set_attn_implementation` sets has no public name."""
    return config._attn_implementation == "eager"
