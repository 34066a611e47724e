"""`attend` of the provider and its form for paged storage: checks, strides and launches of `attend_kernel`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.lowering.triton import SHARED_FIELDS, tuning
from tqc.lowering.triton.attend_kernels import attend_kernel
from tqc.lowering.triton.format import TileFormat
from tqc.lowering.triton.merge_kernel import merge_kernel
from tqc.lowering.triton.tables import attend_tables

# Arguments of `attend_kernel` that one kind of storage alone has, as they are without it.
_NO_STORAGE: dict[str, Any] = {
    **dict.fromkeys(("k_num_pages", "v_num_pages", "k_state", "v_state", "start", "table", "lengths", "padding")),
    "table_step": 0,
    "BLOCK_PAGES": 1,
}


def attend(
    query: Tensor,
    k_pages: Tensor,
    k_dense: Tensor,
    k_state: Tensor,
    v_pages: Tensor,
    v_dense: Tensor,
    v_state: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    start: Tensor | None,
    scale: float,
    softcap: float,
    is_causal: bool,
    k_spec: str,
    v_spec: str,
    tables: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `tqc.ops.attend`, but keys and values that hold different tokens give NaNs: to raise is to wait.

    Args:
        tables: those of `attend_tables`, given where torch shall see the launch (see `traced_ops`); as below.
    """
    storage = {
        **_NO_STORAGE,
        **_pages("k", k_pages, *k_pages.stride()[:3]),
        **_pages("v", v_pages, *v_pages.stride()[:3]),
        **_dense("k", k_dense),
        **_dense("v", v_dense),
        "k_state": k_state,
        "v_state": v_state,
        "start": start if start is None else start.to(query.device, non_blocking=True),
    }
    if PackedFormat.parse(k_spec).keep is not None:
        storage |= {"k_num_pages": k_pages.shape[2], "v_num_pages": v_pages.shape[2]}
    capacity = k_pages.shape[2] * PAGE_TOKENS
    return _attend(
        query, storage, capacity, key, value, attn_mask, sinks, scale, softcap, is_causal, k_spec, v_spec, tables
    )


