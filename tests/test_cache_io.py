"""Caches on disk: round trips, continuing from a file, hostile files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

import tqc
from tqc.cache_io import CacheFileError, cache_bytes, load_cache, save_cache
from tqc.format import PackedFormat
from tqc.packed_tensor import PackedTensor, Storage, pack, write_at

GOLDEN = Path(__file__).parent / "golden"
KEYS, VALUES = PackedFormat(16, 3, True, 4, 32), PackedFormat(16, 2, False, 4, 32)
OPTIONS = {"provider": "reference", "rest": "eager", "residual_window": 32, "bits_k": 4, "bits_v": 4}


def states(length: int, heads: int = 2, dim: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(length)
    keys, values = (torch.randn(2, heads, length, dim, generator=generator).to(dtype) for _ in range(2))
    return keys, values


def packed_cache(length: int = 100, layers: int = 2, dtype: torch.dtype = torch.float32) -> DynamicCache:
    cache = DynamicCache()
    for index in range(layers):
        cache.update(*states(length + index, dtype=dtype), index)
        layer = cache.layers[index]
        layer.keys, layer.values = pack(layer.keys, KEYS), pack(layer.values, VALUES)
    return cache


def tiny(model: str = "Llama", **config: Any) -> Any:
    torch.manual_seed(0)
    small = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": None,
    }  # fmt: skip
    cls = getattr(transformers, f"{model}ForCausalLM")
    found = cls(getattr(transformers, f"{model}{'Text' if model == 'Gemma3' else ''}Config")(**small, **config)).eval()
    found.generation_config.eos_token_id = None
    return found


def assert_same(one: Any, other: Any) -> None:
    """Two caches hold the same layers, tensors, packed parts and numbers."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape and one.dtype == other.dtype
        if isinstance(one, PackedTensor):
            assert one.fmt == other.fmt and one.state.tolist() == other.state.tolist()
            assert torch.equal(one.dequantize(), other.dequantize())
        else:
            assert torch.equal(one, other)
    elif isinstance(one, (tuple, list)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_same(one[name], other[name])
    elif hasattr(one, "layers") or hasattr(one, "keys") or hasattr(one, "self_attention_cache"):
        # generate() marks the caches that it was given.
        assert_same(*({name: v for name, v in vars(x).items() if name != "_is_user_defined"} for x in (one, other)))
    else:
        assert one == other


def round_trip(cache: Any, folder: Path) -> Any:
    save_cache(cache, folder / "cache.safetensors")
    assert [file.name for file in folder.iterdir()] == ["cache.safetensors"]
    loaded = load_cache(folder / "cache.safetensors")
    assert_same(cache, loaded)
    return loaded


# Round trips


@pytest.mark.parametrize("length", [1, 4, 36, 37, 68, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_cache(length, dtype, tmp_path):
    round_trip(packed_cache(length, dtype=dtype), tmp_path)


def test_dense_and_uninitialized_layers(tmp_path):
    cache = DynamicCache(config=tiny("Gemma3", layer_types=["full_attention", "sliding_attention"]).config)
    cache.update(*states(5), 0)
    loaded = round_trip(cache, tmp_path)
    assert loaded.layer_class_to_replicate is None and not loaded.layers[1].is_initialized


def test_layer_that_is_initialized_and_empty(tmp_path):
    cache = packed_cache()
    cache.layers[1].lazy_initialization(*states(3))
    round_trip(cache, tmp_path)


def test_keys_and_values_that_share_memory(tmp_path):
    both, _ = states(6, dim=32)
    cache = DynamicCache()
    cache.update(*states(1), 0)
    cache.layers[0].keys, cache.layers[0].values = both[..., :16], both[..., 16:]
    round_trip(cache, tmp_path)


@pytest.mark.parametrize("length", [5, 40])
def test_sliding_window_layers(length, tmp_path):
    dynamic = DynamicSlidingWindowLayer(sliding_window=16)
    static = StaticSlidingWindowLayer(max_cache_len=64, sliding_window=16)
    for layer, cache in ((dynamic, DynamicCache()), (static, StaticCache(tiny().config, 64))):
        layer.update(*states(length))
        layer.update(*states(1))
        cache.layers = [layer]
        loaded = round_trip(cache, tmp_path).layers[0]
        for one, other in zip(layer.update(*states(1)), loaded.update(*states(1)), strict=True):
            assert torch.equal(one, other)
        assert layer.get_mask_sizes(1) == loaded.get_mask_sizes(1)


def test_static_cache(tmp_path):
    cache = StaticCache(tiny().config, max_cache_len=64)
    cache.update(*states(20), 0)
    loaded = round_trip(cache, tmp_path)
    cache.update(*states(3), 0)
    loaded.update(*states(3), 0)
    assert_same(cache, loaded)
    assert not loaded.layers[1].is_initialized
    loaded.update(*states(3), 1)


def test_packed_static_cache_keeps_its_capacity(tmp_path):
    layer = StaticLayer(max_cache_len=200)
    layer.lazy_initialization(*states(1))
    layer.cumulative_length += 90
    for name, fmt, new in zip(("keys", "values"), (KEYS, VALUES), states(90), strict=True):
        storage = Storage.allocate(2, 2, fmt, new.dtype, new.device, 200)
        setattr(layer, name, PackedTensor(storage, 200))
        write_at(getattr(layer, name), new, torch.tensor([0]))
    cache = StaticCache(tiny().config, 200)
    cache.layers = [layer]
    loaded = round_trip(cache, tmp_path).layers[0]
    for held in (layer, loaded):
        write_at(held.keys, states(110)[0], torch.tensor([90]))
    assert_same(layer, loaded)


def test_encoder_decoder_cache(tmp_path):
    cache = EncoderDecoderCache(packed_cache(70), packed_cache(40))
    cache.is_updated = {0: True, 1: True}
    round_trip(cache, tmp_path)
    round_trip(EncoderDecoderCache(DynamicCache(), DynamicCache()), tmp_path)


def test_tuple_of_layers(tmp_path):
    packed = packed_cache(50, layers=1).layers[0]
    round_trip(((packed.keys, packed.values), states(7)), tmp_path)
    round_trip((), tmp_path)


def test_a_prefix_is_saved_without_the_tokens_behind_it(tmp_path):
    cache = packed_cache(100, layers=1)
    behind = cache.layers[0].keys
    cache.crop(-40)
    save_cache(cache, tmp_path / "cache.safetensors")
    loaded = load_cache(tmp_path / "cache.safetensors").layers[0].keys
    assert loaded.packed_storage.length == 60 and behind.packed_storage.length == 100
    assert torch.equal(loaded.dequantize(), cache.layers[0].keys.dequantize())


def test_loading_copies_out_of_the_file(tmp_path):
    path = tmp_path / "cache.safetensors"
    cache = packed_cache()
    save_cache(cache, path)
    loaded = load_cache(path)
    save_cache(packed_cache(64), path)
    assert_same(cache, loaded)


def test_file_is_about_as_large_as_the_cache(tmp_path):
    save_cache(packed_cache(2000), tmp_path / "cache.safetensors")
    size = (tmp_path / "cache.safetensors").stat().st_size
    held = cache_bytes(packed_cache(2000))
    assert 0.9 * held < size < held + 4000


# Continuing


@pytest.mark.parametrize("implementation", [None, "static"])
@pytest.mark.parametrize("compressed", [True, False])
def test_generation_goes_on_as_without_the_round_trip(implementation, compressed, tmp_path):
    model = tiny()
    if compressed:
        model.compile(backend="tqai", options=OPTIONS)
    prompt = torch.randint(2, 96, (2, 70), generator=torch.Generator().manual_seed(1))
    # A static cache of the full length from the start, so that the continuation finds room in it.
    cache = DynamicCache() if implementation is None else StaticCache(model.config, 128)
    options = {"do_sample": False, "return_dict_in_generate": True, "use_cache": True, "disable_compile": True}
    first = model.generate(prompt, past_key_values=cache, max_new_tokens=8, **options)
    if compressed and implementation is None:
        assert isinstance(first.past_key_values.layers[0].keys, PackedTensor)
    save_cache(first.past_key_values, tmp_path / "cache.safetensors")
    loaded = load_cache(tmp_path / "cache.safetensors")
    assert_same(first.past_key_values, loaded)
    texts = [
        model.generate(first.sequences, past_key_values=cache, max_new_tokens=34, **options).sequences
        for cache in (loaded, first.past_key_values)
    ]
    assert torch.equal(*texts)
    torch.compiler.reset()


def test_encoder_decoder_generation_goes_on(tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.compile(backend="tqai", options=OPTIONS)
    inputs = torch.randint(2, 96, (1, 60), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(inputs, max_new_tokens=38, **options)
    assert isinstance(first.past_key_values, EncoderDecoderCache)
    loaded = round_trip(first.past_key_values, tmp_path)
    texts = [
        model.generate(inputs, decoder_input_ids=first.sequences, past_key_values=cache, max_new_tokens=8, **options)
        for cache in (loaded, first.past_key_values)
    ]
    assert torch.equal(texts[0].sequences, texts[1].sequences)
    torch.compiler.reset()


# What is refused


class Unknown(DynamicSlidingWindowLayer):
    pass


def test_layers_that_are_not_known_are_named(tmp_path):
    cache = packed_cache()
    cache.layers[1] = Unknown(8)
    with pytest.raises(TypeError, match=r"layers.1: it is a .*Unknown"):
        save_cache(cache, tmp_path / "cache.safetensors")
    cache = DynamicCache()
    cache.layers = [transformers.cache_utils.LinearAttentionLayer()]
    with pytest.raises(TypeError, match=r"layers.0: it is a LinearAttentionLayer"):
        save_cache(cache, tmp_path / "cache.safetensors")
    with pytest.raises(TypeError, match="cannot save a builtins.int"):
        save_cache(3, tmp_path / "cache.safetensors")
    assert not list(tmp_path.iterdir())


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "cache.safetensors"
    save_cache(packed_cache(100, layers=1), path)
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
        (_metadata(tqc_cache="2"), "version '2', and this package reads version 1"),
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
        (_set(spec="tq1:d16"), "malformed spec"),
        (_set(spec="tq2:d16:b3:centred:s4:w32:hadamard:0"), "version 1"),
        (_set(spec="tq1:d16:b3:centred:s4:w032:hadamard:0"), "malformed spec"),
        (_set(spec="tq1:d16:b9:centred:s4:w32:hadamard:0"), "bits must be"),
        (_set(spec="tq1:d24:b3:centred:s4:w32:hadamard:0"), r"keys.dense of shape \[2, 2, 37, 16\]"),
        (_set(spec="tq1:d16:b4:centred:s4:w32:hadamard:0"), "keys.pages of shape"),
        (_set(length=-1), "'length' of layers.0.keys is -1"),
        (_set(length=2**70), "'length'"),
        (_set(length="100"), "no 'length' that is a int"),
        (_set(length=2**40), "tokens long"),
        (_set(length=99), "is 99 tokens long and holds 100"),
        (_set(length=101), "keys .* and values"),
        (_state(100, 0), "are packed, which cannot be"),
        (_state(100, 96 + 32), "are packed, which cannot be"),
        (_state(100, 65), "are packed, which cannot be"),
        (_state(100, 96), "keys.pages of shape"),
        (_state(-1, 0), "holds -1"),
        (_state(100,), "keys.state of shape"),
        (_tensor("keys.state", lambda x: x.int()), "keys.state of shape .* I32"),
        (_tensor("keys.pages", lambda x: x[:, :, :1]), "keys.pages of shape"),
        (_tensor("keys.pages", lambda x: x[:1]), "keys.pages of shape"),
        (_tensor("keys.pages", lambda x: x.to(torch.int8)), "keys.pages of shape .* I8"),
        (_tensor("keys.dense", lambda x: x[..., :8]), "keys.dense of shape"),
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


def test_files_of_version_1_load_for_ever():
    cache = load_cache(GOLDEN / "cache_v1.safetensors")
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == 75
    with safe_open(GOLDEN / "cache_v1_values.safetensors", framework="pt") as expected:
        for name in ("0.keys", "0.values", "1.keys", "1.values"):
            layer, part = name.split(".")
            found = getattr(cache.layers[int(layer)], part)
            assert isinstance(found, PackedTensor) == (layer == "0")
            torch.testing.assert_close(found.clone() + 0, expected.get_tensor(name))


# cache_bytes


def test_bytes_of_packed_and_dense_caches():
    cache = packed_cache(100)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert cache_bytes(cache) == sum(tensor.packed_nbytes() for tensor in tensors)
    assert cache_bytes(tensors) == cache_bytes({"a": tensors, "b": tuple(tensors)}) == cache_bytes(cache)
    assert cache_bytes(EncoderDecoderCache(cache, DynamicCache())) == cache_bytes(cache)
    dense = DynamicCache()
    dense.update(*states(100), 0)
    assert cache_bytes(dense) == 2 * 2 * 2 * 100 * 16 * 4
    assert cache_bytes(None) == cache_bytes(DynamicCache()) == 0


def test_storages_are_counted_whole_and_once():
    keys, values = states(10)
    both = torch.cat([keys, values], dim=-1)
    assert cache_bytes(((both[..., :16], both[..., 16:]), (both[:, :, :1], both))) == both.nbytes
    cache = packed_cache(100, layers=1)
    prefix = cache.layers[0].keys[:, :, :50]
    assert cache_bytes([cache, prefix]) == cache_bytes(cache)


def test_bytes_of_static_caches_and_modules():
    cache = StaticCache(tiny().config, max_cache_len=64)
    cache.update(*states(5), 0)
    tensors = 2 * 2 * 2 * 64 * 16 * 4
    assert tensors <= cache_bytes(cache) <= tensors + 64
    module = torch.nn.Linear(3, 3)
    module.register_buffer("k_cache", torch.zeros(1, 2, 8, 4))
    assert cache_bytes(module) == 256


def test_package_exports():
    assert tqc.save_cache is save_cache and tqc.load_cache is load_cache and tqc.cache_bytes is cache_bytes
