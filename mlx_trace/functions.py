"""Functions that MLX has and torch has not, with torch's semantics: what a captured graph calls beside torch's own.

They take and give tensors of any strides; integer results may be of another integer dtype than MLX's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def rope(
    x: Tensor,
    dims: int,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: Tensor | int,
    freqs: Tensor | None = None,
) -> Tensor:
    """Rotary positions, as `mx.fast.rope`.

    Args:
        x: [batch, ..., tokens, head_dim], of which the first `dims` elements are rotated.
        traditional: whether neighbours are a pair, not the two halves.
        base: of the wavelengths; None where `freqs` [dims / 2] gives them.
        offset: position of the first token, one for all or one a batch.
    """
    if freqs is None:
        assert base is not None
        freqs = base ** (torch.arange(0, dims, 2, dtype=torch.float32, device=x.device) / dims)
    offset = torch.as_tensor(offset, device=x.device).reshape(-1, 1)
    positions = (offset + torch.arange(x.shape[-2], device=x.device)).float() * scale
    angles = positions[..., None] / freqs.float()
    angles = angles.reshape(angles.shape[0], *(1,) * (x.dim() - 3), *angles.shape[1:])
    rotated, rest = x[..., :dims].float(), x[..., dims:]
    if traditional:
        a, b = rotated[..., ::2], rotated[..., 1::2]
    else:
        a, b = rotated.chunk(2, -1)
    parts = [a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()]
    joined = torch.stack(parts, -1).flatten(-2) if traditional else torch.cat(parts, -1)
    return torch.cat([joined.to(x.dtype), rest], -1)


def causal_mask(columns: int, first: Tensor | int, length: int, window: int | None = None) -> Tensor:
    """Which of `columns` keys the queries at `first`, `first + 1`, ... see: bool [length, columns], or
    [batch, 1, length, columns] where `first` is one a batch.

    Args:
        window: how many tokens back, the query's own one counted; None for all.
    """
    keys = torch.arange(columns)
    if isinstance(first, Tensor) and first.dim():
        first = first[:, None, None, None]
    queries = first + torch.arange(length)[:, None]
    mask = keys <= queries
    return mask if window is None else mask & (keys > queries - window)


def ring_write(buffer: Tensor, new: Tensor, index: Tensor) -> Tensor:
    """A full cycle's buffer [batch, heads, size, head_dim] with new tokens at `index` in place of old ones."""
    return buffer.index_copy(2, index + torch.arange(new.shape[2]), new)


def window_append(past: Tensor, new: Tensor) -> Tensor:
    """The last tokens of a sliding window and new ones, [batch, heads, past + new, head_dim]."""
    return torch.cat([past, new], 2)


def slice_update(x: Tensor, update: Tensor, index: tuple[slice, ...], reduce: str = "none") -> Tensor:
    """`x` with `update` in a slice, or combined with what is there: "sum", "prod", "max", "min"."""
    made = x.clone()
    held = made[index]
    made[index] = _COMBINE[reduce](held, update.expand(held.shape))
    return made


def dynamic_slice(x: Tensor, start: Tensor, axes: Sequence[int], size: Sequence[int]) -> Tensor:
    """`size` elements of `x` from `start` on, which has one number for each of `axes`."""
    return x[_dynamic(x, start, axes, size)]


def dynamic_slice_update(x: Tensor, update: Tensor, start: Tensor, axes: Sequence[int]) -> Tensor:
    """`x` with `update` from `start` on, which has one number for each of `axes`."""
    return slice_update(x, update, _dynamic(x, start, axes, update.shape))