def attend_paged(
    query: Tensor,
    k_pool: Tensor,
    k_dense: Tensor,
    v_pool: Tensor,
    v_dense: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    k_spec: str,
    v_spec: str,
    scale: float,
    block_pages: int = 2,
    padding: Tensor | None = None,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    is_causal: bool = True,
    tables: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a ragged batch over pages that sequences hold in any order, as serving engines keep them.

    Args:
        k_pool, v_pool: uint8 [pages, heads, page_bytes]; `block_pages` consecutive pages are a block.
        k_dense, v_dense: [batch, heads, rows, head_dim]; token t is row t where t < sink_tokens, else row
            sink_tokens + (t - sink_tokens) % residual_window if it is not packed. Behind these rows, a centred format
            has the head's centre and its balance (ones where none is chosen); a plain one has no more rows. `rows` is
            `PackedFormat.dense_rows`, or fewer while no sequence has a packed token.
        page_table: int32 [batch, n]; page p of sequence b is page p % block_pages of block
            `page_table[b, p // block_pages]`. Entries behind the packed tokens are not read.
        lengths: int32 [batch], tokens stored; as many of them are packed as `PackedFormat.packed_tokens` says. None of
            them is dropped: column c is token c.
        padding: int32 [batch], how many of the first tokens are padding that nothing attends to.
        attn_mask: columns of sequence b are its stored tokens, then the new ones, then nothing.
        The rest is as in `tqc.ops.attend`.

    Returns:
        Output and log-sum-exp as `tqc.ops.attend` does.

    Raises:
        ValueError: if shapes do not fit, or if a format drops tokens (`keep`).
    """
    if lengths.shape != (query.shape[0],) or page_table.ndim != 2 or page_table.shape[0] != query.shape[0]:
        raise ValueError(
            f"page_table must be [batch, n] and lengths [batch] for a query of batch {query.shape[0]}; "
            f"got {tuple(page_table.shape)} and {tuple(lengths.shape)}"
        )
    for spec in (k_spec, v_spec):
        if PackedFormat.parse(spec).keep is not None:
            raise ValueError(f"pages of a table hold all tokens, spec must have no keep, got {spec!r}")
    storage = {
        **_NO_STORAGE,
        **_pages("k", k_pool, 0, k_pool.stride(1), k_pool.stride(0)),
        **_pages("v", v_pool, 0, v_pool.stride(1), v_pool.stride(0)),
        **_dense("k", k_dense),
        **_dense("v", v_dense),
        "table": page_table,
        "table_step": page_table.stride(0),
        "lengths": lengths,
        "padding": padding,
        "BLOCK_PAGES": block_pages,
    }
    capacity = page_table.shape[1] * block_pages * PAGE_TOKENS
    return _attend(
        query, storage, capacity, key, value, attn_mask, sinks, scale, softcap, is_causal, k_spec, v_spec, tables
    )


@cache
def _formats(k_spec: str, v_spec: str) -> tuple[TileFormat, TileFormat]:
    k_fmt, v_fmt = PackedFormat.parse(k_spec), PackedFormat.parse(v_spec)
    if any(getattr(k_fmt, name) != getattr(v_fmt, name) for name in SHARED_FIELDS):
        raise ValueError(f"keys and values must have one {', '.join(SHARED_FIELDS)}; got {k_spec} and {v_spec}")
    return TileFormat.of(k_fmt), TileFormat.of(v_fmt)


def _attend(
    query: Tensor,
    storage: dict[str, Any],
    capacity: int,
    key: Tensor | None,
    value: Tensor | None,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    is_causal: bool,
    k_spec: str,
    v_spec: str,
    tables: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """As `attend`; `storage`: arguments of `attend_kernel` for what is stored, in room for `capacity` tokens."""
    k_fmt, v_fmt = _formats(k_spec, v_spec)
    if (key is None) != (value is None):
        raise ValueError(
            f"key and value must both be given or both be None, got only {'key' if value is None else 'value'}"
        )
    batch, q_heads, rows, _ = query.shape
    heads = storage["k_dense"].shape[1]
    if query.dtype != storage["k_dense"].dtype:
        raise TypeError(f"query must be of the stored tokens' dtype {storage['k_dense'].dtype}, got {query.dtype}")
    group, new = q_heads // heads, 0 if key is None else key.shape[2]
    device, dtype, exact = query.device, query.dtype, query.dtype == torch.float32
    query = _last_dense(query)
    key, value = (x if x is None else _last_dense(x) for x in (key, value))
    launch = tuning.choose(tuning.architecture(device), int(rows * group), k_fmt, v_fmt, exact)
    blocks = triton.cdiv(rows * group, launch.rows)
    shares = tuning.shares(launch, device, int(blocks * batch * heads), int(capacity))
    mask, mask_strides, columns = _mask(attn_mask)

    out = torch.empty(batch, rows, q_heads, v_fmt.head_dim, dtype=dtype, device=device)
    lse = torch.empty(batch, q_heads, rows, dtype=torch.float32, device=device)
    parts, part_lse = out, lse
    if shares > 1:
        parts = torch.empty(shares, *out.shape, dtype=torch.float32, device=device)
        part_lse = torch.empty(shares, *lse.shape, dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out.transpose(1, 2), lse
    traced = tables is not None
    k_rotation, v_rotation, k_levels, v_levels = tables or attend_tables(k_spec, v_spec, dtype, device)
    kernel = wrap_triton(attend_kernel) if traced else attend_kernel
    kernel[(blocks, batch * heads, shares)](
        query=query,
        q_batch=query.stride(0),
        q_head_step=query.stride(1),
        q_row=query.stride(2),
        **storage,
        key=key,
        **_strides("key", (0, 0, 0) if key is None else key.stride(), "row"),
        value=value,
        **_strides("value", (0, 0, 0) if value is None else value.stride(), "row"),
        mask=mask,
        mask_batch=mask_strides[0],
        mask_head=mask_strides[1],
        mask_row_step=mask_strides[2],
        mask_step=mask_strides[3],
        sinks=sinks,
        k_rotation=k_rotation,
        v_rotation=v_rotation,
        k_levels=k_levels,
        v_levels=v_levels,
        out=parts,
        lse=part_lse,
        scale=scale,
        softcap=softcap,
        heads=heads,
        group=group,
        rows=rows,
        new=new,
        columns=columns,
        k_spec=k_spec,
        v_spec=v_spec,
        CAUSAL=0 if not is_causal else 2 if rows > new else 1,
        SHARES=shares,
        ROWS=launch.rows,
        TILE=launch.tile,
        DENSE_TILE=launch.dense_tile,
        SAVE_REGISTERS=not traced,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **({} if traced else {"maxnreg": launch.maxnreg}),  # torch knows no such option
    )
    if shares > 1:
        merge = wrap_triton(merge_kernel) if traced else merge_kernel
        merge[(batch * rows * q_heads,)](
            parts,
            part_lse,
            out,
            lse,
            q_heads,
            rows,
            batch,
            v_fmt.head_dim,
            shares,
            triton.next_power_of_2(shares),
            num_warps=4,
        )
    return out.transpose(1, 2), lse


def _pages(side: str, pages: Tensor, batch: int, head: int, page: int) -> dict[str, Any]:
    """Kernel arguments for pages of these strides; the kernel steps from page to page by 16 bytes."""
    return {f"{side}_pages": pages, **_strides(f"{side}_page", (batch, head, page // 16), "step")}


def _dense(side: str, dense: Tensor) -> dict[str, Any]:
    """Kernel arguments for dense rows."""
    dense = dense.contiguous()
    return {f"{side}_dense": dense, f"{side}_dense_head": dense.shape[2] * dense.shape[3]}


def _strides(name: str, strides: Sequence[int], last: str) -> dict[str, int]:
    """Kernel arguments, one by one, as torch wants them."""
    return {f"{name}_batch": strides[0], f"{name}_head": strides[1], f"{name}_{last}": strides[2]}


def _last_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _mask(mask: Tensor | None) -> tuple[Tensor | None, tuple[int, ...], int]:
    """The mask with bytes for bools, its strides as four axes (0 where it is broadcast), and its columns."""
    if mask is None:
        return None, (0, 0, 0, 0), 0
    strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    return mask, (0,) * (4 - mask.ndim) + tuple(strides), mask.shape[-1]
