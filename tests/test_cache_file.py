"""Files of caches: damaged and hostile ones are refused, and those of all versions load for ever."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer

from tests.common import as_version_1, packed_cache, packed_static_layer, packed_window_layer, states
from tests.mutated_files import allowed, mutated, outcome, seeds
from tqc.cache.io import CacheFileError, load_cache, save_cache

GOLDEN = Path(__file__).parent / "golden"


def damaged(path: Path, change: Any) -> Path:
    """A copy of the file at `path` whose tensors and description `change(tensors, description, metadata)` altered."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    description = json.loads(metadata["cache"])
    before = metadata["cache"]
    change(tensors, description, metadata)
    if metadata.get("cache") == before:
        metadata["cache"] = json.dumps(description)
    result = path.with_name("damaged.safetensors")
    save_file(tensors, result, metadata=metadata)
    return result


def content(path: Path) -> Any:
    """The tensors of a file, in bytes."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return {name: (x.dtype, x.shape, x.flatten().view(torch.uint8).tolist()) for name, x in tensors.items()}


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


@pytest.fixture(scope="module")
def saved_window(tmp_path_factory):
    """The last 99 of 230 tokens; 2 tokens are dropped in a page that is held."""
    path = tmp_path_factory.mktemp("window") / "cache.safetensors"
    cache = DynamicCache()
    cache.layers = [packed_window_layer()]
    save_cache(cache, path)
    return path


def _set(**numbers: Any):
    return lambda tensors, description, metadata: description["layers"][0]["keys"].update(numbers)


def _layer(**numbers: Any):
    return lambda tensors, description, metadata: description["layers"][0].update(numbers)


def _tensor(name: str, change: Any):
    return lambda tensors, *_: tensors.update({f"layers.0.{name}": change(tensors[f"layers.0.{name}"]).contiguous()})


def _state(*numbers: int):
    return _tensor("keys.state", lambda state: torch.tensor(numbers, dtype=torch.int64))


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
        (_layer(kind="os.system"), "unknown kind: layers.0 is a 'os.system'"),
        (_layer(kind="DummyLayer"), "a layer that holds none"),
        (_layer(kind="StaticLayer"), "no 'max_cache_len'"),
        (_layer(kind="StaticLayer", max_cache_len=64, cumulative_length=0), "keys for 100 tokens"),
        (_layer(kind="StaticLayer", max_cache_len=True, cumulative_length=0), "no 'max_cache_len'"),
        (_layer(kind="DynamicSlidingWindowLayer", sliding_window=8, cumulative_length=9, record_past=0), "keys for"),
        (_layer(values=None), "only one of keys and values"),
        (_layer(keys=None, values=None), "belongs to nothing"),
        (_set(kind="pickle"), "unknown kind 'pickle'"),
        (_set(spec="tq2:d16"), "malformed spec"),
        (_set(spec="tq1:d16:b3:centred:s4:w32:hadamard:0"), "is of version 2, and has a spec .* begins with 'tq1'"),
        (_set(spec="tq3:d16:b3:centred:s4:w32:hadamard:0"), "is of version 2, and has a spec .* begins with 'tq3'"),
        (_set(spec="tq2:d16:b3:centred:s4:w32:hadamard:0:keep200"), r"windows that keep and begin at \[\(200, 0\)"),
        (_set(spec="tq2:d16:b3:centred:s4:w32:hadamard:0:keep99"), "holds 100 of 100 tokens from 0 on"),
        (_set(spec="tq2:d16:b3:centred:s40:w96:hadamard:0"), "64 of 100 tokens that are packed"),
        (_set(spec="tq2:d16:b3:centred:s4:w032:hadamard:0"), "malformed spec"),
        (_set(spec="tq2:d65536:b3:centred:s4:w32:hadamard:0"), "at most 1024, got 65536"),
        (_set(spec="tq2:d16:b9:centred:s4:w32:hadamard:0"), "bits must be"),
        (_set(spec="tq2:d24:b3:centred:s4:w32:hadamard:0"), r"keys.dense of shape \[2, 2, 38, 16\]"),
        (_set(spec="tq2:d16:b4:centred:s4:w32:hadamard:0"), "keys.pages of shape"),
        (_set(length=-1), "'length' of layers.0.keys is -1"),
        (_set(length=2**70), "'length'"),
        (_set(length="100"), "no 'length' that is a int"),
        (_set(length=2**40), "tokens long"),
        (_set(length=99), "is 99 tokens long and holds 100"),
        (_set(length=101), "keys.pages of shape"),
        (_set(length=0), "is 0 tokens long and holds 100"),
        (_state(100, 0, 0), "that are packed, which cannot be"),
        (_state(100, 96 + 32, 0), "that are packed, which cannot be"),
        (_state(100, 65, 0), "that are packed, which cannot be"),
        (_state(100, 96, 0), "keys.pages of shape"),
        (_state(-1, 0, 0), "holds -1"),
        (_state(100, 64), "keys.state of shape"),
        (_state(100, 64, 1), "from 1 on and keeps all"),
        (_state(100, 64, -1), "is 100 tokens long and holds 101"),
        (_tensor("keys.state", lambda x: x.int()), "keys.state of shape .* I32"),
        (_tensor("keys.pages", lambda x: x[:, :, :1]), "keys.pages of shape"),
        (_tensor("keys.pages", lambda x: x[:1]), "keys.pages of shape"),
        (_tensor("keys.pages", lambda x: x.to(torch.int8)), "keys.pages of shape .* I8"),
        (_tensor("keys.dense", lambda x: x[..., :8]), "keys.dense of shape"),
        (_tensor("keys.dense", lambda x: x[:, :, :-1]), "keys.dense of shape"),
        (_tensor("keys.dense", lambda x: x.double()), "keys.dense of dtype F64"),
        (_tensor("keys.dense", lambda x: x[0]), "keys.dense of shape"),
        (_tensor("values.dense", lambda x: x.bfloat16()), "keys .* F32 and values .* BF16"),
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
        (_layer(max_cache_len=199), "keys for 200 tokens"),
        (_layer(cumulative_length=91), r"\[90, 90\] of them stored"),
        (_layer(cumulative_length=201), r"\[90, 90\] of them stored"),
        (_state(89, 64, 0), r"\[89, 90\] of them stored"),
        (_state(92, 64, 0), r"\[92, 90\] of them stored"),
        (_tensor("keys.pages", lambda x: x[:, :, :5]), "keys.pages of shape"),
        (_layer(keys=None, values=None), "counts tokens in layers.0, which has no keys"),
        (_layer(keys=None, values=None, cumulative_length=0, max_cache_len=2**40), "which no cache has"),
    ],
)
def test_preallocated_caches_that_do_not_add_up(change, message, saved_static):
    with pytest.raises(CacheFileError, match=message):
        load_cache(damaged(saved_static, change))


def test_a_crop_lowers_the_count_alone(saved_static):
    assert load_cache(damaged(saved_static, _layer(cumulative_length=50))).get_seq_length() == 50


def test_preallocated_caches_without_their_room(saved_static):
    layers = [load_cache(path).layers[0] for path in (saved_static, damaged(saved_static, _without_room))]
    for name in ("keys", "values"):
        one, other = (getattr(layer, name) for layer in layers)
        assert one.pages.shape == other.pages.shape and torch.equal(one.pages, other.pages)


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
        (_set(spec="tq2:d16:b3:centred:s4:w32:hadamard:0"), "from 131 on and keeps all"),
        (_set(spec="tq2:d16:b3:centred:s4:w32:hadamard:0:keep099"), "malformed spec"),
        (_state(229, 224, 130), r"windows that keep and begin at \[\(99, 130\), \(99, 131\)\]"),
        (_tensor("keys.pages", lambda x: x[:, :, 1:]), "keys.pages of shape"),
        (_tensor("keys.pages", lambda x: torch.cat([x, x[:, :, :1]], 2)), "keys.pages of shape"),
        (_layer(kind="DynamicLayer"), "windows that keep"),
        (_layer(sliding_window=90), "and states"),
        (_layer(sliding_window=101), "and states"),
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
        load_cache(damaged(tmp_path / "cache", _layer(**changed)))


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


@pytest.mark.parametrize("name", ["saved", "saved_window", "golden"])
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
        (_set(spec="tq1:d16:b3:centred:s4:w32:hadamard:0:keep100"), "malformed spec"),
        (_set(spec="tq2:d16:b3:centred:s4:w32:hadamard:0"), "is of version 1, and has a spec .* begins with 'tq2'"),
        (_state(100, 64, 0), "keys.state of shape"),
        (_tensor("keys.dense", lambda x: x[:, :, 1:]), "keys.dense of shape"),
    ],
)
def test_files_of_version_1_that_are_mixed_with_another(change, message, saved):
    def both(*parts):
        as_version_1(*parts)
        change(*parts)

    with pytest.raises(CacheFileError, match=message):
        load_cache(damaged(saved, both))