def _dynamic(x: Tensor, start: Tensor, axes: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    first = dict(zip(axes, start.reshape(-1).tolist(), strict=True))
    return tuple(slice(first.get(axis, 0), first.get(axis, 0) + count) for axis, count in enumerate(size))


def gather(x: Tensor, indices: Sequence[Tensor], axes: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Slices of `x` at indices along `axes`: the shape of the indices, then `sizes` (1 along `axes`)."""
    full: list[Any] = [slice(None)] * x.dim()
    shape = torch.broadcast_shapes(*(index.shape for index in indices))
    rest = [axis for axis in range(x.dim()) if axis not in axes]
    moved = x.permute(*axes, *rest)
    full = [index.long().expand(shape) for index in indices]
    return moved[tuple(full)].reshape(*shape, *sizes)


def scatter(x: Tensor, indices: Sequence[Tensor], updates: Tensor, axes: Sequence[int], reduce: str) -> Tensor:
    """`x` with slices at indices along `axes` replaced by, or combined with, `updates` [indices..., slices...]."""
    rest = [axis for axis in range(x.dim()) if axis not in axes]
    order = [*axes, *rest]
    moved = x.permute(order).clone()
    at = tuple(index.long() for index in indices)
    shape = torch.broadcast_shapes(*(index.shape for index in at))
    updates = updates.reshape(*shape, *(moved.shape[dim] for dim in range(len(axes), x.dim())))
    if reduce in ("max", "min", "prod"):
        raise NotImplementedError(f"scatter with reduce={reduce!r}")
    moved.index_put_(at, updates, accumulate=reduce == "sum")
    return moved.permute([order.index(dim) for dim in range(x.dim())])


def argpartition(x: Tensor, kth: int, dim: int) -> Tensor:
    """Indices of the elements with the `kth` smallest at its place, smaller ones in front of it."""
    return torch.argsort(x, dim)


def partition(x: Tensor, kth: int, dim: int) -> Tensor:
    """The elements with the `kth` smallest at its place, smaller ones in front of it."""
    return torch.sort(x, dim)[0]


def sort(x: Tensor, dim: int) -> Tensor:
    """Elements in rising order."""
    return torch.sort(x, dim)[0]


def scan(x: Tensor, kind: str, dim: int, reverse: bool = False, inclusive: bool = True) -> Tensor:
    """Running "sum", "prod", "max" or "min"; from the end where `reverse`; without the element itself where not
    `inclusive`."""
    x = x.flip(dim) if reverse else x
    made = {"sum": torch.cumsum, "prod": torch.cumprod}[kind](x, dim)
    if not inclusive:
        made = made - x if kind == "sum" else made / x
    return made.flip(dim) if reverse else made


def convolution(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[Sequence[int]],
    dilation: Sequence[int],
    input_dilation: Sequence[int],
    groups: int,
    flip: bool,
) -> Tensor:
    """`mx.conv_general`: channels last, weight [out, size, in / groups]; padding in front and behind."""
    if len(stride) != 1 or flip or any(size != 1 for size in input_dilation):
        raise NotImplementedError("convolution in more than one dimension, flipped, or with a dilated input")
    padded = torch.nn.functional.pad(x.mT, (padding[0][0], padding[1][0]))
    return torch.nn.functional.conv1d(padded, weight.mT, None, stride[0], 0, dilation[0], groups).mT


def gather_mm(
    x: Tensor,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    left_sorted: bool = False,
    right_sorted: bool = False,
) -> Tensor:
    """Products of matrices that are chosen by index: x[left] @ weight[right], both without their batch dimensions."""
    flat = x.reshape(-1, *x.shape[-2:])[left.long()]
    return flat @ weight.reshape(-1, *weight.shape[-2:])[right.long()]


def quantized_matmul(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    biases: Tensor | None,
    transpose: bool,
    group_size: int,
    bits: int,
    mode: str,
) -> Tensor:
    """`mx.quantized_matmul`: opaque here, weights stay as MLX packs them."""
    raise NotImplementedError("MLX's quantized weights have no meaning in torch")


def gather_qmm(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    biases: Tensor | None,
    left: Tensor,
    right: Tensor,
    transpose: bool,
    group_size: int,
    bits: int,
    mode: str,
    sorted_indices: bool,
) -> Tensor:
    """`mx.gather_qmm`: opaque here, weights stay as MLX packs them."""
    raise NotImplementedError("MLX's quantized weights have no meaning in torch")


_COMBINE: dict[str, Callable[..., Tensor]] = {
    "none": lambda held, new: new,
    "sum": torch.add,
    "prod": torch.mul,
    "max": torch.maximum,
    "min": torch.minimum,
}
