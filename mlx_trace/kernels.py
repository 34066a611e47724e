"""Who reads and writes packed pages: the generated kernels where MLX's default device is a GPU, else ops of MLX.

The rule looks at the device when it is asked, so `mx.set_default_device(mx.cpu)` is the way back to the ops.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from tqc.format import PackedFormat
from tqc.lowering.metal import launch
from tqc.mlx_trace import codec

REFERENCE = "reference"
# Query rows of a key head up to which a kernel attends. It decodes a page anew for every few rows; for more of them,
# as prompts have, products of whole tiles are the better way.
MOST_ROWS = 64


def provider() -> str:
    """What runs packed caches: "metal" or "cuda", or "reference", which is ops of MLX."""
    if mx.default_device().type == mx.gpu:
        return "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else REFERENCE
    return REFERENCE


def attends(query: mx.array, heads: int) -> bool:
    """Whether a kernel takes these queries, [batch, query_heads, n, head_dim], to `heads` key heads."""
    return provider() != REFERENCE and query.shape[1] // heads * query.shape[2] <= MOST_ROWS


def attend(
    query: mx.array,
    keys: Any,
    values: Any,
    key: mx.array,
    value: mx.array,
    sinks: mx.array | None,
    scale: float,
    softcap: float,
    window: int | None,
) -> mx.array:
    """`tqc.mlx_trace.attention.attend` by kernels."""
    numbers, dtype = keys.step.numbers, keys.dense.dtype
    stored = [array for part in (keys, values) for array in (part.pages, part.dense, numbers)]
    new = [part.astype(dtype) for part in (key, value)]
    sinks = None if sinks is None else sinks.astype(mx.float32)
    how: dict[str, Any] = {"window": window, "padding": numbers[:, 4]}
    specs = str(keys.fmt), str(values.fmt)
    rest = (None, sinks, None, scale, softcap, True, *specs)
    return launch.attend(query.astype(dtype), *stored, *new, *rest, **how)[0].astype(query.dtype)


def encode_pages(x: mx.array, head: mx.array, fmt: PackedFormat) -> mx.array:
    """See `codec.encode_pages`."""
    if provider() == REFERENCE:
        return codec.encode_pages(x, head, fmt)
    return launch.pack(x, head if fmt.centred else None, str(fmt))


def head_rows(first_page: mx.array, balance: mx.array, fmt: PackedFormat) -> mx.array:
    """See `codec.head_rows`."""
    if provider() == REFERENCE:
        return codec.head_rows(first_page, balance, fmt)
    balance = balance.astype(first_page.dtype)
    return launch.head_rows(first_page, mx.concatenate([balance, balance], axis=2), str(fmt))


def read(pages: mx.array, dense: mx.array, numbers: tuple[int, int, int], fmt: PackedFormat) -> mx.array | None:
    """The tokens that are held, decoded: [batch, heads, held, head_dim]; None where no kernel does it.

    Args:
        numbers: how many tokens came, how many of them are packed, the first that is held.
    """
    length, _, begin = numbers
    if provider() == REFERENCE or length == begin:
        return None
    return launch.read(pages, dense, mx.array(numbers, mx.int32), 0, length - begin, str(fmt))
