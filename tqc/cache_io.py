"""Measure, save and load caches: `cache_bytes`, `save_cache`, `load_cache`.

A cache file is a safetensors file. Its metadata has `tqc_cache`, the version of this layout, and `cache`, a JSON
object which says what the tensors are:

    {"kind": "DynamicCache", "grows": true, "layers": [
        {"kind": "DynamicLayer",
         "keys": {"kind": "packed", "spec": "tq1:d64:b3:centred:s4:w64:hadamard:0", "length": 100},
         "values": {"kind": "dense"}}]}

A packed tensor `layers.0.keys` is stored as `layers.0.keys.pages` (those in use, no spare ones), `layers.0.keys.dense`
and `layers.0.keys.state` (see `tqc.format`), a dense one under its own name. An `EncoderDecoderCache` holds two caches
with the prefixes `self_attention.` and `cross_attention.`; a plain tuple of layers has kind `tuple`, and each of its
layers is a list of tensors (`layers.0.0`, `layers.0.1`, ...).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tqc.config import cacheable_dtype
from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.packed_tensor import PackedTensor
from tqc.storage import Storage

FILE_VERSION = 1
# A preallocated cache states its capacity; no more tokens than this are believed.
MAX_TOKENS = 1 << 24

# The kinds of layers that are saved, with the numbers that each holds beside its keys and values.
LAYER_KINDS: dict[str, tuple[str, ...]] = {
    "DynamicLayer": (),
    "DynamicSlidingWindowLayer": ("sliding_window", "cumulative_length", "record_past"),
    "StaticLayer": ("max_cache_len", "cumulative_length"),
    "StaticSlidingWindowLayer": ("max_cache_len", "cumulative_length", "cumulative_length_int"),
    "DummyLayer": (),
}
CACHE_KINDS = ("DynamicCache", "StaticCache")
_DENSE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class CacheFileError(ValueError):
    """A file that is no cache, is damaged, or is newer than this package: the message names the file and the fault."""


def cache_bytes(cache: Any) -> int:
    """Bytes of memory that a cache holds: whole storages (spare capacity included), each counted once.

    Args:
        cache: any transformers cache, a module (its buffers), a tensor, or tuples, lists and dicts of such.
    """
    storages: dict[int, int] = {}
    for tensor in _held_tensors(cache):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _held_tensors(held: Any) -> Iterator[Tensor]:
    """The plain tensors in `held`, those inside tensor subclasses included."""
    if isinstance(held, Tensor):
        if hasattr(held, "__tensor_flatten__"):
            for name in held.__tensor_flatten__()[0]:
                yield from _held_tensors(getattr(held, name))
        else:
            yield held
    elif isinstance(held, torch.nn.Module):
        yield from held.buffers()
    elif isinstance(held, Mapping):
        for item in held.values():
            yield from _held_tensors(item)
    elif isinstance(held, (list, tuple)):
        for item in held:
            yield from _held_tensors(item)
    elif any(hasattr(held, name) for name in ("layers", "keys", "self_attention_cache", "conv_states")):
        yield from _held_tensors(vars(held))


def save_cache(cache: Any, path: str | os.PathLike[str]) -> None:
    """Write a cache to one file; packed tensors stay packed. An existing file is replaced when all is written.

    Args:
        cache: a DynamicCache, a StaticCache, an EncoderDecoderCache of such, or a tuple of layers, each a tuple of
            tensors.

    Raises:
        TypeError: for another kind of cache, or a layer of a kind that is not in `LAYER_KINDS`; the message names it.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    description = _describe(cache, "", tensors)
    metadata = {"tqc_cache": str(FILE_VERSION), "cache": json.dumps(description)}
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, unfinished, metadata=metadata)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _describe(cache: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the file says about `cache`; its tensors are put into `tensors` under names that begin with `prefix`."""
    kind = _kind(cache)
    if isinstance(cache, (tuple, list)):
        layers = [
            [_describe_tensor(tensor, f"{prefix}layers.{i}.{j}", tensors) for j, tensor in enumerate(layer)]
            for i, layer in enumerate(cache)
        ]
        return {"kind": "tuple", "layers": layers}
    if kind == "EncoderDecoderCache":
        return {
            "kind": kind,
            "self_attention": _describe(cache.self_attention_cache, f"{prefix}self_attention.", tensors),
            "cross_attention": _describe(cache.cross_attention_cache, f"{prefix}cross_attention.", tensors),
        }
    if kind not in CACHE_KINDS:
        raise TypeError(
            f"cannot save a {kind}: only {', '.join(CACHE_KINDS)}, EncoderDecoderCache and tuples are saved"
        )
    described = [_describe_layer(layer, f"{prefix}layers.{i}", tensors) for i, layer in enumerate(cache.layers)]
    return {"kind": kind, "grows": cache.layer_class_to_replicate is not None, "layers": described}


def _describe_layer(layer: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    kind = _kind(layer)
    if kind not in LAYER_KINDS:
        raise TypeError(f"cannot save {name}: it is a {kind}, and only {', '.join(LAYER_KINDS)} are saved")
    numbers = {attribute: int(getattr(layer, attribute)) for attribute in LAYER_KINDS[kind]}
    parts = {part: _describe_tensor(getattr(layer, part), f"{name}.{part}", tensors) for part in ("keys", "values")}
    return {"kind": kind, **numbers, **parts}


def _kind(held: Any) -> str:
    """Name of a class of transformers; any other class with its module, so that a namesake is not mistaken."""
    cls = type(held)
    return cls.__name__ if cls.__module__ == "transformers.cache_utils" else f"{cls.__module__}.{cls.__name__}"


def _describe_tensor(tensor: Tensor | None, name: str, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        raise TypeError(f"cannot save {name}: it is a {type(tensor).__name__}, not a tensor")
    if not isinstance(tensor, PackedTensor):
        if tensor.dtype not in _DENSE_DTYPES.values():
            raise TypeError(f"cannot save {name}: its dtype {tensor.dtype} is not one of a cache")
        tensors[name] = _own(tensor)
        return {"kind": "dense"}
    storage, length = tensor.packed_storage, tensor.shape[2]
    if length < storage.length:
        storage = storage.copy(length)
    tensors[f"{name}.pages"] = _own(storage.pages[:, :, : storage.packed // PAGE_TOKENS])
    tensors[f"{name}.dense"] = _own(storage.dense)
    tensors[f"{name}.state"] = _own(storage.state)
    return {"kind": "packed", "spec": str(storage.fmt), "length": length}


def _own(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU, contiguous, sharing memory with no other (safetensors refuses shared memory)."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def load_cache(path: str | os.PathLike[str], device: torch.device | str | None = None) -> Any:
    """Read a cache that `save_cache` wrote. No code from the file is run, and nothing is allocated before all sizes
    have been checked.

    Args:
        device: where its tensors go; the CPU if None.

    Returns:
        A cache of the kind that was saved.

    Raises:
        CacheFileError: if the file is not such a cache, is damaged or is of a newer version.
        OSError: if it cannot be opened.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            file = _File(handle, torch.device(device or "cpu"))
            build = file.cache(file.description(), "")
            if unknown := sorted(file.names - file.used):
                raise CacheFileError(f"holds a tensor that belongs to nothing: {unknown[0]!r}")
            return build()
    except SafetensorError as error:
        raise CacheFileError(f"{path} is not a tqc cache, or it is truncated: {error}") from None
    except CacheFileError as error:
        raise CacheFileError(f"{path} {error}") from None


class _File:
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
        builders = [self.layer(layer, f"{prefix}layers.{i}") for i, layer in enumerate(layers)]
        return lambda: _new_cache(kind, grows, [build() for build in builders])

    def layer(self, found: Any, name: str) -> Callable[[], Any]:
        kind = _field(found, "kind", str, name)
        if kind not in LAYER_KINDS:
            raise CacheFileError(f"has a layer of unknown kind: {name} is a {kind!r}")
        numbers = {attribute: _count(found, attribute, name) for attribute in LAYER_KINDS[kind]}
        keys, values = (
            self.tensor(found.get("keys"), f"{name}.keys"),
            self.tensor(found.get("values"), f"{name}.values"),
        )
        if (keys is None) != (values is None):
            raise CacheFileError(f"has only one of keys and values for {name}")
        if keys is not None and values is not None:
            _check_layer(kind, numbers, keys, values, name)
        elif kind.startswith("Static") and any(numbers[n] for n in LAYER_KINDS[kind][1:]):
            raise CacheFileError(f"counts tokens in {name}, which has no keys")
        return lambda: _new_layer(kind, numbers, keys and keys.read(), values and values.read(), self.device)

    def tensor(self, found: Any, name: str) -> _Part | None:
        if found is None:
            return None
        kind = _field(found, "kind", str, name)
        if kind == "dense":
            shape, dtype = self._part(name)
            if dtype not in _DENSE_DTYPES:
                raise CacheFileError(f"has {name} of dtype {dtype}, which no cache has")
            return _Part(shape, dtype, None, lambda: self._read(name))
        if kind != "packed":
            raise CacheFileError(f"has {name} of unknown kind {kind!r}")
        return self._packed(found, name)

    def _packed(self, found: Any, name: str) -> _Part:
        fmt = _format(_field(found, "spec", str, name), name)
        length = _count(found, "length", name)
        shape, dtype = self._part(f"{name}.dense")
        if dtype not in _DENSE_DTYPES or not cacheable_dtype(_DENSE_DTYPES[dtype]):
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
            s = Storage.allocate(batch, heads, fmt, _DENSE_DTYPES[dtype], self.device, length)
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
        if length != numbers["max_cache_len"] or numbers["cumulative_length"] > length:
            raise CacheFileError(f"has keys for {length} tokens in {name}, which states {numbers}")
        return
    if any(part.stored not in (None, length) for part in (keys, values)):
        raise CacheFileError(f"has keys for {length} tokens in {name}, but fewer are stored")
    if length > numbers.get("cumulative_length", length) or numbers.get("sliding_window", 1) < 1:
        raise CacheFileError(f"has keys for {length} tokens in {name}, which states {numbers}")


def _new_cache(kind: str, grows: bool, layers: list[Any]) -> Any:
    module = _transformers()
    cache = object.__new__(getattr(module, kind))
    module.Cache.__init__(cache, layers=layers)
    cache.layer_class_to_replicate = module.DynamicLayer if grows else None
    return cache


def _new_layer(kind: str, numbers: dict[str, int], keys: Any, values: Any, device: torch.device) -> Any:
    sizes = {name: numbers[name] for name in ("sliding_window", "max_cache_len") if name in numbers}
    if kind == "StaticSlidingWindowLayer":
        sizes["sliding_window"] = numbers["max_cache_len"]
    layer = getattr(_transformers(), kind)(**sizes)
    for name, number in numbers.items():
        now = getattr(layer, name)
        setattr(layer, name, torch.tensor(number) if isinstance(now, Tensor) else type(now)(number))
    if keys is None:
        return layer
    layer.keys, layer.values = keys, values
    layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    if kind == "DynamicSlidingWindowLayer":
        layer._sliding_window_tensor = layer._sliding_window_tensor.to(device)
    if kind.startswith("Static"):
        layer.batch_size, layer.num_heads = keys.shape[:2]
        layer.k_head_dim, layer.v_head_dim = keys.shape[-1], values.shape[-1]
        layer.cumulative_length = layer.cumulative_length.to(device)
        for tensor in (keys, values, layer.cumulative_length):
            if not isinstance(tensor, PackedTensor):
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
