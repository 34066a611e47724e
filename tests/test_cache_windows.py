"""Files of caches of sliding windows: those that do not add up are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer

from tests.common import packed_window_layer, states
from tests.damaged_files import content, damaged, of_keys, of_layer, of_tensor, state_of_keys
from tqc.cache.io import CacheFileError, load_cache, save_cache


@pytest.fixture(scope="module")
def saved_window(tmp_path_factory):
    """The last 99 of 230 tokens; 2 tokens are dropped in a page that is held."""
    path = tmp_path_factory.mktemp("window") / "cache.safetensors"
    cache = DynamicCache()
    cache.layers = [packed_window_layer()]
    save_cache(cache, path)
    return path


def _windows(**numbers: int):
    def change(tensors, description, metadata):
        for name in ("keys", "values"):
            part = description["layers"][0][name]
            part["spec"] = (
                part["spec"].replace("keep99", f"keep{numbers['keep']}") if "keep" in numbers else part["spec"]
            )
            part["length"] = numbers.get("length", part["length"])
            if "state" in numbers:
                tensors[f"layers.0.{name}.state"] = torch.tensor(numbers["state"])

    return change


def _empty(tensors: dict[str, torch.Tensor], description: Any, metadata: Any) -> None:
    """Nothing, of a batch so large that the two rows which it gets in memory are too many."""
    description["layers"][0]["cumulative_length"] = 0
    for name in ("keys", "values"):
        description["layers"][0][name]["length"] = 0
        pages = tensors[f"layers.0.{name}.pages"].shape[3]
        tensors[f"layers.0.{name}.pages"] = torch.zeros(2**20, 2**10, 0, pages, dtype=torch.uint8)
        tensors[f"layers.0.{name}.dense"] = torch.zeros(2**20, 2**10, 0, 16)
        tensors[f"layers.0.{name}.state"] = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_windows(state=[230, 224, 130], length=100), "holds 100 of 230 tokens from 130 on and keeps the last 99"),
        (_windows(state=[230, 224, 231]), "is 99 tokens long and holds -1|from 231 on"),
        (_windows(state=[230, 224, 200]), "keys.pages of shape"),
        (_windows(state=[229, 224, 131]), "has keys for 99 tokens"),
        (_windows(state=[230, 192, 131]), "192 of 230 tokens that are packed"),
        (_windows(state=[2**62, 2**62 - 32, 2**62 - 99]), "is 99 tokens long"),
        (_windows(keep=98), "keeps the last 98"),
        (_windows(keep=120), r"keep and begin at \[\(120, 131\), \(120, 131\)\] in layers.0"),
        (_windows(keep=2**24, length=2**20), "has keys for 1048576 tokens"),
        (of_keys(spec="tq2:d16:b3:centred:s4:w32:hadamard:0"), "from 131 on and keeps all"),
        (of_keys(spec="tq2:d16:b3:centred:s4:w32:hadamard:0:keep099"), "malformed spec"),
        (state_of_keys(229, 224, 130), r"windows that keep and begin at \[\(99, 130\), \(99, 131\)\]"),
        (of_tensor("keys.pages", lambda x: x[:, :, 1:]), "keys.pages of shape"),
        (of_tensor("keys.pages", lambda x: torch.cat([x, x[:, :, :1]], 2)), "keys.pages of shape"),
        (of_layer(kind="DynamicLayer"), "windows that keep"),
        (of_layer(sliding_window=90), "and states"),
        (of_layer(sliding_window=101), "and states"),
        (_empty, "has room for tokens of .* bytes"),
    ],
)
def test_windows_that_do_not_add_up(change, message, saved_window):
    with pytest.raises(CacheFileError, match=message):
        load_cache(damaged(saved_window, change))


def test_room_in_a_window_is_believed_up_to_a_size(saved_window):
    """As for a preallocated cache, of which the file holds no page."""

    def change(tensors, description, metadata):
        cache = {"kind": "tuple", "layers": [[description["layers"][0]["keys"]], [None]]}
        cache["layers"][0][0] |= {"length": 2**23, "spec": cache["layers"][0][0]["spec"].replace("99", str(2**23))}
        metadata["cache"] = json.dumps(cache)
        for part in ("pages", "dense", "state"):
            tensors[f"layers.0.0.{part}"] = tensors.pop(f"layers.0.keys.{part}")
            del tensors[f"layers.0.values.{part}"]

    with pytest.raises(CacheFileError, match="has room for tokens of .* bytes that it does not hold"):
        load_cache(damaged(saved_window, change))


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("dynamic", {"cumulative_length": 14}),
        ("dynamic", {"cumulative_length": 0}),
        ("dynamic", {"sliding_window": 20}),
        ("dynamic", {"sliding_window": 8}),
        ("dynamic", {"sliding_window": 0}),
        ("static", {"cumulative_length": 17}),
        ("static", {"cumulative_length_int": 5}),
        ("static", {"max_cache_len": 17}),
    ],
)
def test_counts_of_sliding_layers(kind, changed, tmp_path):
    cache = DynamicCache()
    dynamic = kind == "dynamic"
    cache.layers = [DynamicSlidingWindowLayer(16) if dynamic else StaticSlidingWindowLayer(64, sliding_window=16)]
    cache.layers[0].update(*states(20))
    save_cache(cache, tmp_path / "cache")
    load_cache(tmp_path / "cache")
    with pytest.raises(CacheFileError, match="and states|which no cache has"):
        load_cache(damaged(tmp_path / "cache", of_layer(**changed)))


def test_a_window_that_was_loaded_is_saved_the_same(saved_window, tmp_path):
    save_cache(load_cache(saved_window), tmp_path / "again")
    assert content(tmp_path / "again") == content(saved_window)
