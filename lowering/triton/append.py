"""`append` of the provider: checks, and launches of `append_kernel`.

A few tokens, as in decoding, take one launch for keys and values together. Many take one launch for each step, so that
all pages are encoded at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.lowering.triton.append_kernels import append_kernel
from tqc.lowering.triton.tables import append_tables, rotation_gain

# Up to so many new tokens a head's pages are encoded one after the other by the program that does the rest.
ONE_LAUNCH_TOKENS = 64
# Programs that share the pages of one head when there are many: at least so many pages each.
PAGES_PER_PROGRAM = 4


def append(
    pages: Tensor,
    dense: Tensor,
    state: Tensor,
    new: Tensor,
    start: Tensor | None,
    spec: str,
    tables: Sequence[Tensor] | None = None,
) -> None:
    """As `tqc.ops.append`.

    Args:
        tables: those of `append_tables`, given where torch shall see the launch (see `traced_ops`); as below.

    Raises:
        ValueError: if shapes or dtypes do not fit each other and `spec`. Whether `pages` and `dense` have room is known
            to the device alone: what does not fit is not written (TRITON_DEBUG=1 makes it an assertion).
    """
    _launch([_checked(pages, dense, state, new, spec)], start, tables)


def append_pair(
    k_pages: Tensor,
    k_dense: Tensor,
    k_state: Tensor,
    key: Tensor,
    v_pages: Tensor,
    v_dense: Tensor,
    v_state: Tensor,
    value: Tensor,
    start: Tensor | None,
    k_spec: str,
    v_spec: str,
    tables: Sequence[Tensor] | None = None,
) -> None:
    """`append` of keys and of values by the same launches.

    Raises:
        ValueError: as `append`, or if keys and values differ in batch, heads or number.
    """
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key and value must hold the same tokens, got shapes {tuple(key.shape)} and {tuple(value.shape)}"
        )
    keys = _checked(k_pages, k_dense, k_state, key, k_spec)
    _launch([keys, _checked(v_pages, v_dense, v_state, value, v_spec)], start, tables)


# Pages, dense rows, state, new tokens, format.
_Part = tuple[Tensor, Tensor, Tensor, Tensor, PackedFormat]


def _checked(pages: Tensor, dense: Tensor, state: Tensor, new: Tensor, spec: str) -> _Part:
    fmt = PackedFormat.parse(spec)
    batch, heads, _, head_dim = new.shape
    if head_dim != fmt.head_dim or pages.shape[3] != fmt.page_bytes:
        raise ValueError(f"spec {spec!r} does not fit new {tuple(new.shape)} and pages {tuple(pages.shape)}")
    rows = min(dense.shape[2], fmt.dense_rows)
    if pages.shape[:2] != (batch, heads) or dense.shape != (batch, heads, rows, head_dim):
        raise ValueError(
            f"new {tuple(new.shape)} does not fit pages {tuple(pages.shape)} and dense {tuple(dense.shape)}"
        )
    if new.dtype != dense.dtype:
        raise ValueError(f"new must have dense's dtype {dense.dtype}, got {new.dtype}")
    if not (pages.is_contiguous() and dense.is_contiguous()):
        raise ValueError("pages and dense must be contiguous")
    return pages, dense, state, new, fmt


# Arguments of `append_kernel` for keys, and for values.
_ARGUMENTS = (
    *("pages", "num_pages", "dense", "dense_head", "state", "new", "batch", "head", "row", "column"),
    *("levels", "boundaries", "search", "matrix", "gain", "spec"),
)
_NAMES = tuple(tuple(f"{side}_{name}" for name in _ARGUMENTS) for side in "kv")


def _launch(parts: list[_Part], start: Tensor | None, tables: Sequence[Tensor] | None) -> None:
    kernel = append_kernel if tables is None else wrap_triton(append_kernel)
    arguments: dict[str, Any] = dict.fromkeys(_NAMES[1])
    for index, (pages, dense, state, new, fmt) in enumerate(parts):
        of_format = append_tables(fmt.spec, new.dtype, new.device) if tables is None else tables[4 * index :][:4]
        stored = (pages, pages.shape[2], dense, dense.shape[2] * fmt.head_dim, state)
        values = (*stored, new, *new.stride(), *of_format, rotation_gain(fmt, new.dtype), fmt.spec)
        arguments.update(zip(_NAMES[index], values, strict=True))
    new = parts[0][3]
    batch, heads, count, _ = new.shape
    # float32 takes twice the registers.
    exact = new.dtype == torch.float32
    warps = min(8, max(4, max(fmt.head_dim for *_, fmt in parts) // (16 if exact else 32)))

    def launch(chunks: int, prepare: bool, encode: bool, store: bool) -> None:
        steps = {"PREPARE": prepare, "ENCODE": encode, "STORE": store}
        grid = (batch * heads, chunks, len(parts))
        kernel[grid](**arguments, start=start, count=count, heads=heads, **steps, num_warps=warps)

    if count <= ONE_LAUNCH_TOKENS:
        launch(1, True, True, True)
    else:
        chunks = triton.cdiv(count, PAGE_TOKENS * PAGES_PER_PROGRAM)
        launch(1, True, False, False)
        launch(chunks, False, True, False)
        launch(1, False, False, True)
