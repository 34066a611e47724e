"""Reads the file of a cache: every part is checked before anything is built (layout: `tqc.cache.io`)."""

from __future__ import annotations

import json
from collections.abc import Callable
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
    """An open file. `cache`, `layer` and `tensor` check a part of it and return the function that reads that part."""

    def __init__(self, handle: Any, device: torch.device) -> None:
        self.handle, self.device = handle, device
        self.names = set(handle.keys())
        self.used: set[str] = set()

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
        elif kind.startswith("Static") and any(numbers[n] for n in numbers if n != "max_cache_len"):
            raise CacheFileError(f"counts tokens in {name}, which has no keys")
        return lambda: _new_layer(kind, numbers, keys and keys.read(), values and values.read())

    def tensor(self, found: Any, name: str) -> _Part | None:
        if found is None:
            return None
        kind = _field(found, "kind", str, name)
        if kind == "dense":
            shape, dtype = self._part(name)
            if dtype not in DENSE_DTYPES:
                raise CacheFileError(f"has {name} of dtype {dtype}, which no cache has")
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
        self._expect(f"{name}.state", [2], "I64")
        stored, packed = self.handle.get_tensor(f"{name}.state").tolist()
        if not 0 <= stored <= length <= MAX_TOKENS:
            raise CacheFileError(f"says that {name} is {length} tokens long and holds {stored}")
        lowest, highest = fmt.packed_tokens(stored), max(0, stored - fmt.sink_tokens)
        if packed % PAGE_TOKENS or not lowest <= packed <= highest:
            raise CacheFileError(f"says that {packed} of the {stored} tokens of {name} are packed, which cannot be")
        self._expect(f"{name}.pages", [batch, heads, packed // PAGE_TOKENS, fmt.page_bytes], "U8")

        def read() -> PackedTensor:
            s = Storage.allocate(batch, heads, fmt, DENSE_DTYPES[dtype], self.device, length)
            s.pages[:, :, : packed // PAGE_TOKENS] = self.handle.get_tensor(f"{name}.pages").to(self.device)
            s.dense.copy_(self.handle.get_tensor(f"{name}.dense"))
            s.state.copy_(torch.tensor([stored, packed]))
            return PackedTensor(Storage(s.pages, s.dense, s.state, fmt, stored, packed), length)

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
        return  # initialized, nothing stored yet
    if len(keys.shape) != 4:
        raise CacheFileError(f"has keys of shape {keys.shape} in {name}, not [batch, heads, length, head_dim]")
    length = keys.shape[2]
    if kind.startswith("Static"):
        if length != numbers["max_cache_len"] or numbers.get("cumulative_length", 0) > length:
            raise CacheFileError(f"has keys for {length} tokens in {name}, which states {numbers}")
        return
    if any(part.stored not in (None, length) for part in (keys, values)):
        raise CacheFileError(f"has keys for {length} tokens in {name}, but fewer are stored")
    if length > numbers.get("cumulative_length", length) or numbers.get("sliding_window", 1) < 1:
        raise CacheFileError(f"has keys for {length} tokens in {name}, which states {numbers}")


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
