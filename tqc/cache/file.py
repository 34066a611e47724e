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
from tqc.cache.storage import MIN_ROWS
from tqc.cache.stored import MAX_TOKENS, Stored, from_version_1, loaded
from tqc.config import cacheable_dtype
from tqc.format import PackedFormat
from tqc.format.packed import FORMAT_VERSION
from tqc.torch_private import LAYER_COUNTERS, fill_layer, layer_counters, new_layer

FILE_VERSION = FORMAT_VERSION
VERSIONS = (1, 2)
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
        self.version = FILE_VERSION

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
        if version not in map(str, VERSIONS):
            known = " and ".join(map(str, VERSIONS))
            raise CacheFileError(
                f"is of tqc cache version {version!r}, and this package reads versions {known}: a newer one may read it"
            )
        self.version = int(version)
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
            return _Part(shape, dtype, None, lambda: self.handle.get_tensor(name).to(self.device, copy=True))
        if kind != "packed":
            raise CacheFileError(f"has {name} of unknown kind {kind!r}")
        return self._packed(found, name)

    def _packed(self, found: Any, name: str) -> _Part:
        fmt = _format(_field(found, "spec", str, name), self.version, name)
        length = _count(found, "length", name)
        shape, dtype = self._part(f"{name}.dense")
        if dtype not in DENSE_DTYPES or not cacheable_dtype(DENSE_DTYPES[dtype]):
            raise CacheFileError(f"has {name}.dense of dtype {dtype}")
        if len(shape) != 4 or 0 in shape[:2]:
            raise CacheFileError(f"has {name}.dense of shape {shape}, not [batch, heads, rows, head_dim]")
        batch, heads = shape[:2]
        self._expect(f"{name}.state", [self.version + 1], "I64")
        state = [*self.handle.get_tensor(f"{name}.state").tolist(), 0]
        numbers = Stored(fmt, length, *state[:3])
        if fault := numbers.fault():
            raise CacheFileError(f"says that {name} {fault}")
        rows, pages = numbers.rows, numbers.pages
        if self.version == 1:
            rows = 1 + fmt.token_rows
            # It was first written without the pages that a preallocated cache has room for.
            pages = pages if self._part(f"{name}.pages")[0][2:3] == [pages] else numbers.held_pages
        self._expect(f"{name}.dense", [batch, heads, rows, fmt.head_dim], dtype)
        self._expect(f"{name}.pages", [batch, heads, pages, fmt.block_bytes], "U8")
        page_bytes = batch * heads * fmt.block_bytes
        row_bytes = batch * heads * fmt.head_dim * DENSE_DTYPES[dtype].itemsize
        self.needed += numbers.num_pages * page_bytes + max(MIN_ROWS, numbers.rows) * row_bytes
        self.room += max(0, numbers.num_pages - max(1, pages)) * page_bytes + (0 if rows else MIN_ROWS * row_bytes)

        def read() -> PackedTensor:
            dense = self.handle.get_tensor(f"{name}.dense")
            dense = from_version_1(dense, numbers) if self.version == 1 else dense
            return loaded(numbers, self.handle.get_tensor(f"{name}.pages"), dense, self.device)

        return _Part([batch, heads, length, fmt.head_dim], dtype, numbers, read)

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


class _Part:
    """A tensor of the file that has been checked; `packed` says how many tokens are in a packed one."""

    def __init__(self, shape: list[int], dtype: str, packed: Stored | None, read: Callable[[], Tensor]) -> None:
        self.shape, self.dtype, self.packed, self.read = shape, dtype, packed, read


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
    packed = [part.packed for part in (keys, values) if part.packed is not None]
    stored = [part.stored - part.begin for part in packed]
    if len(set(stored)) > 1 or not _can_have_counted(kind, numbers, length, stored):
        raise CacheFileError(f"has keys for {length} tokens in {name}, {stored} of them stored, and states {numbers}")
    windows = [(part.fmt.keep, part.begin) for part in packed]
    keep = numbers.get("sliding_window", 0) - 1 if kind == "DynamicSlidingWindowLayer" else None
    if len(set(windows)) > 1 or any(window not in (None, keep) for window, _ in windows):
        raise CacheFileError(f"has windows that keep and begin at {windows} in {name}, and states {numbers}")


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


def _format(spec: str, version: int, name: str) -> PackedFormat:
    if (number := spec.split(":")[0]) != f"tq{version}":
        raise CacheFileError(
            f"is of version {version}, and has a spec for {name} that is not: it begins with {number!r}"
        )
    # Version 1 knew no windows; else its specs say the same.
    now = spec if version == FORMAT_VERSION else spec.replace(number, f"tq{FORMAT_VERSION}", 1)
    try:
        fmt = PackedFormat.parse(now)
    except ValueError as error:
        raise CacheFileError(f"has a spec for {name} that cannot be read: {error}") from None
    if str(fmt) != now or (version == 1 and (fmt.keep is not None or fmt.groups is not None)):
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
