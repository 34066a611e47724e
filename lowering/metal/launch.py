"""The kernels on arrays of MLX: `append`, `read` and `attend` as in `tqc.ops.planes`, which give new arrays back.

`pages` and `dense` are as `tqc.format` has them. `state` is an integer array [3] where a kernel reads it; `append`
takes the numbers themselves, since it decides by them what is packed. Arrays are row-contiguous, or MLX copies them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import mlx.core as mx

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.lowering.metal.attend_source import SIMDGROUPS, attend_kernel, rows_at_once
from tqc.lowering.metal.encode_source import centre_kernel, encode_kernel
from tqc.lowering.metal.language import Kernel
from tqc.lowering.metal.read_source import TOKENS, read_kernel
from tqc.lowering.metal.softmax_source import merge_kernel
from tqc.lowering.metal.tables import table

# A share is at least so many pages a simdgroup; more shares than this are not worth their sums.
PAGES_A_SIMDGROUP = 4
MOST_SHARES = 64

State = tuple[int, int, int]


def available() -> bool:
    """Whether this machine has a device that runs the kernels."""
    return mx.metal.is_available() or mx.cuda.is_available()


@cache
def compiled(kernel: Kernel) -> Callable[..., list[mx.array]]:
    """The kernel as MLX calls it.

    Raises:
        RuntimeError: where neither Metal nor CUDA is there, unless in an export.
    """
    names = {"name": kernel.name, "input_names": kernel.inputs, "output_names": kernel.outputs}
    if mx.cuda.is_available():
        return mx.fast.cuda_kernel(**names, source=kernel.cuda_body, header=kernel.cuda_header)
    return mx.fast.metal_kernel(**names, source=kernel.body, header=kernel.metal_header)


def _run(kernel: Kernel, groups: Sequence[int], shapes: list[Any], dtypes: list[Any], *inputs: mx.array) -> list[Any]:
    """Outputs of a kernel over so many threadgroups."""
    threads = 32 * kernel.simdgroups
    x, y, z = (*groups, 1, 1)[:3]
    return compiled(kernel)(
        inputs=list(inputs),
        grid=(x * threads, y, z),
        threadgroup=(threads, 1, 1),
        output_shapes=shapes,
        output_dtypes=dtypes,
    )


@cache
def _table(spec: str) -> mx.array:
    return mx.array(table(spec))


@cache
def _numbers(*numbers: int) -> mx.array:
    return mx.array(numbers, dtype=mx.int32)


@cache
def _factors(*numbers: float) -> mx.array:
    return mx.array(numbers, dtype=mx.float32)


@cache
def _no_sinks(heads: int) -> mx.array:
    return mx.array([-float("inf")] * heads)


def _name(dtype: mx.Dtype) -> str:
    return {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}[dtype]


def attend(
    query: mx.array,
    k_pages: mx.array,
    k_dense: mx.array,
    k_state: mx.array,
    v_pages: mx.array,
    v_dense: mx.array,
    v_state: mx.array,
    key: mx.array | None,
    value: mx.array | None,
    attn_mask: mx.array | None,
    sinks: mx.array | None,
    start: mx.array | None,
    scale: float,
    softcap: float,
    is_causal: bool,
    k_spec: str,
    v_spec: str,
) -> tuple[mx.array, mx.array]:
    """As `attend` of `tqc.ops.planes`, but keys and values that hold different tokens give NaNs: to raise is to wait.

    Raises:
        ValueError, TypeError: if formats, shapes or dtypes do not fit each other.
    """
    k, v = PackedFormat.parse(k_spec), PackedFormat.parse(v_spec)
    if (k.sink_tokens, k.residual_window, k.keep) != (v.sink_tokens, v.residual_window, v.keep):
        raise ValueError(
            f"keys and values must have one sink_tokens, residual_window and keep, got {k_spec} and {v_spec}"
        )
    if (key is None) != (value is None):
        raise ValueError(
            f"key and value must both be given or both be None, got only {'key' if value is None else 'value'}"
        )
    if not query.dtype == k_dense.dtype == v_dense.dtype:
        raise TypeError(f"query must be of the stored tokens' dtype {k_dense.dtype}, got {query.dtype}")
    batch, q_heads, rows, _ = query.shape
    heads = k_dense.shape[1]
    new = 0 if key is None else key.shape[2]
    if new == 0:
        key, value = query, query  # which nothing reads
    k_pages, k_dense = _some(k_pages), _some(k_dense)
    v_pages, v_dense = _some(v_pages), _some(v_dense)
    at_once = rows_at_once(rows * q_heads // heads, max(k.head_dim, v.head_dim))
    blocks = -(-rows * q_heads // heads // at_once)
    pages = min(k_pages.shape[2], v_pages.shape[2])
    shares = max(1, min(MOST_SHARES, -(-pages // (SIMDGROUPS * PAGES_A_SIMDGROUP))))
    kind, masks = "none", []
    if attn_mask is not None:
        kind = "bool" if attn_mask.dtype == mx.bool_ else "added"
        masks = [attn_mask.reshape((1,) * (4 - attn_mask.ndim) + tuple(attn_mask.shape))]
    kernel = attend_kernel(k, v, _name(query.dtype), at_once, kind, shares > 1)
    shape = (batch, rows, q_heads, v.head_dim)
    logs = (batch, q_heads, rows)
    inputs = [query, k_pages, k_dense, k_state, v_pages, v_dense, v_state, k_state if start is None else start]
    inputs += [key, value, *masks, _no_sinks(q_heads) if sinks is None else sinks, _table(k_spec), _table(v_spec)]
    inputs += [_factors(scale, softcap), _numbers(new, int(is_causal), int(start is not None))]
    grid = (blocks, batch * heads, shares)
    if shares == 1:
        out, lse = _run(kernel, grid, [shape, logs], [query.dtype, mx.float32], *inputs)
    else:
        split = [(shares, *shape), (shares, *logs)]
        parts = _run(kernel, grid, split, [mx.float32, mx.float32], *inputs)
        merge = merge_kernel(v.head_dim, _name(query.dtype))
        out, lse = _run(merge, [batch * rows * q_heads], [shape, logs], [query.dtype, mx.float32], *parts)
    return out.transpose(0, 2, 1, 3), lse


def _some(x: mx.array) -> mx.array:
    """`x`, or a place for what is not there: kernels read nothing of it, but an array must have elements."""
    return x if x.shape[2] else mx.zeros((*x.shape[:2], 1, x.shape[3]), dtype=x.dtype)


def read(pages: mx.array, dense: mx.array, state: mx.array, first: int, count: int, spec: str) -> mx.array:
    """Tokens `first` to `first` + `count` of those that are held, [batch, heads, count, head_dim] in dense's dtype;
    zeros behind the last one. So a prefill reads the history by tiles."""
    fmt = PackedFormat.parse(spec)
    batch, heads, _, head_dim = dense.shape
    inputs = (_some(pages), _some(dense), state, _table(spec), _numbers(first, count))
    grid = (-(-count // TOKENS), batch * heads)
    kernel = read_kernel(fmt, _name(dense.dtype))
    return _run(kernel, grid, [(batch, heads, count, head_dim)], [dense.dtype], *inputs)[0]


def pack(tokens: mx.array, head: mx.array | None, spec: str) -> mx.array:
    """Pages of whole pages of tokens.

    Args:
        tokens: [batch, heads, n * 32, head_dim].
        head: the rows with centre and balance of `dense`, [batch, heads, 2, head_dim]; None in plain formats.

    Returns:
        uint8 [batch, heads, n, page_bytes].
    """
    fmt = PackedFormat.parse(spec)
    batch, heads, count, _ = tokens.shape
    if count % PAGE_TOKENS or not count:
        raise ValueError(f"tokens must be whole pages of {PAGE_TOKENS}, got {count}")
    heads_given = () if head is None else (head,)
    grid = (count // PAGE_TOKENS, batch * heads)
    shape = (batch, heads, count // PAGE_TOKENS, fmt.page_bytes)
    kernel = encode_kernel(fmt, _name(tokens.dtype))
    return _run(kernel, grid, [shape], [mx.uint8], tokens, *heads_given, _table(spec))[0]


def head_rows(first_page: mx.array, head: mx.array, spec: str) -> mx.array:
    """`head` [batch, heads, 2, head_dim] with the centre that the first page, [batch, heads, 32, head_dim], gives; of
    `head` the balance is read."""
    fmt = PackedFormat.parse(spec)
    batch, heads, _, head_dim = first_page.shape
    kernel = centre_kernel(fmt, _name(first_page.dtype))
    shape, dtype = (batch, heads, 1, head_dim), first_page.dtype
    centre = _run(kernel, (1, batch * heads), [shape], [dtype], first_page, head, _table(spec))[0]
    return mx.concatenate([centre, head[:, :, 1:]], axis=2)


def append(
    pages: mx.array, dense: mx.array, state: State, new: mx.array, spec: str
) -> tuple[mx.array, mx.array, State]:
    """`pages`, `dense` and `state` with tokens behind the stored ones; those that leave the recent window are packed.

    Args:
        pages: uint8 [batch, heads, num_pages, page_bytes], with room for every token that will be packed.
        dense: [batch, heads, rows, head_dim], `PackedFormat.dense_rows` of them, or fewer where nothing will be packed.
        state: how many tokens came, how many of them are packed, the first that is held.
        new: [batch, heads, n, head_dim], in dense's dtype; rotated if the format is folded.

    Raises:
        ValueError: if `pages` or `dense` has no room.
    """
    fmt = PackedFormat.parse(spec)
    length, packed, begin = state
    count = new.shape[2]
    end = length + count
    packed_after, begin = fmt.packed_tokens(end, packed), fmt.first_held(end, begin)
    page, last = min(max(packed, begin - fmt.sink_tokens), packed_after) // PAGE_TOKENS, packed_after // PAGE_TOKENS
    needed = last - page if fmt.keep is not None else last
    if dense.shape[2] < fmt.rows_for(end) or pages.shape[2] < needed:
        raise ValueError(
            f"{end} tokens need {fmt.rows_for(end)} rows of dense and {needed} pages; "
            f"got {dense.shape[2]} and {pages.shape[2]}"
        )
    taken = max(0, min(fmt.sink_tokens - length, count))
    dense = _put(dense, new[:, :, :taken], length)
    # Packed indices of the new tokens: from `first` on. Those below `first` and not yet packed are in the ring.
    first, rest = length + taken - fmt.sink_tokens, new[:, :, taken:]
    if packed_after > packed:
        old = _ring(dense, packed, min(first, packed_after), fmt)
        run = mx.concatenate([*old, rest[:, :, : max(0, packed_after - first)]], axis=2)
        if packed == 0 and fmt.centred:
            head = head_rows(run[:, :, :PAGE_TOKENS], dense[:, :, fmt.token_rows : fmt.dense_rows], spec)
            dense = _put(dense, head, fmt.token_rows)
        if last > page:
            head = dense[:, :, fmt.token_rows : fmt.dense_rows] if fmt.centred else None
            pages = _put_round(pages, pack(run[:, :, page * PAGE_TOKENS - packed :], head, spec), page)
    kept = rest[:, :, max(0, packed_after - first) :]
    at = max(first, packed_after)
    for part, row in _round(kept, at, fmt.residual_window):
        dense = _put(dense, part, fmt.sink_tokens + row)
    return pages, dense, (end, packed_after, begin)


def _put(x: mx.array, part: mx.array, at: int) -> mx.array:
    """`x` with `part` from index `at` of its third axis on."""
    return mx.slice_update(x, part, mx.array([at]), axes=(2,)) if part.shape[2] else x


def _round(x: mx.array, at: int, size: int) -> list[tuple[mx.array, int]]:
    """Pieces of `x` along its third axis, and where they go in a ring of `size`, of which `x` begins at `at`."""
    x, at = x[:, :, max(0, x.shape[2] - size) :], at + max(0, x.shape[2] - size)
    here = min(x.shape[2], size - at % size)
    return [(x[:, :, :here], at % size), (x[:, :, here:], 0)]


def _put_round(pages: mx.array, new: mx.array, at: int) -> mx.array:
    for part, slot in _round(new, at, pages.shape[2]):
        pages = _put(pages, part, slot)
    return pages


def _ring(dense: mx.array, begin: int, end: int, fmt: PackedFormat) -> list[mx.array]:
    """Tokens `begin` to `end` behind the sinks, from the ring, in pieces."""
    if begin >= end:
        return []
    size = fmt.residual_window
    row, count = begin % size, end - begin
    ring = dense[:, :, fmt.sink_tokens : fmt.token_rows]
    here = min(count, size - row)
    return [ring[:, :, row : row + here], ring[:, :, : count - here]]
