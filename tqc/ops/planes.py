"""The reference's work on the parts of a packed cache, in plain torch; what every provider's kernels do the same way.

A cache is its three parts (`pages`, `dense`, `state`; see `tqc.format`) and the spec string of its format.

    append(pages!, dense!, state!, new, start, spec)      write tokens behind the stored ones
    read(pages, dense, state, length, spec)               dense copy of the first tokens
    attend(query, k_*, v_*, key, value, ...)              softmax attention over stored and new tokens
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.format.quantizer import (
    decode_levels,
    decode_pages,
    decoded,
    encode_pages,
    head_centre,
    token_scales,
    unfold,
    without_autocast,
)


def append(pages: Tensor, dense: Tensor, state: Tensor, new: Tensor, start: Tensor | None, spec: str) -> None:
    """Write tokens behind the stored ones, in place; tokens that leave the recent window are packed.

    The stored result depends on the tokens alone, not on how they were split over calls.

    Args:
        pages: uint8 [batch, heads, num_pages, page_bytes], with room for every token that will be packed.
        dense: [batch, heads, 1 + sink_tokens + residual_window, head_dim].
        state: int64 [2], (length, packed).
        new: [batch, heads, n, head_dim], in dense's dtype; rotated if the format is folded.
        start: position of the first new token, int64 [1 or more] of which the first counts, or None for `length`.
            A smaller one than `length` drops the stored tokens from there on; a larger one fills the gap with zeros.
        spec: `str` of the `PackedFormat`.
    """
    fmt = PackedFormat.parse(spec)
    length, packed = state.tolist()
    if start is not None:
        first = int(start.flatten()[0])
        if first < length:
            length, packed = first, rewind(pages, dense, packed, first, fmt)
        elif first > length:
            gap = new.new_zeros(*new.shape[:2], first - length, new.shape[3])
            new = torch.cat([gap, new], dim=2)
    count = new.shape[2]
    end = length + count
    packed_after = fmt.packed_tokens(end, packed)
    sink_tokens = fmt.sink_tokens
    ring = dense[:, :, 1 + sink_tokens :]

    taken = max(0, min(sink_tokens - length, count))
    dense[:, :, 1 + length : 1 + length + taken] = new[:, :, :taken]
    # Packed indices of the new tokens: from `first` on. Those below `first` and not yet packed are in the ring.
    first = length + taken - sink_tokens
    rest = new[:, :, taken:]
    if packed_after > packed:
        old = torch.arange(packed, min(first, packed_after), device=new.device) % fmt.residual_window
        run = torch.cat([ring[:, :, old], rest[:, :, : max(0, packed_after - first)]], dim=2)
        if packed == 0:
            dense[:, :, 0] = head_centre(run[:, :, :PAGE_TOKENS], fmt)
        encoded = encode_pages(run, dense[:, :, 0], fmt)
        pages[:, :, packed // PAGE_TOKENS : packed_after // PAGE_TOKENS] = encoded
    kept = rest[:, :, max(0, packed_after - first) :]
    slots = torch.arange(max(first, packed_after), max(first, packed_after) + kept.shape[2], device=new.device)
    ring[:, :, slots % fmt.residual_window] = kept
    state.copy_(torch.tensor([end, packed_after]))


def rewind(pages: Tensor, dense: Tensor, packed: int, length: int, fmt: PackedFormat) -> int:
    """Make `dense` fit a prefix of `length` tokens and return how many of those stay packed.

    Where `length` falls inside a packed page, that page's tokens go back to the ring, as their decoded values.
    """
    kept = max(0, length - fmt.sink_tokens)
    if kept >= packed:
        return packed
    packed = kept // PAGE_TOKENS * PAGE_TOKENS
    if kept > packed:
        page = packed // PAGE_TOKENS
        y = decode_pages(pages[:, :, page : page + 1], dense[:, :, 0], fmt)
        slot = 1 + fmt.sink_tokens + packed % fmt.residual_window
        dense[:, :, slot : slot + PAGE_TOKENS] = decoded(y, fmt).to(dense.dtype)
    return packed


def read(pages: Tensor, dense: Tensor, state: Tensor, length: int, spec: str) -> Tensor:
    """The first `length` stored tokens, decoded: [batch, heads, length, head_dim] in dense's dtype.

    Positions behind the last stored token are zeros. Values of a folded format are rotated back.
    """
    fmt = PackedFormat.parse(spec)
    return unfold(held(pages, dense, state, length, fmt), fmt)


def held(pages: Tensor, dense: Tensor, state: Tensor, length: int, fmt: PackedFormat) -> Tensor:
    """The first `length` stored tokens in the basis in which they came."""
    stored, packed = state.tolist()
    stored = min(stored, length)
    out = dense.new_zeros(*dense.shape[:2], length, fmt.head_dim)
    out[:, :, : min(stored, fmt.sink_tokens)] = dense[:, :, 1 : 1 + min(stored, fmt.sink_tokens)]
    tokens = max(0, stored - fmt.sink_tokens)
    if (coded := min(tokens, packed)) > 0:
        y = decode_pages(pages[:, :, : -(-coded // PAGE_TOKENS)], dense[:, :, 0], fmt)
        out[:, :, fmt.sink_tokens : fmt.sink_tokens + coded] = decoded(y[:, :, :coded], fmt).to(dense.dtype)
    if tokens > packed:
        slots = torch.arange(packed, tokens, device=dense.device) % fmt.residual_window
        out[:, :, fmt.sink_tokens + packed : stored] = dense[:, :, 1 + fmt.sink_tokens :][:, :, slots]
    return out


@without_autocast
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
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the stored tokens and, behind them, the new ones (not stored yet).

    Args:
        query: [batch, query_heads, n, head_dim]; query head h reads key/value head h // (query_heads // heads).
        key, value: the new tokens, [batch, heads, m, head_dim], or None. Where the values' format is folded, `value`
            comes rotated, and so does the output go.
        attn_mask: bool (True: attend) or float (added to the scores), broadcastable to
            [batch, query_heads, n, columns]; columns beyond stored and new tokens stand for keys and values of zeros,
            as a preallocated dense cache holds them.
        sinks: one logit per query head that joins each softmax with a value of zero, [query_heads] (gpt-oss).
        start: as in `append`: stored tokens from there on are ignored, and a gap counts as zeros.
        scale: factor of the scores. The score of a packed token is corrected for its coding error (`correction`).
        softcap: scores become softcap * tanh(scores / softcap) before the mask; 0 for none.
        is_causal: new token i is seen by queries i + n - m and later ones.

    Returns:
        (output [batch, query_heads, n, head_dim_v] in query's dtype, a transposed view of [batch, n, ...];
        log-sum-exp of the scores, float32 [batch, query_heads, n]). A query that may attend to nothing gets zeros and
        -inf.

    Raises:
        ValueError: if only one of `key` and `value` is given, or if keys and values hold different tokens before
            `start`: one of them missed an `append`.
    """
    if (key is None) != (value is None):
        raise ValueError(
            f"key and value must both be given or both be None, got only {'key' if value is None else 'value'}"
        )
    length, v_length = int(k_state[0]), int(v_state[0])
    if start is not None:
        first = int(start.flatten()[0])
        agree, length = min(length, first) == min(v_length, first), first
    else:
        agree = length == v_length
    if not agree:
        raise ValueError(f"k_state and v_state must agree: {int(k_state[0])} keys are stored and {v_length} values")
    keys = held(k_pages, k_dense, k_state, length, PackedFormat.parse(k_spec)).float()
    values = held(v_pages, v_dense, v_state, length, PackedFormat.parse(v_spec)).float()
    if key is not None and value is not None:
        keys = torch.cat([keys, key.float()], dim=2)
        values = torch.cat([values, value.float()], dim=2)
    new = 0 if key is None else key.shape[2]
    batch, heads, columns, _ = keys.shape
    rows = query.shape[2]
    if attn_mask is not None and attn_mask.shape[-1] > columns:
        pad = attn_mask.shape[-1] - columns
        keys = torch.nn.functional.pad(keys, (0, 0, 0, pad))
        values = torch.nn.functional.pad(values, (0, 0, 0, pad))

    grouped = query.float().unflatten(1, (heads, -1)).flatten(2, 3)
    scores = (grouped @ keys.transpose(-1, -2)).unflatten(2, (-1, rows)).flatten(1, 2) * scale
    k_fmt = PackedFormat.parse(k_spec)
    if (coded := min(int(k_state[1]), min(int(k_state[0]), length) - k_fmt.sink_tokens)) > 0:
        packed = slice(k_fmt.sink_tokens, k_fmt.sink_tokens + coded)
        scores[..., packed] += correction(query, k_pages[:, :, : -(-coded // PAGE_TOKENS)], scale, k_fmt)[..., :coded]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    if is_causal:
        row = torch.arange(rows, device=query.device)[:, None]
        column = torch.arange(scores.shape[-1], device=query.device)[None, :]
        scores = scores.masked_fill(column - length > row + new - rows, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[None, :, None, None].expand(batch, -1, rows, 1)], dim=-1)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1))
    if sinks is not None:
        weights = weights[..., :-1]
    grouped = weights.unflatten(1, (heads, -1)).flatten(2, 3) @ values
    out = grouped.unflatten(2, (-1, rows)).flatten(1, 2).to(query.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def correction(query: Tensor, pages: Tensor, scale: float, fmt: PackedFormat) -> Tensor:
    """What attention adds to the scores of packed tokens for their coding error.

    By its codes a token of scale s has the score s p, p = (scale q) . level. What of p exceeds |scale q| is stretched
    by D, the error of a coordinate of unit variance: max(0, D s (p - |scale q|)) is added.

    Why: the codes shrink the true s p by 1 - D and add noise of variance (1 - D) v, v = D s^2 |scale q|^2. If keys
    have rho times the variance along q that they have on average, then, given the codes, exp(score) is
    exp(a s p + a v / 2) on average, with a = 1 / (1 - D + D / rho). To add v / 2 to all tokens, as for rho = 1, does
    harm where rho is small (large keys in channels to which the query does not look), without bound. Each token's p
    bears witness for rho: p^2 is about |scale q|^2 where rho is 1, and D of that where all is noise. So up to
    |scale q| nothing is added, and behind it what large rho gives, a - 1 being about D. The term in v is left out: it
    is the mean of many errors, and few tokens win a softmax.

    Args:
        query: [batch, query_heads, rows, head_dim].
        pages: uint8 [batch, heads, n, page_bytes] of the keys.

    Returns:
        float32 [batch, query_heads, rows, n * 32].
    """
    query = query.float() * scale
    levels = decoded(decode_levels(pages, fmt).flatten(2, 3), fmt)
    grouped = query.unflatten(1, (pages.shape[1], -1)).flatten(2, 3)
    products = (grouped @ levels.transpose(-1, -2)).unflatten(2, (-1, query.shape[2])).flatten(1, 2)
    above = (products - query.square().sum(-1, keepdim=True).sqrt()).clamp_min(0.0)
    scales = token_scales(pages, fmt).flatten(2).repeat_interleave(query.shape[1] // pages.shape[1], 1)
    return fmt.score_stretch * above * scales.unsqueeze(2)


def position(positions: Tensor | int, device: torch.device) -> Tensor:
    """Positions as `append` takes them: int64 [1 or more]."""
    return positions if isinstance(positions, Tensor) else torch.full((1,), positions, dtype=torch.int64, device=device)
