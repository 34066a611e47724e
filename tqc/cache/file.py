"""Reads the file of a cache: every part is checked before anything is built (layout: `tqc.cache.io`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tqc.cache.packed_tensor import PackedTensor
from tqc.cache.storage import Storage
from tqc.config import cacheable_dtype
from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.torch_private import LAYER_COUNTERS, fill_layer, layer_counters, new_layer

FILE_VERSION = 1
# A preallocated cache states its capacity; no more tokens than this are believed.
MAX_TOKENS = 1 << 24
# Bytes that may be allocated for tokens which a file has room for, but does not hold.
MAX_ROOM = 1 << 25
# Names, shapes and the description; enough for 2000 layers. Objects of Python take twenty times what JSON does.
MAX_HEADER_BYTES = 1 << 21

CACHE_KINDS = ("DynamicCache", "StaticCache")
DENSE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class CacheFileError(ValueError):
    """A file that is no cache, is damaged, or is newer than this package: the message names the file and the fault."""


class CacheFile:
    """An open file. `cache`, `layer` and `tensor` check a part of it and return the function that reads that part.

    Attributes:
        needed: bytes that reading the parts that have been checked allocates.
        room: of these, bytes for tokens that the file says there is room for without holding them.
    """

    def __init__(self, handle: Any, device: torch.device) -> None:
        self.handle, self.device = handle, device
        self.names = set(handle.keys())
        self.used: set[str] = set()
        self.needed = self.room = 0

    def check_whole(self) -> None:
        """To be called when all parts have been checked, before the first is read."""
        if unknown := sorted(self.names - self.used):
            raise CacheFileError(f"holds a tensor that belongs to nothing: {unknown[0]!r}")
        if self.room > MAX_ROOM:
            raise CacheFileError(
                f"says that it has room for tokens of {self.room} bytes that it does not hold; {MAX_ROOM} are believed"
            )
        free = _free_memory(self.device)
        if free is not None and self.needed > free:
            raise CacheFileError(f"needs {self.needed} bytes of memory on {self.device}, where {free} are free")

    def description(self) -> Any:
        metadata = self.handle.metadata() or {}
        version = metadata.get("tqc_cache")
        if version is None:
            raise CacheFileError("is not a tqc cache: its metadata has no field 'tqc_cache'")
        if version != str(FILE_VERSION):
            raise CacheFileError(
                f"is of tqc cache version {version!r}, and this package reads version {FILE_VERSION}: a newer one may "
                "read it"
            )
        try:
            return json.loads(metadata.get("cache", ""))
        except (ValueError, RecursionError):
            raise CacheFileError("has malformed metadata: the field 'cache' is not JSON") from None

    def cache(self, found: Any, prefix: str, nested: bool = False) -> Callable[[], Any]:
        kind = _field(found, "kind", str, f"{prefix}cache")
        if kind == "EncoderDecoderCache" and not nested:
            halves = [
                self.cache(_field(found, half, dict, "cache"), f"{half}.", nested=True)
                for half in ("self_attention", "cross_attention")
            ]
            return lambda: _transformers().EncoderDecoderCache(*(half() for half in halves))
        layers = _field(found, "layers", list, f"{prefix}cache")
        if kind == "tuple" and not nested:
            parts = [
                [self.tensor(item, f"{prefix}layers.{i}.{j}") for j, item in enumerate(_list(layer, f"layers.{i}"))]
                for i, layer in enumerate(layers)
            ]
            return lambda: tuple(tuple(None if part is None else part.read() for part in layer) for layer in parts)
        if kind not in CACHE_KINDS:
            raise CacheFileError(f"holds a cache of unknown kind {kind!r}")
        grows = _field(found, "grows", bool, f"{prefix}cache")
        if grows and kind != "DynamicCache":
            raise CacheFileError(f"has malformed metadata: a {kind} does not grow")
        builders = [self.layer(layer, f"{prefix}layers.{i}") for i, layer in enumerate(layers)]
        return lambda: _new_cache(kind, grows, [build() for build in builders])

    def layer(self, found: Any, name: str) -> Callable[[], Any]:
        kind = _field(found, "kind", str, name)
        if kind not in LAYER_COUNTERS:
            raise CacheFileError(f"has a layer of unknown kind: {name} is a {kind!r}")
        try:
            numbers = {attribute: _count(found, attribute, name) for attribute in layer_counters(kind)}
        except AttributeError:
            raise CacheFileError(f"has a layer that this transformers lacks: {name} is a {kind!r}") from None
        keys, values = (
            self.tensor(found.get("keys"), f"{name}.keys"),
            self.tensor(found.get("values"), f"{name}.values"),
        )
        if (keys is None) != (values is None):
            raise CacheFileError(f"has only one of keys and values for {name}")
        if keys is not None and values is not None:
            _check_layer(kind, numbers, keys, values, name)
        elif any(numbers[n] for n in numbers if n.startswith("cumulative_length")):
            raise CacheFileError(f"counts tokens in {name}, which has no keys")
        if numbers.get("max_cache_len", 0) > MAX_TOKENS or numbers.get("sliding_window", 1) < 1:
            raise CacheFileError(f"states {numbers} for {name}, which no cache has")
        return lambda: _new_layer(kind, numbers, keys and keys.read(), values and values.read())

    def tensor(self, found: Any, name: str) -> _Part | None:
        if found is None:
            return None
        kind = _field(found, "kind", str, name)
        if kind == "dense":
            shape, dtype = self._part(name)
            if dtype not in DENSE_DTYPES:
                raise CacheFileError(f"has {name} of dtype {dtype}, which no cache has")
            if math.prod(max(size, 1) for size in shape) >= 2**62:
                raise CacheFileError(f"has {name} of shape {shape}, which no tensor has")
            self.needed += math.prod(shape) * DENSE_DTYPES[dtype].itemsize
            return _Part(shape, dtype, None, lambda: self._read(name))
        if kind != "packed":
            raise CacheFileError(f"has {name} of unknown kind {kind!r}")
        return self._packed(found, name)

    def _packed(self, found: Any, name: str) -> _Part:
        fmt = _format(_field(found, "spec", str, name), name)
        length = _count(found, "length", name)
        shape, dtype = self._part(f"{name}.dense")
        if dtype not in DENSE_DTYPES or not cacheable_dtype(DENSE_DTYPES[dtype]):
            raise CacheFileError(f"has {name}.dense of dtype {dtype}")
        if len(shape) != 4 or 0 in shape:
            raise CacheFileError(f"has {name}.dense of shape {shape}, not [batch, heads, rows, head_dim]")
        batch, heads = shape[:2]
        self._expect(f"{name}.dense", [batch, heads, fmt.dense_rows, fmt.head_dim], dtype)
        self._expect(f"{name}.state", [3], "I64")
        stored, packed, begin = self.handle.get_tensor(f"{name}.state").tolist()
        if not 0 <= stored <= length <= MAX_TOKENS:
            raise CacheFileError(f"says that {name} is {length} tokens long and holds {stored}")
        lowest, highest = fmt.packed_tokens(stored), max(0, stored - fmt.sink_tokens)
        if packed % PAGE_TOKENS or not lowest <= packed <= highest:
            raise CacheFileError(f"says that {packed} of the {stored} tokens of {name} are packed, which cannot be")
        # Version 1 was first written without the pages that a preallocated cache has room for.
        used, full = packed // PAGE_TOKENS, max(packed, fmt.packed_tokens(length)) // PAGE_TOKENS
        held = full if self._part(f"{name}.pages")[0][2:3] == [full] else used
        self._expect(f"{name}.pages", [batch, heads, held, fmt.page_bytes], "U8")
        num_pages = full
        page_bytes = batch * heads * fmt.page_bytes
        self.needed += num_pages * page_bytes + math.prod(shape) * DENSE_DTYPES[dtype].itemsize
        self.room += (num_pages - held) * page_bytes

        def read() -> PackedTensor:
            pages = torch.zeros(batch, heads, num_pages, fmt.page_bytes, dtype=torch.uint8, device=self.device)
            pages[:, :, :used] = self.handle.get_tensor(f"{name}.pages")[:, :, :used].to(self.device)
            state = torch.tensor([stored, packed, begin], device=self.device)
            storage = Storage(pages, self._read(f"{name}.dense"), state, fmt, stored, packed, begin)
            return PackedTensor(storage, length, begin)

        return _Part([batch, heads, length, fmt.head_dim], dtype, stored, read)

    def _part(self, name: str) -> tuple[list[int], str]:
        if name not in self.names:
            raise CacheFileError(f"lacks the tensor {name!r}")
        self.used.add(name)
        stored = self.handle.get_slice(name)
        return stored.get_shape(), stored.get_dtype()

    def _expect(self, name: str, shape: list[int], dtype: str) -> None:
        found = self._part(name)
        if found != (shape, dtype):
            raise CacheFileError(f"has {name} of shape {found[0]} and dtype {found[1]}, not {shape} and {dtype}")

    def _read(self, name: str) -> Tensor:
        # A copy: the tensor that safetensors hands out is the mapped file.
        return self.handle.get_tensor(name).to(self.device, copy=True)


class _Part:
    """A tensor of the file that has been checked; `stored` counts the tokens in a packed one."""

    def __init__(self, shape: list[int], dtype: str, stored: int | None, read: Callable[[], Tensor]) -> None:
        self.shape, self.dtype, self.stored, self.read = shape, dtype, stored, read


def _check_layer(kind: str, numbers: dict[str, int], keys: _Part, values: _Part, name: str) -> None:
    if kind == "DummyLayer":
        raise CacheFileError(f"has keys for {name}, a layer that holds none")
    if keys.dtype != values.dtype or keys.shape[:3] != values.shape[:3] or len(keys.shape) != len(values.shape):
        raise CacheFileError(f"has keys {keys.shape} {keys.dtype} and values {values.shape} {values.dtype} in {name}")
    if keys.shape == values.shape == [0] and kind.startswith("Dynamic"):
        if numbers.get("cumulative_length"):
            raise CacheFileError(f"counts tokens in {name}, which has no keys")
        return  # initialized, nothing stored yet
    if len(keys.shape) != 4:
        raise CacheFileError(f"has keys of shape {keys.shape} in {name}, not [batch, heads, length, head_dim]")
    length = keys.shape[2]
    stored = [part.stored for part in (keys, values) if part.stored is not None]
    if len(set(stored)) > 1 or not _can_have_counted(kind, numbers, length, stored):
        raise CacheFileError(f"has keys for {length} tokens in {name}, {stored} of them stored, and states {numbers}")


def _can_have_counted(kind: str, numbers: dict[str, int], length: int, stored: list[int]) -> bool:
    """Whether a layer with keys for `length` tokens, `stored` of them in its packed parts, can be at these counters."""
    count = numbers.get("cumulative_length", 0)
    if kind.startswith("Static"):
        if length != numbers["max_cache_len"]:
            return False
        if kind == "StaticLayer":
            return count <= min([length, *stored])
        # Once full, it counts on in Python alone; 5.0 counts there from the start.
        total = numbers.get("cumulative_length_int")
        return total is None or (count <= length and (count == total or total > length))
    if any(number != length for number in stored):
        return False
    if kind == "DynamicSlidingWindowLayer":
        window = numbers["sliding_window"]
        kept = min(count, window - 1) if window > 1 else count
        return kept <= length <= (count if numbers.get("record_past") else kept)
    return True


def _new_cache(kind: str, grows: bool, layers: list[Any]) -> Any:
    module = _transformers()
    if grows:
        cache = module.DynamicCache()
        cache.layers = layers
    else:
        cache = object.__new__(getattr(module, kind))
        module.Cache.__init__(cache, layers=layers)
    return cache


def _new_layer(kind: str, numbers: dict[str, int], keys: Any, values: Any) -> Any:
    layer = new_layer(kind, numbers)
    for name, number in numbers.items():
        now = getattr(layer, name)
        setattr(layer, name, torch.tensor(number) if isinstance(now, Tensor) else type(now)(number))
    if keys is None:
        return layer
    fill_layer(layer, keys, values)
    if kind.startswith("Static"):
        for tensor in (keys, values, getattr(layer, "cumulative_length", None)):
            if isinstance(tensor, Tensor) and not isinstance(tensor, PackedTensor):
                torch._dynamo.mark_static_address(tensor)
    return layer


def _transformers() -> Any:
    import transformers.cache_utils

    return transformers.cache_utils


def _field(found: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(found, dict) or type(found.get(name)) is not kind:
        raise CacheFileError(f"has malformed metadata: {where} has no {name!r} that is a {kind.__name__}")
    return found[name]


def _count(found: Any, name: str, where: str) -> int:
    number = _field(found, name, int, where)
    if not 0 <= number < 2**63:
        raise CacheFileError(f"has malformed metadata: {name!r} of {where} is {number}")
    return number


def _list(found: Any, where: str) -> list[Any]:
    if not isinstance(found, list):
        raise CacheFileError(f"has malformed metadata: {where} is not a list")
    return found


def _format(spec: str, name: str) -> PackedFormat:
    try:
        fmt = PackedFormat.parse(spec)
    except ValueError as error:
        raise CacheFileError(f"has a spec for {name} that cannot be read: {error}") from None
    if str(fmt) != spec:
        raise CacheFileError(f"has a malformed spec for {name}: {spec!r}")
    return fmt


def _free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device`; None where nothing tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines() if device.type == "cpu" else []
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
