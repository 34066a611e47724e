"""Files of caches: damaged and hostile ones are refused, and those of all versions load for ever."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, StaticCache

from tests.common import as_version_1, packed_cache, packed_static_layer
from tests.damaged_files import content, damaged, of_keys, of_layer, of_tensor, state_of_keys
from tests.mutated_files import allowed, mutated, outcome, seeds
from tqc.cache.io import CacheFileError, load_cache, save_cache

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    save_cache(packed_cache(100, layers=1), path)
    return path


@pytest.fixture(scope="module")
def saved_static(tmp_path_factory):
    """90 tokens in a preallocated cache of 200."""
    path = tmp_path_factory.mktemp("static") / "cache.safetensors"
    cache = StaticCache(LlamaConfig(num_hidden_layers=1), max_cache_len=200)
    cache.layers = [packed_static_layer()]
    save_cache(cache, path)
    return path


def _metadata(**fields: Any):
    def change(tensors, description, metadata):
        metadata.update(fields)
        for name in [name for name, text in fields.items() if text is None]:
            del metadata[name]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_metadata(tqc_cache=None), "is not a tqc cache"),
        (_metadata(tqc_cache="3"), "version '3', and this package reads versions 1 and 2"),
        (_metadata(tqc_cache="1"), "of version 1, and has a spec for layers.0.keys that is not: it begins with 'tq2'"),
        (_metadata(cache="{"), "not JSON"),
        (_metadata(cache="[" * 100_000), "not JSON"),
        (_metadata(cache="[]"), "no 'kind'"),
        (lambda t, d, m: d.update(kind="OffloadedCache"), "unknown kind 'OffloadedCache'"),
        (lambda t, d, m: d.update(layers=3), "no 'layers'"),
        (lambda t, d, m: d.pop("grows"), "no 'grows'"),
        (lambda t, d, m: d.update(kind="tuple"), "layers.0 is not a list"),
        (of_layer(kind="os.system"), "unknown kind: layers.0 is a 'os.system'"),
        (of_layer(kind="DummyLayer"), "a layer that holds none"),
        (of_layer(kind="StaticLayer"), "no 'max_cache_len'"),
        (of_layer(kind="StaticLayer", max_cache_len=64, cumulative_length=0), "keys for 100 tokens"),
        (of_layer(kind="StaticLayer", max_cache_len=True, cumulative_length=0), "no 'max_cache_len'"),
        (of_layer(kind="DynamicSlidingWindowLayer", sliding_window=8, cumulative_length=9, record_past=0), "keys for"),
        (of_layer(values=None), "only one of keys and values"),
        (of_layer(keys=None, values=None), "belongs to nothing"),
        (of_keys(kind="pickle"), "unknown kind 'pickle'"),
        (of_keys(spec="tq2:d16"), "malformed spec"),
        (of_keys(spec="tq1:d16:b3:centred:s4:w32:hadamard:0"), "is of version 2, and has a spec .* begins with 'tq1'"),
        (of_keys(spec="tq3:d16:b3:centred:s4:w32:hadamard:0"), "is of version 2, and has a spec .* begins with 'tq3'"),
        (of_keys(spec="tq2:d16:b3:centred:s4:w32:hadamard:0:keep200"), r"windows that keep and begin at \[\(200, 0\)"),
        (of_keys(spec="tq2:d16:b3:centred:s4:w32:hadamard:0:keep99"), "holds 100 of 100 tokens from 0 on"),
        (of_keys(spec="tq2:d16:b3:centred:s40:w96:hadamard:0"), "64 of 100 tokens that are packed"),
        (of_keys(spec="tq2:d16:b3:centred:s4:w032:hadamard:0"), "malformed spec"),
        (of_keys(spec="tq2:d65536:b3:centred:s4:w32:hadamard:0"), "at most 1024, got 65536"),
        (of_keys(spec="tq2:d16:b9:centred:s4:w32:hadamard:0"), "bits must be"),
        (of_keys(spec="tq2:d24:b3:centred:s4:w32:hadamard:0"), r"keys.dense of shape \[2, 2, 38, 16\]"),
        (of_keys(spec="tq2:d16:b4:centred:s4:w32:hadamard:0"), "keys.pages of shape"),
        (of_keys(length=-1), "'length' of layers.0.keys is -1"),
        (of_keys(length=2**70), "'length'"),
        (of_keys(length="100"), "no 'length' that is a int"),
        (of_keys(length=2**40), "tokens long"),
        (of_keys(length=99), "is 99 tokens long and holds 100"),
        (of_keys(length=101), "keys.pages of shape"),
        (of_keys(length=0), "is 0 tokens long and holds 100"),
        (state_of_keys(100, 0, 0), "that are packed, which cannot be"),
        (state_of_keys(100, 96 + 32, 0), "that are packed, which cannot be"),
        (state_of_keys(100, 65, 0), "that are packed, which cannot be"),
        (state_of_keys(100, 96, 0), "keys.pages of shape"),
        (state_of_keys(-1, 0, 0), "holds -1"),
        (state_of_keys(100, 64), "keys.state of shape"),
        (state_of_keys(100, 64, 1), "from 1 on and keeps all"),
        (state_of_keys(100, 64, -1), "is 100 tokens long and holds 101"),
        (of_tensor("keys.state", lambda x: x.int()), "keys.state of shape .* I32"),
        (of_tensor("keys.pages", lambda x: x[:, :, :1]), "keys.pages of shape"),
        (of_tensor("keys.pages", lambda x: x[:1]), "keys.pages of shape"),
        (of_tensor("keys.pages", lambda x: x.to(torch.int8)), "keys.pages of shape .* I8"),
        (of_tensor("keys.dense", lambda x: x[..., :8]), "keys.dense of shape"),
        (of_tensor("keys.dense", lambda x: x[:, :, :-1]), "keys.dense of shape"),
        (of_tensor("keys.dense", lambda x: x.double()), "keys.dense of dtype F64"),
        (of_tensor("keys.dense", lambda x: x[0]), "keys.dense of shape"),
        (of_tensor("values.dense", lambda x: x.bfloat16()), "keys .* F32 and values .* BF16"),
        (lambda t, d, m: t.pop("layers.0.keys.pages"), "lacks the tensor 'layers.0.keys.pages'"),
        (lambda t, d, m: t.update(extra=torch.zeros(1)), "belongs to nothing: 'extra'"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(change, message, saved):
    path = damaged(saved, change)
    with pytest.raises(CacheFileError, match=message) as error:
        load_cache(path)
    assert str(error.value).startswith(str(path))


def _without_room(tensors: dict[str, torch.Tensor], *others: Any) -> None:
    """As version 1 was first written: a file of that time does not hold the pages that there is room for."""
    as_version_1(tensors, *others)
    for part in ("keys", "values"):
        tensors[f"layers.0.{part}.pages"] = tensors[f"layers.0.{part}.pages"][:, :, :2].contiguous()


def _capacity(tokens: int):
    def change(tensors, description, metadata):
        _without_room(tensors, description, metadata)
        layer = description["layers"][0]
        for part in (layer["keys"], layer["values"]):
            part["length"] = tokens
        layer["max_cache_len"] = tokens

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_capacity(2**24), "has room for tokens of .* bytes that it does not hold"),
        (_capacity(2**20), "has room for tokens of .* bytes that it does not hold"),
        (_capacity(2**24 + 1), "tokens long"),
        (of_layer(max_cache_len=199), "keys for 200 tokens"),
        (of_layer(cumulative_length=91), r"\[90, 90\] of them stored"),
        (of_layer(cumulative_length=201), r"\[90, 90\] of them stored"),
        (state_of_keys(89, 64, 0), r"\[89, 90\] of them stored"),
        (state_of_keys(92, 64, 0), r"\[92, 90\] of them stored"),
        (of_tensor("keys.pages", lambda x: x[:, :, :5]), "keys.pages of shape"),
        (of_layer(keys=None, values=None), "counts tokens in layers.0, which has no keys"),
        (of_layer(keys=None, values=None, cumulative_length=0, max_cache_len=2**40), "which no cache has"),
    ],
)
def test_preallocated_caches_that_do_not_add_up(change, message, saved_static):
    with pytest.raises(CacheFileError, match=message):
        load_cache(damaged(saved_static, change))


def test_a_crop_lowers_the_count_alone(saved_static):
    assert load_cache(damaged(saved_static, of_layer(cumulative_length=50))).get_seq_length() == 50


def test_preallocated_caches_without_their_room(saved_static):
    layers = [load_cache(path).layers[0] for path in (saved_static, damaged(saved_static, _without_room))]
    for name in ("keys", "values"):
        one, other = (getattr(layer, name) for layer in layers)
        assert one.pages.shape == other.pages.shape and torch.equal(one.pages, other.pages)


def test_more_memory_than_there_is(saved, monkeypatch):
    monkeypatch.setattr("tqc.cache.file._free_memory", lambda device: 10_000)
    with pytest.raises(CacheFileError, match=r"needs \d+ bytes of memory on cpu, where 10000 are free"):
        load_cache(saved)


def test_headers_that_would_take_more_memory_than_the_file(saved, tmp_path):
    """Twenty times as much, if it is read."""
    path = damaged(saved, lambda t, d, m: d["layers"].extend([[]] * 3_000_000))
    with pytest.raises(CacheFileError, match="bytes of header, more than"):
        load_cache(path)
    content = damaged(saved, lambda t, d, m: d["layers"].extend([[]] * 500_000)).read_bytes()
    result, peak = outcome(content, tmp_path / "large")
    assert result == "refused" and (peak or 0) < allowed(content)


def test_errors_of_the_system_name_the_path(tmp_path):
    for path in (tmp_path, tmp_path / "missing", "/dev/null"):
        with pytest.raises(OSError, match=str(path)) as caught:
            load_cache(path)
        assert caught.value.errno


def test_mutated_files_load_or_raise_one_error(tmp_path):
    """`make test-fuzz` takes more of them."""
    contents = [path.read_bytes() for path in seeds(tmp_path)]
    results = set()
    for number in range(400):
        r = random.Random(number)
        content = mutated(r.choice(contents), r)
        result, peak = outcome(content, tmp_path / "mutated")
        assert (peak or 0) < allowed(content), number
        results.add(result)
    assert results == {"loaded", "refused"}


def test_files_that_are_cut_short(saved, tmp_path):
    whole = saved.read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(CacheFileError, match="not a tqc cache, or it is truncated"):
            load_cache(tmp_path / "cut")
    with pytest.raises(FileNotFoundError):
        load_cache(tmp_path / "none")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_headers_load_or_raise_one_error(data, saved, tmp_path):
    """Whatever stands in the header, loading ends in a cache or in a CacheFileError."""
    whole = bytearray(saved.read_bytes())
    (header,) = struct.unpack("<Q", whole[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, 8 + header - 1))
        whole[position] = data.draw(st.sampled_from(b'0123456789"{}[],:-dbsw\x00\xff') | st.integers(0, 255))
    path = tmp_path / "fuzzed"
    path.write_bytes(whole)
    try:
        load_cache(path)
    except CacheFileError:
        pass


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["dense", "packed"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_descriptions_load_or_raise_one_error(data, saved):
    def change(tensors, description, metadata):
        places = [description, description["layers"][0], *(description["layers"][0][p] for p in ("keys", "values"))]
        place = data.draw(st.sampled_from(places))
        place[data.draw(st.sampled_from(sorted(place)))] = data.draw(_JSON)

    try:
        load_cache(damaged(saved, change))
    except CacheFileError:
        pass


@pytest.mark.parametrize("name", ["saved", "golden"])
def test_a_file_of_version_2_that_was_loaded_is_saved_the_same(name, request, tmp_path):
    """So what a file holds is one order of its tokens, whatever memory they were in."""
    path = GOLDEN / "cache_v2.safetensors" if name == "golden" else request.getfixturevalue(name)
    save_cache(load_cache(path), tmp_path / "again")
    assert content(tmp_path / "again") == content(path)


@pytest.mark.parametrize("length", [3, 36, 37, 100])
def test_files_of_version_1_are_those_of_version_2_in_another_order(length, tmp_path):
    save_cache(packed_cache(length), tmp_path / "now")
    save_cache(load_cache(damaged(tmp_path / "now", as_version_1)), tmp_path / "converted")
    assert content(tmp_path / "now") == content(tmp_path / "converted")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_keys(spec="tq1:d16:b3:centred:s4:w32:hadamard:0:keep100"), "malformed spec"),
        (of_keys(spec="tq2:d16:b3:centred:s4:w32:hadamard:0"), "is of version 1, and has a spec .* begins with 'tq2'"),
        (state_of_keys(100, 64, 0), "keys.state of shape"),
        (of_tensor("keys.dense", lambda x: x[:, :, 1:]), "keys.dense of shape"),
    ],
)
def test_files_of_version_1_that_are_mixed_with_another(change, message, saved):
    def both(*parts):
        as_version_1(*parts)
        change(*parts)

    with pytest.raises(CacheFileError, match=message):
        load_cache(damaged(saved, both))
