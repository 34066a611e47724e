"""The work of `planes` in static shapes: nothing is read on the host, sizes follow from shapes, branches are `where`.

Pages hold the capacity of the cache. Every function returns new parts, in ops that ONNX and MLX can express.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from tqc.format import PAGE_TOKENS
from tqc.format.blocks import decode_blocks, encode_blocks, kept
from tqc.format.quantizer import decoded, head_rows, unfold
from tqc.ops.planes import correction, position
from tqc.ops.value import Planes


def append(cache: Planes, new: Tensor, start: Tensor | None = None, score: Tensor | None = None) -> Planes:
    """`cache` with tokens behind the stored ones, or from position `start[0]` on, which must not leave a gap.

    `score` is as in `planes.append`, with a score for each token that this call can pack."""
    fmt, count = cache.fmt, new.shape[2]
    if start is not None:
        cache = rewind(cache, torch.minimum(start.flatten()[0], cache.state[0]))
    if not count:
        return cache
    length, packed, begin = cache.state[0], cache.state[1], cache.state[2]
    sink_tokens, window = fmt.sink_tokens, fmt.residual_window
    end = length + count
    packed_after = torch.maximum(packed, _packed_tokens(cache, end))
    if fmt.keep is not None:
        begin = torch.maximum(begin, end - fmt.keep)
    size = fmt.block_tokens
    ends = (sink_tokens, fmt.token_rows, fmt.token_rows + fmt.head_rows)
    sink_rows, ring, head, scorers = cache.dense.tensor_split(ends, dim=2)
    # Index among the new tokens of each row's, where it is one of them.
    at = torch.arange(sink_rows.shape[2], device=new.device) - length
    sink_rows = torch.where(_rows((at >= 0) & (at < count)), _take(new, at), sink_rows)

    first = torch.clamp(length - sink_tokens, min=0)  # packed index of the first new token that is no sink
    skipped = first - (length - sink_tokens)
    pages, num_pages = cache.pages, cache.pages.shape[2]

    def tokens(u: Tensor) -> Tensor:
        return torch.where(_rows(u < first), _take(ring, u % window), _take(new, u - first + skipped))

    if num_pages:
        if fmt.centred:
            opening = head_rows(tokens(torch.arange(PAGE_TOKENS, device=new.device)), fmt, head[:, :, 1:])
            head = torch.where((packed == 0) & (packed_after > 0), opening, head)
        # At most so many pages are completed by this call and kept.
        fresh = min(-(-count // size), num_pages)
        page = torch.maximum(packed, packed_after - fresh * size) // size
        left = tokens(page * size + torch.arange(fresh * size, device=new.device))
        encoded = encode_blocks(left, head, fmt, score[..., : fresh * size] if score is not None else None)
        # The newest page of each slot.
        last = packed_after // size - 1
        in_slot = last - (last - torch.arange(num_pages, device=new.device)) % num_pages
        pages = torch.where(_rows(in_slot >= page), _take(encoded, in_slot - page), pages)
    # The newest token of each slot of the ring.
    slot = torch.arange(ring.shape[2], device=new.device)
    last = end - sink_tokens - 1
    u = last - (last - slot) % window
    kept = _rows(u >= torch.maximum(first, packed_after))
    ring = torch.where(kept, _take(new, u - first + skipped), ring)
    state = torch.stack([end, packed_after, begin])
    return replace(cache, pages=pages, dense=torch.cat([sink_rows, ring, head, scorers], dim=2), state=state)


def remember(cache: Planes, stored: Tensor | int, query: Tensor | None, state_rows: Tensor | None) -> Planes:
    """As `planes.remember`, of a cache that holds the tokens of `query` by now."""
    fmt, groups = cache.fmt, cache.fmt.groups
    if groups is None or query is None or state_rows is None:
        return cache
    at, count = fmt.token_rows + fmt.head_rows, query.shape[2]
    before, ring, _ = cache.dense.tensor_split((at, at + groups.repeats * groups.queries), dim=2)
    if groups.queries:
        rows = ring.unflatten(2, (groups.repeats, groups.queries))
        last = stored + count - 1
        # The newest query of each slot of the ring.
        newest = last - (last - torch.arange(groups.queries, device=ring.device)) % groups.queries - stored
        fresh = query.unflatten(1, (-1, groups.repeats)).index_select(3, torch.clamp(newest, min=0)).to(ring.dtype)
        ring = torch.where((newest >= 0).reshape(1, 1, 1, -1, 1), fresh, rows).flatten(2, 3)
    return replace(cache, dense=torch.cat([before, ring, state_rows.to(ring.dtype)], dim=2))


def rewind(cache: Planes, length: Tensor) -> Planes:
    """The first `length` tokens, an int64 of one element; no part of a group of which tokens were evicted."""
    fmt, packed = cache.fmt, cache.state[1]
    length = length.reshape(())
    left = torch.clamp(length - fmt.sink_tokens, min=0)
    size = fmt.block_tokens
    whole = left // size * size
    back = left < packed
    dense = cache.dense
    if num_pages := cache.pages.shape[2]:
        page, head = _take(cache.pages, (whole // size % num_pages).reshape(1)), fmt.head(dense)
        tokens = decoded(decode_blocks(page, head, fmt), head, fmt).to(dense.dtype)
        of_ring = torch.arange(fmt.dense_rows, device=dense.device) - fmt.sink_tokens
        row = (of_ring - whole) % fmt.residual_window
        in_ring = (of_ring >= 0) & (of_ring < fmt.residual_window)
        reopened = back & (left > whole) & in_ring & (row < size)
        dense = torch.where(_rows(reopened), _take(tokens, row), dense)
    return replace(cache, dense=dense, state=torch.stack([length, torch.where(back, whole, packed), cache.state[2]]))


def held(cache: Planes, columns: int) -> Tensor:
    """The first `columns` tokens that are held, in the basis in which they came; zeros behind the stored ones."""
    fmt, dense = cache.fmt, cache.dense
    stored, packed, begin = cache.state[0], cache.state[1], cache.state[2]
    t = begin + torch.arange(columns, device=dense.device)
    u = t - fmt.sink_tokens
    out = _take(dense, torch.where(u < 0, t, fmt.sink_tokens + u % fmt.residual_window))
    if num_pages := cache.pages.shape[2]:
        head = fmt.head(dense)
        x = decoded(decode_blocks(cache.pages, head, fmt), head, fmt).to(dense.dtype)
        out = torch.where(_rows((u >= 0) & (u < packed)), _take(x, u % (num_pages * fmt.block_tokens)), out)
    return torch.where(_rows(t < torch.minimum(stored, begin + cache.length)), out, torch.zeros_like(out))


def read(cache: Planes) -> Tensor:
    """As `planes.read`, of all the cache's tokens."""
    return unfold(held(cache, cache.length), cache.fmt)


