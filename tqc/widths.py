"""Widths of the codes of each layer's keys and values, found by `tqc calibrate`, and the file that holds them.

The file is safetensors. Its metadata names the version in `tqc_widths`, and what the widths were found with. L layers
have a packed cache, with at most H heads; W widths were tried:

    keys, values                int8 [L, H]         width of each head; 0 behind a layer's last head
    shapes                      int32 [L, 4]        number of the layer, heads, head_dim of keys, of values
    tried                       int8 [W]            the widths that were tried, ascending
    key_errors, value_errors    float32 [L, H, W]   mean KL of predictions, in nats, that packing this head's keys or
                                                    values alone is expected to cause at each width
"""

from __future__ import annotations

import hashlib
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

WIDTHS_VERSION = 1
MAX_FILE_BYTES = 1 << 26
MAX_WIDTH = 8
# Of the file's dtypes and ranks; `load` checks them before it reads.
_PARTS = {
    "keys": ("I8", 2),
    "values": ("I8", 2),
    "shapes": ("I32", 2),
    "tried": ("I8", 1),
    "key_errors": ("F32", 3),
    "value_errors": ("F32", 3),
}


class WidthsFileError(ValueError):
    """A file that holds no widths, is damaged, or is newer than this package: the message names the file and why."""


class OtherModelError(ValueError):
    """Widths that were found with another model than they are used with."""


