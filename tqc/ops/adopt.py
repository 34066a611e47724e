"""How a dense cache of the caller's becomes a packed one; `update` says what it is afterwards."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tqc.format import PackedFormat
from tqc.ops import planes
from tqc.ops.op import op
from tqc.ops.pack import pack
from tqc.ops.value import PackedValue, Planes
from tqc.ops.write import is_append


@op(consumes=("keys", "values"))
def adopt(
    keys: Tensor,
    values: Tensor,
    positions: Tensor | int,
    count: int,
    attn_mask: Tensor | None,
    k_spec: str,
    v_spec: str,
    counted: bool = False,
    query: Tensor | None = None,
) -> tuple[Planes, Planes]:
    """Pack preallocated dense caches that have just been written, of the same capacity as they have.

    Packed is what lies before the end of the `count` tokens written at `positions`. A target may leave both as they
    are, and must where that would lose something: where the write is no append (see `write`), or where somebody else
    holds the memory.

    Args:
        keys, values: [batch, heads, capacity, head_dim], with the new tokens in them.
        positions, attn_mask, counted: as in `write`.
        count: how many tokens were written.
        k_spec, v_spec: of the formats.
        query: as in `pack`.

    Returns:
        Keys and values, packed.

    Raises:
        ValueError: if the write is no append.
        IndexError: if a position lies outside of the caches.
    """
    start = planes.position(positions, keys.device)
    capacity = keys.shape[2]
    if not is_append(start, count, counted, capacity, capacity, attn_mask):
        raise ValueError("attention sees what lies behind the new tokens, so the caches must stay dense")
    stored = int(start.flatten()[0]) + count
    return pack(keys[:, :, :stored], k_spec, None, capacity, query), pack(values[:, :, :stored], v_spec, None, capacity)


@adopt.register_fake
def _(keys: Tensor, values: Tensor, k_spec: str, v_spec: str, **_: Any) -> tuple[PackedValue, PackedValue]:
    return _packed(keys, k_spec), _packed(values, v_spec)


def _packed(dense: Tensor, spec: str) -> PackedValue:
    batch, heads, capacity, _ = dense.shape
    return PackedValue(PackedFormat.parse(spec), batch, heads, capacity, dense.dtype, dense.device)
