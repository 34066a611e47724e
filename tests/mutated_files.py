"""Cache files as an attacker writes them: saved caches with numbers, names, shapes, tensors or bytes changed.

`outcome` loads one and tells what happened, and how much memory it took.
"""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from tests.common import packed_cache, packed_static_layer, packed_window_layer, states
from tqc.cache.io import CacheFileError, load_cache, save_cache
from tqc.cache.packed_tensor import PackedTensor

GOLDEN = Path(__file__).parent / "golden"
DTYPES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "F64": 8, "I64": 8, "BOOL": 1}
KINDS = ["DynamicCache", "StaticCache", "EncoderDecoderCache", "tuple", "DynamicLayer", "StaticLayer", "DummyLayer"]
KINDS += ["DynamicSlidingWindowLayer", "StaticSlidingWindowLayer", "packed", "dense", "os.system", "", None]


def seeds(folder: Path) -> list[Path]:
    """A file of each kind of cache and layer, and the golden ones."""
    static = StaticCache(LlamaConfig(num_hidden_layers=1), max_cache_len=200)
    static.layers = [packed_static_layer()]
    dense, sliding = DynamicCache(), DynamicCache()
    dense.layers = [StaticLayer(max_cache_len=64), StaticLayer(max_cache_len=64)]
    sliding.layers = [
        DynamicSlidingWindowLayer(sliding_window=16),
        StaticSlidingWindowLayer(max_cache_len=64, sliding_window=16),
    ]
    for layer in (dense.layers[0], *sliding.layers):
        layer.update(*states(20))
    caches: list[Any] = [packed_cache(100), packed_cache(5), packed_cache(40000, layers=1, dtype=torch.bfloat16)]
    caches += [EncoderDecoderCache(packed_cache(70), packed_cache(40)), (states(7), (packed_cache(50).layers[0].keys,))]
    window = DynamicCache()
    window.layers = [packed_window_layer(), packed_window_layer(60, dtype=torch.bfloat16)]
    caches += [static, dense, sliding, window]
    paths = [folder / f"{i}.safetensors" for i in range(len(caches))]
    for cache, path in zip(caches, paths, strict=True):
        save_cache(cache, path)
    return paths + [GOLDEN / f"cache_v{version}.safetensors" for version in (1, 2)]


class File:
    """The parts of a safetensors file."""

    def __init__(self, content: bytes) -> None:
        (size,) = struct.unpack("<Q", content[:8])
        header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
        self.metadata: dict[str, Any] = header.pop("__metadata__")
        self.description = json.loads(self.metadata["cache"])
        self.tensors = {
            name: [found["dtype"], found["shape"], data[slice(*found["data_offsets"])]]
            for name, found in header.items()
        }

    def content(self, change: Any = lambda header: None) -> bytes:
        header: dict[str, Any] = {"__metadata__": {**self.metadata, "cache": json.dumps(self.description)}}
        at = 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in self.tensors.values())


def mutated(content: bytes, r: random.Random) -> bytes:
    file = File(content)
    for _ in range(r.choice([0, 1, 1, 1, 2, 3])):
        r.choice([_change_json, _change_spec, _change_tensor, _change_counts, _rename])(file, r)
    kind = r.randrange(12)
    if kind == 0:
        return file.content(lambda header: _change_header(header, r))
    result = bytearray(file.content())
    if kind == 1:
        for _ in range(r.randint(1, 4)):
            result[r.randrange(r.choice([16, min(len(result), 2000), len(result)]))] = r.randrange(256)
    elif kind == 2:
        del result[r.choice([r.randrange(len(result)), len(result) - 1, 9, 8, 3]) :]
    elif kind == 3:
        result += r.randbytes(r.choice([1, 8, 1000]))
    elif kind == 4:
        result[:8] = struct.pack("<Q", _number(r) % 2**64)
    return bytes(result)


def _number(r: random.Random) -> int:
    near = r.choice([0, 1, 2, 16, 32, 64, 99, 100, 200, 1 << 20, 1 << 24, 1 << 31, 1 << 40, 1 << 62, 1 << 63, 1 << 64])
    return r.choice([near, near, near - 1, near + 1, -near, int(2 ** r.uniform(0, 40))])


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from _places(node[key])


def _change_json(file: File, r: random.Random) -> None:
    places = list(_places(file.description))
    if not places:
        return
    node, key = r.choice(places)
    how = r.randrange(6)
    if how == 0:
        node[key] = _number(r)
    elif how == 1:
        node[key] = r.choice(KINDS)
    elif how == 2:
        other, name = r.choice(places)
        node[key] = copy.deepcopy(other[name]) if not isinstance(other, dict) or name in other else None
    elif how == 3:
        node[key] = r.choice([None, True, [], {}, 0.5, math.nan, "x" * 1000, [[]] * 1000, "\ud800"])
    elif how == 4 and isinstance(node, list):
        node += [copy.deepcopy(node[key])] * r.choice([1, 2, 500])
    else:
        del node[key]


def _packed(file: File) -> list[dict[str, Any]]:
    return [node[key] for node, key in _places(file.description) if isinstance(node[key], dict) and "spec" in node[key]]


