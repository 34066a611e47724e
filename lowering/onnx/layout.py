"""What becomes of a packed cache in a graph: which tensors it is, their names and shapes.

    past.3.key.plane2    uint8 [batch, heads, pages, 32 * d * 2 / 8]    bit plane of width 2 of the codes
    past.3.key.scales    uint8 [batch, heads, pages, 32]                scale code of each token
    past.3.key.units     float32 [batch, heads, pages, 2]               unit of the scales, and of the page's centre
    past.3.key.centre    uint8 [batch, heads, pages, d / 2]             the page's centre (centred formats)
    past.3.key.sinks     [batch, heads, sink_tokens, d]                 the first tokens
    past.3.key.window    [batch, heads, residual_window, d]             ring of recent tokens
    past.3.key.head      [batch, heads, 2, d]                           the head's centre and balance (centred formats)
    past.state           int64 [3]                                      tokens that came, of which packed, first held

These are the bytes of `pages` and `dense` of docs/format.md, cut at their offsets; `state` is one for all caches of
one window. `present.` names what each becomes, of the same shape: the capacity is fixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tqc.format import PAGE_TOKENS, PackedFormat


@dataclass(frozen=True)
class Part:
    """One of a cache's tensors.

    Attributes:
        shape: [heads, rows, numbers of a row]; the batch comes before.
        dtype: numpy's name; None for the model's own.
        paged: whether rows are pages.
    """

    name: str
    shape: tuple[int, int, int]
    dtype: str | None
    paged: bool


def parts_of(fmt: PackedFormat, heads: int, capacity: int) -> list[Part]:
    """The tensors of a cache for `capacity` tokens."""
    d, pages = fmt.head_dim, max(1, fmt.pages_for(capacity))
    parts = [
        Part(f"plane{width}", (heads, pages, PAGE_TOKENS * d * width // 8), "uint8", True) for width, _, _ in fmt.planes
    ]
    parts.append(Part("scales", (heads, pages, PAGE_TOKENS), "uint8", True))
    parts.append(Part("units", (heads, pages, 2 if fmt.centred else 1), "float32", True))
    if fmt.centred:
        parts.append(Part("centre", (heads, pages, d // 2), "uint8", True))
    parts.append(Part("sinks", (heads, fmt.sink_tokens, d), None, False))
    parts.append(Part("window", (heads, fmt.residual_window, d), None, False))
    if fmt.centred:
        parts.append(Part("head", (heads, 2, d), None, False))
    return parts


def paged_names(fmt: PackedFormat) -> list[str]:
    return [part.name for part in parts_of(fmt, 1, 1) if part.paged]


def part_names(fmt: PackedFormat) -> list[str]:
    return [part.name for part in parts_of(fmt, 1, 1)]


def to_planes(parts: Mapping[str, np.ndarray], fmt: PackedFormat) -> tuple[np.ndarray, np.ndarray]:
    """`pages` and `dense` of docs/format.md, from a cache's tensors.

    Returns:
        (uint8 [batch, heads, pages, page_bytes], [batch, heads, dense_rows, d])
    """
    planes = {name: parts[name] for name in paged_names(fmt)}
    shape = planes["scales"].shape[:3]
    pages = np.zeros((*shape, fmt.page_bytes), np.uint8)
    units = np.ascontiguousarray(planes.pop("units")).astype("<f4", copy=False)
    pages[..., : 4 * units.shape[-1]] = units.view(np.uint8).reshape(*shape, -1)
    for name, held in planes.items():
        at = _offset(fmt, name)
        pages[..., at : at + held.shape[-1]] = held
    dense = [parts[name] for name in ("sinks", "window", "head") if name in parts]
    return pages, np.concatenate(dense, axis=2)


def from_planes(pages: np.ndarray, dense: np.ndarray, fmt: PackedFormat, capacity: int) -> dict[str, np.ndarray]:
    """Inverse of `to_planes`, with room for `capacity` tokens; `pages` and `dense` may have fewer rows."""
    batch, heads = dense.shape[:2]
    made = {}
    for part in parts_of(fmt, heads, capacity):
        held = np.zeros((batch, *part.shape), part.dtype or dense.dtype)
        if part.paged:
            at = 0 if part.name == "units" else _offset(fmt, part.name)
            width = held.shape[-1] * held.itemsize
            found = np.ascontiguousarray(pages[..., at : at + width])
            found = found.view("<f4") if part.name == "units" else found
            held[:, :, : found.shape[2]] = found
        else:
            at = {"sinks": 0, "window": fmt.sink_tokens, "head": fmt.token_rows}[part.name]
            found = dense[:, :, at : at + held.shape[2]]
            if part.name == "head" and not found.shape[2]:
                held[:, :, 1] = 1
            held[:, :, : found.shape[2]] = found
        made[part.name] = held
    return made


def _offset(fmt: PackedFormat, name: str) -> int:
    offsets = {f"plane{width}": offset for width, _, offset in fmt.planes}
    return {**offsets, "scales": fmt.scales_offset, "centre": fmt.centre_offset}[name]
