"""What a file holds of packed tensors: one order of their tokens, whatever memory had; golden files of all versions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import DynamicCache

from tests.common import KEYS, VALUES, assert_same, packed_window_layer, round_trip, states
from tqc.cache.io import load_cache, save_cache
from tqc.cache.packed_tensor import PackedTensor, extend, pack

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(("version", "lengths"), [(1, [75, 3]), (2, [75, 230, 9, 75, 3])])
def test_files_of_all_versions_load_for_ever(version, lengths):
    cache = load_cache(GOLDEN / f"cache_v{version}.safetensors")
    assert isinstance(cache, DynamicCache) and [layer.get_seq_length() for layer in cache.layers] == lengths
    with safe_open(GOLDEN / f"cache_v{version}_values.safetensors", framework="pt") as expected:
        for name in expected.keys():
            layer, part = name.split(".")
            found = getattr(cache.layers[int(layer)], part)
            assert isinstance(found, PackedTensor) == (int(layer) < len(lengths) - 1)
            torch.testing.assert_close(found.clone() + 0, expected.get_tensor(name))


def test_the_golden_file_of_version_2_holds_what_version_1_had_not():
    balanced, window, short, folded, _ = load_cache(GOLDEN / "cache_v2.safetensors").layers
    for keys in (balanced.keys, window.keys):
        assert keys.fmt.head(keys.dense)[:, :, 1].float().amax() > 8
    assert window.keys.fmt.keep == 99 and window.keys.state.tolist() == [230, 224, 131]
    assert short.keys.dense.shape[2] == 9 and not short.keys.pages.shape[2] and folded.values.fmt.folded


def save_one(x: torch.Tensor, path: Path) -> PackedTensor:
    save_cache(((x,),), path)
    ((loaded,),) = load_cache(path)
    return loaded


def stored_parts(x: torch.Tensor, path: Path) -> dict[str, torch.Tensor]:
    save_cache(((x,),), path)
    return load_file(path)


@pytest.mark.parametrize("length", [3, 40, 99, 100, 137, 230])
@pytest.mark.parametrize("counts", [[1] * 70, [40, 33, 1, 200, 7]])
def test_packed_windows(length, counts, tmp_path):
    layer, cache = packed_window_layer(length), DynamicCache()
    cache.layers = [layer]
    loaded = round_trip(cache, tmp_path).layers[0]
    for name in ("keys", "values"):
        ours, theirs = getattr(layer, name), getattr(loaded, name)
        for seed, count in enumerate(counts):
            new = states(count + seed)[0][:, :, :count]
            ours, theirs = extend(ours, new), extend(theirs, new)
            assert_same(ours, theirs)
    assert layer.get_seq_length() == loaded.get_seq_length() == length


def test_a_tensor_that_its_storage_has_left_behind_is_saved_as_it_is(tmp_path):
    """A window's begin has moved on, and pages have been placed where dropped ones were."""
    new = states(32)[0]
    for length in (20, 99, 150, 230):
        older = packed_window_layer(length).keys
        newer = extend(older, new)
        assert newer.packed_storage is older.packed_storage
        loaded = save_one(older, tmp_path / "file")
        assert loaded.begin == older.begin == max(0, length - 99) and loaded.packed_storage.length == length
        torch.testing.assert_close(loaded.dequantize(), older.dequantize(), rtol=0, atol=0)
        assert torch.equal(save_one(newer, tmp_path / "file").dequantize(), newer.dequantize())


def test_rows_of_a_window_that_was_loaded_go_behind_those_of_another(tmp_path):
    x = packed_window_layer().keys
    both = torch.cat([x, save_one(x, tmp_path / "file")])
    assert isinstance(both, PackedTensor) and torch.equal(both.dequantize(), x.dequantize().repeat(2, 1, 1, 1))


@pytest.mark.parametrize("end", [1, 30, 98])
def test_a_prefix_of_a_window_is_saved_as_a_prefix(end, tmp_path):
    for length in (99, 150, 230):
        x = packed_window_layer(length).keys
        loaded = save_one(x[:, :, :end], tmp_path / "file")
        assert loaded.state.tolist()[::2] == [x.begin + end, x.begin]
        torch.testing.assert_close(loaded.dequantize(), x.dequantize()[:, :, :end], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [None, 30, 99])
@pytest.mark.parametrize("fmt", [KEYS, VALUES], ids=["keys", "values"])
def test_a_file_depends_on_the_tokens_alone(fmt, keep, tmp_path):
    """Not on calls, spare pages and rows, the places of pages, or what was in memory before."""
    fmt = replace(fmt, keep=keep)
    for length in (7, 36, 37, 130, 203):
        new = states(length)[0]
        at_once = stored_parts(pack(new, fmt), tmp_path / "file")
        steps = pack(new[:, :, :3], fmt)
        for at in range(3, length):
            steps = extend(steps, new[:, :, at : at + 1])
        loaded = extend(save_one(pack(new[:, :, :-5], fmt), tmp_path / "file"), new[:, :, -5:])
        roomy = pack(new, fmt)
        roomy.packed_storage.reserve(400)
        roomy.dense[:, :, sorted(set(range(roomy.dense.shape[2])) - used_rows(roomy))] = float("nan")
        for other in (steps, loaded, roomy, roomy.clone()):
            assert_same(at_once, stored_parts(other, tmp_path / "file"))


def used_rows(x: PackedTensor) -> set[int]:
    length, packed, _ = x.state.tolist()
    recent = range(x.fmt.sink_tokens + packed, length)
    ring = {x.fmt.sink_tokens + (t - x.fmt.sink_tokens) % x.fmt.residual_window for t in recent}
    head = range(x.fmt.token_rows, x.fmt.dense_rows) if packed else ()
    return set(range(min(length, x.fmt.sink_tokens))) | ring | set(head)