def attend(
    query: Tensor,
    keys: Planes,
    values: Planes,
    key: Tensor | None = None,
    value: Tensor | None = None,
    positions: Tensor | int | None = None,
    attn_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    is_causal: bool = False,
    counted: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `tqc.ops.attend`: output and log-sum-exp."""
    fmt, new = keys.fmt, 0 if key is None else key.shape[2]
    columns = max(_capacity(keys), _capacity(values))
    if positions is not None and new:
        first = position(positions, query.device).flatten()[0]
    else:
        first = torch.clamp(keys.state[0] - keys.state[2], max=keys.length)
        columns += new
    end = first + new
    if attn_mask is not None:
        columns = max(columns, attn_mask.shape[-1])
    k, v = held(keys, columns).float(), held(values, columns).float()
    t = torch.arange(columns, device=query.device)
    if key is not None and value is not None and new:
        fresh = _rows((t >= first) & (t < end))
        k = torch.where(fresh, _take(key, t - first).float(), torch.where(_rows(t < first), k, 0.0))
        v = torch.where(fresh, _take(value, t - first).float(), torch.where(_rows(t < first), v, 0.0))

    batch, heads, rows = k.shape[0], k.shape[1], query.shape[2]
    grouped = query.float().unflatten(1, (heads, -1)).flatten(2, 3)
    scores = (grouped @ k.transpose(-1, -2)).unflatten(2, (-1, rows)).flatten(1, 2) * scale
    if keys.pages.shape[2]:
        u = keys.state[2] + t - fmt.sink_tokens
        coded = (u >= 0) & (u < keys.state[1]) & (t < first)
        added = correction(query, keys.pages, fmt.head(keys.dense), scale, fmt)
        added = added.index_select(3, u % added.shape[3])
        scores = scores + torch.where(coded, added, 0.0)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if keys.pages.shape[2] and fmt.evicts:
        left = kept(keys.pages, fmt).repeat_interleave(query.shape[1] // heads, dim=1)
        gone = coded & ~left.index_select(2, u % left.shape[2])
        scores = scores.masked_fill(gone.unsqueeze(2), -math.inf)
    visible = t < end
    if attn_mask is not None:
        visible = t < torch.clamp(end, min=attn_mask.shape[-1])
        # One column stands for all of them.
        lacking = columns - attn_mask.shape[-1] if attn_mask.shape[-1] > 1 else 0
        mask = torch.nn.functional.pad(attn_mask, (0, lacking))
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    scores = scores.masked_fill(~visible, -math.inf)
    if is_causal:
        row = torch.arange(rows, device=query.device)[:, None]
        scores = scores.masked_fill(t[None, :] - first > row + new - rows, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[None, :, None, None].expand(batch, -1, rows, 1)], dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))[..., :columns]
    out = (weights.unflatten(1, (heads, -1)).flatten(2, 3) @ v).unflatten(2, (-1, rows)).flatten(1, 2)
    return out.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2), lse


def _capacity(cache: Planes) -> int:
    """How many tokens the cache can hold."""
    return min(cache.fmt.token_rows + cache.pages.shape[2] * cache.fmt.block_tokens, cache.length)


def _packed_tokens(cache: Planes, length: Tensor) -> Tensor:
    over, size = length - cache.fmt.token_rows, cache.fmt.block_tokens
    return torch.clamp((over + size - 1) // size * size, min=0)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [batch, heads, n, ...] at `index`, clamped to those there are; callers mask what they do not want."""
    return rows.index_select(2, torch.clamp(index, 0, rows.shape[2] - 1))


def _rows(mask: Tensor) -> Tensor:
    """A mask of rows, to be broadcast over [batch, heads, n, ...]."""
    return mask.reshape(1, 1, -1, 1)