@dataclass(frozen=True, eq=False)
class Widths:
    """Widths by layer and head, and what they were chosen by. Equal if all tensors are, wherever they were read from.

    Attributes:
        keys, values, shapes, tried, key_errors, value_errors: see the file.
        about: what they were found with, as text: `model`, `architecture`, `layers` (of the model, with and without a
            cache), `budget_bits`, `text_sha256`, `tokens`, `tqc`.
    """

    keys: Tensor
    values: Tensor
    shapes: Tensor
    tried: Tensor
    key_errors: Tensor
    value_errors: Tensor
    about: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all tensors."""
        found = hashlib.sha256()
        for name in _PARTS:
            tensor = getattr(self, name).contiguous()
            found.update(f"{name} {list(tensor.shape)} ".encode() + tensor.numpy().tobytes())
        return found.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Widths) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Widths({self.digest[:12]}, {len(self.shapes)} layers, {self.bits:.4g} bits)"

    @cached_property
    def bits(self) -> float:
        """Code bits of an element: the mean over all keys and values, so (K + V) / 2 where layers are alike. Scales,
        centres and dense tokens come on top."""
        return float((self._widths() * self._sizes()).sum() / (self._sizes() * self._heads()).sum())

    def of_layer(self, layer: int | None, heads: int, k_head_dim: int, v_head_dim: int) -> tuple[int, int]:
        """Widths of the keys and values of a layer.

        Raises:
            OtherModelError: if they are not of this model: there is no such layer, or it has other heads.
            ValueError: if its heads differ in width.
        """
        numbers = self.shapes[:, 0].tolist()
        if layer not in numbers:
            raise OtherModelError(
                f"widths are of another model: layer {layer} has a cache, and widths are given for {_ranges(numbers)}"
            )
        at = numbers.index(layer)
        here, there = (heads, k_head_dim, v_head_dim), tuple(self.shapes[at, 1:].tolist())
        if here != there:
            raise OtherModelError(
                f"widths are of another model: layer {layer} has {here[0]} heads with head_dims of {here[1]} and "
                f"{here[2]}, and widths are given for {there[0]} with {there[1]} and {there[2]}"
            )
        return self.of_rows()[at]

    def of_rows(self) -> list[tuple[int, int]]:
        """Widths of keys and values, by layer.

        Raises:
            ValueError: if the heads of a layer differ.
        """
        rows = []
        for number, heads, keys, values in zip(
            self.shapes[:, 0].tolist(),
            self.shapes[:, 1].tolist(),
            self.keys.tolist(),
            self.values.tolist(),
            strict=True,
        ):
            if len(set(keys[:heads])) > 1 or len(set(values[:heads])) > 1:
                raise ValueError(f"widths per head are not supported yet: those of layer {number} differ")
            rows.append((keys[0], values[0]))
        return rows

    def check_model(self, layers: int) -> None:
        """Raises OtherModelError if they were found with a model of another number of layers, cached or not."""
        found = self.about.get("layers", "")
        if found.isdigit() and int(found) != layers:
            raise OtherModelError(f"widths are of another model: it has {found} layers, and this one {layers}")

    def solved(self, budget_bits: float) -> Widths:
        """Other widths from the same errors: one for all heads of a layer, of least expected error within the budget.

        Args:
            budget_bits: as `bits` counts them.

        Raises:
            ValueError: if the budget is below the least width that was tried.
        """
        sizes = self._sizes()[:, 0] * self._heads()[:, 0]
        errors = torch.stack([self.key_errors, self.value_errors]).sum(2)
        choice = least_error(
            errors.flatten(0, 1).tolist(), sizes.T.flatten().tolist(), self.tried.tolist(), budget_bits
        )
        chosen = torch.tensor(choice, dtype=torch.int8).view(2, -1, 1)
        there = torch.arange(self.keys.shape[1]) < self.shapes[:, 1:2]
        about = {**self.about, "budget_bits": f"{budget_bits:g}"}
        return replace(self, keys=chosen[0] * there, values=chosen[1] * there, about=about)

    def expected_error(self) -> float:
        """Sum of the errors at the chosen widths, nats: the mean KL if errors added up."""
        total = 0.0
        for widths, errors in ((self.keys, self.key_errors), (self.values, self.value_errors)):
            at = torch.searchsorted(self.tried, widths).clamp_max(len(self.tried) - 1)
            total += float((errors.gather(2, at.unsqueeze(2))[..., 0] * (widths > 0)).sum())
        return total

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; an existing one is replaced when all is written. Raises OSError if it cannot be."""
        from safetensors.torch import save

        tensors = {name: getattr(self, name).contiguous() for name in _PARTS}
        written = save(tensors, metadata={**self.about, "tqc_widths": str(WIDTHS_VERSION)})
        target = Path(os.path.realpath(path))
        unfinished = target.with_name(f".tqc-{uuid.uuid4().hex}")
        try:
            unfinished.write_bytes(written)
            unfinished.replace(target)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Widths:
        """Read a file that `save` wrote. No code from it is run, and sizes are checked before anything is allocated.

        Raises:
            WidthsFileError: if it is not such a file, is damaged or of another version.
            OSError: if it cannot be opened.
        """
        from safetensors import SafetensorError, safe_open

        with open(path, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise WidthsFileError(f"{path} holds no widths: it has {size} bytes, more than {MAX_FILE_BYTES}")
        try:
            with safe_open(path, framework="pt") as handle:
                return _read(handle)
        except SafetensorError as error:
            raise WidthsFileError(f"{path} holds no widths, or it is truncated: {error}") from None
        except WidthsFileError as error:
            raise WidthsFileError(f"{path} {error}") from None

    def _heads(self) -> Tensor:
        """Heads of keys and of values, [L, 1, 2]."""
        return self.shapes[:, None, 1:2].expand(-1, -1, 2).double()

    def _sizes(self) -> Tensor:
        """Elements of one token in a head of keys and of values, [L, 1, 2]."""
        return self.shapes[:, None, 2:].double()

    def _widths(self) -> Tensor:
        return torch.stack([self.keys, self.values], dim=-1).double()


def least_error(errors: list[list[float]], sizes: list[float], widths: list[int], budget_bits: float) -> list[int]:
    """A width for each item, such that the sum of their errors is least within a budget: dynamic programming over bits.

    Args:
        errors: of each item at each width.
        sizes: elements of each item.
        widths: ascending.
        budget_bits: most bits of an element, on average.

    Raises:
        ValueError: if the budget is less than the first width.
    """
    if not budget_bits >= widths[0]:
        raise ValueError(f"budget_bits must be at least {widths[0]}, the least width that was tried; got {budget_bits}")
    unit = math.gcd(*(int(size) for size in sizes))
    counts = [int(size) // unit for size in sizes]
    extra = [width - widths[0] for width in widths]
    # No more room than all items can use.
    spare = math.floor(min(budget_bits - widths[0], extra[-1]) * sum(counts) + 1e-9)
    least, choices = np.zeros(spare + 1), []
    for item, count in zip(errors, counts, strict=True):
        options = np.full((len(widths), spare + 1), np.inf)
        for row, (error, bits) in enumerate(zip(item, extra, strict=True)):
            cost = bits * count
            if cost <= spare:
                options[row, cost:] = least[: spare + 1 - cost] + error
        choices.append(options.argmin(0).astype(np.int8))
        least = options.min(0)
    chosen, room = [], spare
    for choice, count in zip(reversed(choices), reversed(counts), strict=True):
        row = int(choice[room])
        chosen.append(widths[row])
        room -= extra[row] * count
    return chosen[::-1]


def _read(handle: Any) -> Widths:
    about = dict(handle.metadata() or {})
    version = about.pop("tqc_widths", None)
    if version is None:
        raise WidthsFileError("holds no widths: its metadata has no field 'tqc_widths'")
    if version != str(WIDTHS_VERSION):
        raise WidthsFileError(f"is of version {version!r} of widths, and this package reads version {WIDTHS_VERSION}")
    if (names := set(handle.keys())) != set(_PARTS):
        raise WidthsFileError(f"must hold {', '.join(_PARTS)}; it holds {', '.join(sorted(names)) or 'nothing'}")
    shapes = {}
    for name, (dtype, rank) in _PARTS.items():
        part = handle.get_slice(name)
        shapes[name] = part.get_shape()
        if part.get_dtype() != dtype or len(shapes[name]) != rank or 0 in shapes[name]:
            raise WidthsFileError(f"has {name} of shape {shapes[name]} and dtype {part.get_dtype()}")
    layers, heads = shapes["keys"]
    tried = shapes["tried"]
    expected = {"keys": [layers, heads], "values": [layers, heads], "shapes": [layers, 4], "tried": tried}
    expected |= {name: [layers, heads, *tried] for name in ("key_errors", "value_errors")}
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise WidthsFileError(f"has {name} of shape {shapes[name]}, not {shape}")
    # Copies: the tensors that safetensors hands out are the mapped file.
    widths = Widths(**{name: handle.get_tensor(name).clone() for name in _PARTS}, about=about)
    _check(widths)
    return widths


def _check(widths: Widths) -> None:
    tried, numbers, counts = widths.tried.tolist(), widths.shapes[:, 0].tolist(), widths.shapes[:, 1]
    if tried != sorted(set(tried)) or not 1 <= tried[0] <= tried[-1] <= MAX_WIDTH:
        raise WidthsFileError(
            f"says that the widths {tried} were tried; they must ascend from 1 to {MAX_WIDTH} at most"
        )
    if numbers != sorted(set(numbers)) or numbers[0] < 0:
        raise WidthsFileError(f"numbers its layers {numbers}: they must ascend from 0 or more")
    if not bool(((counts >= 1) & (counts <= widths.keys.shape[1])).all()) or bool((widths.shapes[:, 2:] < 1).any()):
        raise WidthsFileError("has a layer whose heads or head_dims cannot be")
    there = torch.arange(widths.keys.shape[1]) < counts[:, None]
    for name in ("keys", "values"):
        held = getattr(widths, name)
        if not bool((torch.where(there, torch.isin(held, widths.tried), held == 0)).all()):
            raise WidthsFileError(f"has {name} of a width that is none of {tried}")
    for name in ("key_errors", "value_errors"):
        errors = getattr(widths, name)
        if not bool((errors.isfinite() & (errors >= 0)).all()):
            raise WidthsFileError(f"has {name} that are negative or not finite")


def _ranges(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"layers {numbers[0]} to {numbers[-1]}"
    return f"layers {', '.join(map(str, numbers))}"
