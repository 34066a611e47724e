"""Caches saved and loaded: round trips, continuing from a file, layers that cannot be saved; and their bytes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer

import tqc
from tests.common import assert_same, packed_cache, packed_static_layer, round_trip, states
from tqc import caches
from tqc.cache.io import cache_bytes, load_cache, save_cache
from tqc.cache.packed_tensor import PackedTensor, pack, write_at
from tqc.format import PackedFormat

OPTIONS = {"provider": "reference", "rest": "eager", "residual_window": 32, "bits_k": 4, "bits_v": 4}


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
    layer = packed_static_layer()
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


def test_pages_that_outlive_dropped_tokens(tmp_path):
    """A wide window: more pages are in use than so many tokens would have packed."""
    cache = packed_cache(300, layers=1)
    layer = cache.layers[0]
    fmt = PackedFormat(16, 4, True, 4, 96)
    layer.keys, layer.values = (pack(dense, fmt) for dense in states(300))
    cache.crop(-60)
    for tensor in (layer.keys, layer.values):
        tensor.packed_storage.truncate(240)
        assert tensor.packed_storage.packed > fmt.packed_tokens(240)
    loaded = round_trip(cache, tmp_path)
    for held in (cache, loaded):
        held.update(*states(90), 0)
    assert_same(cache, loaded)


def test_room_is_saved_as_zeros(tmp_path):
    cache = StaticCache(tiny().config, 200)
    cache.layers = [packed_static_layer()]
    for tensor in (cache.layers[0].keys, cache.layers[0].values):
        tensor.pages[:, :, tensor.packed_storage.packed // 32 :] = 99  # what was in memory before
    save_cache(cache, tmp_path / "cache.safetensors")
    with safe_open(tmp_path / "cache.safetensors", framework="pt") as file:
        pages = file.get_tensor("layers.0.keys.pages")
    assert pages.shape[2] == 6 and pages[:, :, :2].any() and not pages[:, :, 2:].any()


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


def test_generation_with_packed_windows_goes_on(tmp_path):
    layers = ["sliding_attention", "full_attention"]
    model = tiny("Gemma3", layer_types=layers, sliding_window=50, query_pre_attn_scalar=16)
    model.compile(backend="tqai", options=OPTIONS)
    prompt = torch.randint(2, 96, (2, 110), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": False, "return_dict_in_generate": True, "use_cache": True}
    first = model.generate(prompt, max_new_tokens=6, **options)
    window = first.past_key_values.layers[0]
    assert isinstance(window, DynamicSlidingWindowLayer) and isinstance(window.keys, PackedTensor)
    loaded = round_trip(first.past_key_values, tmp_path)
    texts = [
        model.generate(first.sequences, past_key_values=cache, max_new_tokens=40, **options)
        for cache in (loaded, first.past_key_values)
    ]
    assert torch.equal(texts[0].sequences, texts[1].sequences)
    assert_same(*(text.past_key_values for text in texts))
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


# Paths


def test_threads_save_to_one_path(tmp_path):
    path, caches = tmp_path / "cache.safetensors", [packed_cache(length) for length in (40, 60, 80)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda i: save_cache(caches[i % 3], path), range(60)))
    assert_same(load_cache(path), next(c for c in caches if c.get_seq_length() == load_cache(path).get_seq_length()))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_name_as_long_as_names_can_be(tmp_path):
    for name in ("n" * 255, "é" * 127):
        save_cache(packed_cache(), tmp_path / name)
        load_cache(tmp_path / name)
    with pytest.raises(OSError, match="n" * 256) as caught:
        save_cache(packed_cache(), tmp_path / ("n" * 256))
    assert caught.value.errno == errno.ENAMETOOLONG


def test_symbolic_links_stay(tmp_path):
    (tmp_path / "there").mkdir()
    file, link, chain = tmp_path / "there" / "file", tmp_path / "link", tmp_path / "chain"
    link.symlink_to("there/file")
    chain.symlink_to(link)
    for path, length in ((link, 40), (chain, 50)):
        save_cache(packed_cache(length, layers=1), path)
        assert link.is_symlink() and chain.is_symlink() and not file.is_symlink()
        assert load_cache(file).get_seq_length() == length
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="loop"):
        save_cache(packed_cache(), loop)
    assert loop.is_symlink()


def test_paths_that_cannot_be_written_are_named_and_what_was_there_stays(tmp_path):
    missing, file, folder = tmp_path / "missing" / "cache", tmp_path / "file", tmp_path / "folder"
    file.write_text("a file")
    folder.mkdir()
    os.mkfifo(tmp_path / "fifo")
    for path, kind in (
        (missing, FileNotFoundError),
        (file / "cache", NotADirectoryError),
        (folder, IsADirectoryError),
        (tmp_path / "fifo", OSError),
    ):
        with pytest.raises(kind) as caught:
            save_cache(packed_cache(), path)
        assert caught.value.filename == str(path) and str(path) in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder", "fifo"}


DISK_FULL = """
import pathlib, resource, signal, sys, tqc
from tests.common import packed_cache
path = pathlib.Path(sys.argv[1])
tqc.save_cache(packed_cache(50), path)
before = path.read_bytes()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    tqc.save_cache(packed_cache(900), path)
except OSError as error:
    assert error.filename == str(path), error
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    print("as before")
"""


def test_a_full_disk_leaves_what_was_there(tmp_path):
    command = [sys.executable, "-c", DISK_FULL, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.stdout == "as before\n", done.stderr


def test_the_file_is_on_the_disk_before_it_has_its_name_and_then_its_folder(tmp_path, monkeypatch):
    synced = []

    def fsync(handle, really=os.fsync):
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), (tmp_path / "cache").exists()))
        really(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    save_cache(packed_cache(), tmp_path / "cache")
    (first, exists), last = synced
    assert Path(first).parent == tmp_path and not exists
    assert last == (str(tmp_path), True)


# What cannot be saved


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
    for name in ("save_cache", "load_cache", "cache_bytes"):
        assert getattr(tqc, name) is getattr(caches, name)