def _change_spec(file: File, r: random.Random) -> None:
    """One part of a spec, in all tensors of the file or in one; sometimes with the tensors made to fit."""
    packed = _packed(file)
    index, text = r.randrange(9), str(_number(r))
    for found in packed if r.random() < 0.5 else packed[:1]:
        parts = str(found["spec"]).split(":")
        if index < len(parts):
            letter = parts[index].rstrip("0123456789")
            parts[index] = r.choice([letter + text, letter + text, "haar", "plain", "centred", "folded", "", "keep99"])
        elif r.random() < 0.5:
            parts.append(f"keep{text}")
        found["spec"] = ":".join(parts)


def _change_counts(file: File, r: random.Random) -> None:
    """Lengths and counters that agree with each other, but not with what is held."""
    number = _number(r)
    names = r.choice([("length",), ("length", "max_cache_len"), ("cumulative_length",), ("max_cache_len",)])
    for node, key in _places(file.description):
        if key in names:
            node[key] = number
    if r.random() < 0.3:
        for name, found in file.tensors.items():
            if name.endswith(".state"):
                count = len(found[2]) // 8
                found[2] = struct.pack(f"<{count}q", *(min(max(_number(r), -(2**63)), 2**63 - 1) for _ in range(count)))


def _change_tensor(file: File, r: random.Random) -> None:
    """A tensor of another shape or dtype, of the size that it says, or with other bytes."""
    if not file.tensors:
        return
    last = r.choice(list(file.tensors)).rsplit(".", 1)[-1]
    chosen = [name for name in file.tensors if name.endswith(last)]
    chosen = chosen if r.random() < 0.5 else [r.choice(chosen)]
    axis, size, dtype = r.randrange(5), r.choice([0, 1, 2, 3, 8, 37, 64, 1024, 4096, 1 << 40, 1 << 62]), None
    if r.random() < 0.3:
        dtype = r.choice(list(DTYPES))
    for name in chosen:
        found = file.tensors[name]
        found[0] = dtype or found[0]
        if dtype is None and axis < len(found[1]):
            found[1] = [*found[1][:axis], size, *found[1][axis + 1 :]]
        elif axis == 4:
            found[1] = r.choice([[], [0], [*found[1], 1], found[1][1:], [0, 1 << 62, 1 << 62, 8]])
        count = math.prod(found[1]) * DTYPES[found[0]]
        if count <= 8 << 20:
            found[2] = r.randbytes(min(count, 64)).ljust(count, b"\x01")


def _rename(file: File, r: random.Random) -> None:
    name = r.choice(list(file.tensors) or [""])
    found = file.tensors.pop(name, ["U8", [0], b""])
    if r.random() < 0.7:
        file.tensors[r.choice([f"{name}x", "layers.0.keys", "layers.0.keys.dense", "layers.1.values", ""])] = found


def _change_header(header: dict[str, Any], r: random.Random) -> None:
    node, key = r.choice(list(_places(header)))
    node[key] = r.choice([_number(r), None, "", [], {}, -1, "F32", [0, _number(r)]])


def allowed(content: bytes) -> int:
    """How much memory loading a file may take, in bytes."""
    return 2 * len(content) + (64 << 20)


def outcome(content: bytes, path: Path) -> tuple[str, int | None]:
    """ "refused" or "loaded", and by how many bytes memory rose at most meanwhile (None where nothing tells).

    Raises:
        Exception: whatever else loading the file, or using what was loaded, raises.
    """
    path.write_bytes(content)
    before = _start_of_peak()
    cache: Any = None
    try:
        cache = load_cache(path)
    except CacheFileError as error:
        assert str(error).startswith(str(path))
    peak = None if before is None else _memory("VmHWM") - before
    if cache is None:
        return "refused", peak
    _use(cache)
    return "loaded", peak


def _start_of_peak() -> int | None:
    """Resident bytes now, from which the peak begins anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _memory("VmRSS")
    except OSError:
        return None


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _use(cache: Any) -> None:
    """Read and continue what was loaded."""
    if isinstance(cache, EncoderDecoderCache):
        for half in (cache.self_attention_cache, cache.cross_attention_cache):
            _use(half)
        return
    if isinstance(cache, tuple):
        for tensor in (tensor for layer in cache for tensor in layer if tensor is not None):
            assert (tensor[:, :, :40] if isinstance(tensor, PackedTensor) else tensor).clone().dtype == tensor.dtype
        return
    for layer in cache.layers:
        keys, values = layer.keys, layer.values
        if keys is None or keys.dim() != 4:
            continue
        length = int(layer.get_seq_length())
        new = [torch.zeros(*x.shape[:2], 1, x.shape[3]).to(x.dtype) for x in (keys, values)]
        for tensor in (keys, values):
            part = tensor[:, :, :40].clone() if isinstance(tensor, PackedTensor) else tensor
            part = part.dequantize() if isinstance(part, PackedTensor) else part
            assert part.shape[:2] == tensor.shape[:2] and part.shape[3] == tensor.shape[3]
        if layer.get_max_length() in (-1, None) or length < layer.get_max_length() or layer.is_sliding:
            layer.update(*new)
            assert int(layer.get_seq_length()) == length + 1
