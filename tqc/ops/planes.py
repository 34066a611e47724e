"""The reference's work on the parts of a packed cache, in plain torch; what every provider's kernels do the same way.

A cache is its three parts (`pages`, `dense`, `state`; see `tqc.format`) and the spec string of its format.

    append(pages!, dense!, state!, new, start, spec, score)   write tokens behind the stored ones
    read(pages, dense, state, length, spec)                   dense copy of the first tokens
    attend(query, k_*, v_*, key, value, ...)                  softmax attention over stored and new tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.format.balance import balance
from tqc.format.blocks import decode_blocks, encode_blocks, kept, tier_pages
from tqc.format.quantizer import (
    decode_levels,
    decoded,
    encode_pages,
    head_rows,
    token_scales,
    unfold,
    unrotate,
    without_autocast,
)


def append(
    pages: Tensor,
    dense: Tensor,
    state: Tensor,
    new: Tensor,
    start: Tensor | None,
    spec: str,
    score: Tensor | None = None,
) -> None:
    """Write tokens behind the stored ones, in place; tokens that leave the recent window are packed.

    The stored result depends on the tokens alone, not on how they were split over calls.

    Args:
        pages: uint8 [batch, heads, num_pages, block_bytes], with room for every token that will be packed.
        dense: [batch, heads, rows, head_dim], `PackedFormat.dense_rows` of them, or fewer where nothing will be packed:
            as many as there will be tokens, or more. The heads' balance is there already; it is not chosen here.
        state: int64 [3]: how many tokens came, how many of them are packed, the first that is held.
        new: [batch, heads, n, head_dim], in dense's dtype; rotated if the format is folded.
        start: position of the first new token, int64 [1 or more] of which the first counts, or None for `length`.
            A smaller one than `length` drops the stored tokens from there on; a larger one fills the gap with zeros.
        spec: `str` of the `PackedFormat`.
        score: where the format has groups and tokens are packed, the score of these, from the first one that is not
            packed yet on: float32 [batch, heads, m], m no less than they are.

    Raises:
        ValueError: if tokens would be packed by scores that are not there, or from `start` on tokens would be dropped
            out of a group of which some were evicted.
    """
    append_by(encode_pages, pages, dense, state, new, start, spec, score)


def append_by(
    encode: Callable[[Tensor, Tensor, PackedFormat], Tensor],
    pages: Tensor,
    dense: Tensor,
    state: Tensor,
    new: Tensor,
    start: Tensor | None,
    spec: str,
    score: Tensor | None,
) -> None:
    """`append` with another `encode_pages`."""
    fmt = PackedFormat.parse(spec)
    length, packed, begin = state.tolist()
    if start is not None:
        first = int(start.flatten()[0])
        if first < length:
            length, packed = first, rewind(pages, dense, packed, first, fmt)
        elif first > length:
            gap = new.new_zeros(*new.shape[:2], first - length, new.shape[3])
            new = torch.cat([gap, new], dim=2)
    count = new.shape[2]
    end = length + count
    packed_after, begin = fmt.packed_tokens(end, packed), fmt.first_held(end, begin)
    sink_tokens = fmt.sink_tokens
    ring = dense[:, :, sink_tokens : fmt.token_rows]

    taken = max(0, min(sink_tokens - length, count))
    dense[:, :, length : length + taken] = new[:, :, :taken]
    # Packed indices of the new tokens: from `first` on. Those below `first` and not yet packed are in the ring.
    first = length + taken - sink_tokens
    rest = new[:, :, taken:]
    if packed_after > packed:
        old = torch.arange(packed, min(first, packed_after), device=new.device) % fmt.residual_window
        run = torch.cat([ring[:, :, old], rest[:, :, : max(0, packed_after - first)]], dim=2)
        if packed == 0:
            fmt.head(dense)[:] = head_rows(run[:, :, :PAGE_TOKENS], fmt, fmt.head(dense)[:, :, 1:])
        # Pages whose tokens are all dropped are not stored.
        page = min(max(packed, begin - sink_tokens), packed_after) // fmt.block_tokens
        slots = torch.arange(page, packed_after // fmt.block_tokens, device=new.device) % max(1, pages.shape[2])
        left = run[:, :, page * fmt.block_tokens - packed :]
        score = score[..., : left.shape[2]] if score is not None and fmt.groups else None
        pages[:, :, slots] = encode_blocks(left, fmt.head(dense), fmt, score, encode)
    kept = rest[:, :, max(0, packed_after - first) :]
    slots = torch.arange(max(first, packed_after), max(first, packed_after) + kept.shape[2], device=new.device)
    ring[:, :, slots % fmt.residual_window] = kept
    state.copy_(torch.tensor([end, packed_after, begin]))


def choose_balance(dense: Tensor, begin: int, end: int, new: Tensor, query: Tensor | None, fmt: PackedFormat) -> None:
    """Choose the balance of each head of keys (see `tqc.format.balance`), in a cache of which nothing is packed yet.

    Nothing happens as long as nothing can be packed, or where there are fewer tokens than a page holds.

    Args:
        dense: of the cache, with room for `new`.
        begin, end: its tokens are those from position `begin` to `end`.
        new: the next ones.
        query: as in `tqc.ops.pack`.
    """
    enough = end + new.shape[2] >= PAGE_TOKENS and dense.shape[2] == fmt.dense_rows
    if query is not None and fmt.centred and enough:
        keys = torch.cat([dense[:, :, begin:end], new], dim=2)
        fmt.head(dense)[:, :, 1] = balance(keys, query)


def rewind(pages: Tensor, dense: Tensor, packed: int, length: int, fmt: PackedFormat) -> int:
    """Make `dense` fit a prefix of `length` tokens and return how many of those stay packed.

    Where `length` falls inside a packed page, or a group, the tokens of that go back to the ring, as their decoded
    values.

    Raises:
        ValueError: see `why_not_rewound`.
    """
    left, size = max(0, length - fmt.sink_tokens), fmt.block_tokens
    if left >= packed:
        return packed
    if reason := why_not_rewound(packed, length, fmt):
        raise ValueError(reason)
    packed = left // size * size
    if left > packed:
        slot = packed // size % pages.shape[2]
        y = decode_blocks(pages[:, :, slot : slot + 1], fmt.head(dense), fmt)
        rows = fmt.sink_tokens + torch.arange(packed, packed + size, device=dense.device) % fmt.residual_window
        dense[:, :, rows] = decoded(y, fmt.head(dense), fmt).to(dense.dtype)
    return packed


def why_not_rewound(packed: int, length: int, fmt: PackedFormat) -> str | None:
    """Why a cache cannot be cut to `length` tokens, or None: some of those that would be left were evicted, and the
    rest of their group is not to be told apart any more."""
    left = length - fmt.sink_tokens
    if not fmt.evicts or left <= 0 or left >= packed or left % fmt.block_tokens == 0:
        return None
    first = fmt.sink_tokens + left // fmt.block_tokens * fmt.block_tokens
    return (
        f"a cache cannot be cut to {length} tokens: of those from {first} to {first + fmt.block_tokens - 1} some were "
        f"evicted; {first} and {first + fmt.block_tokens} tokens can be, and {fmt.sink_tokens + packed} and more"
    )


def read(pages: Tensor, dense: Tensor, state: Tensor, length: int, spec: str) -> Tensor:
    """The first `length` tokens that are held, decoded: [batch, heads, length, head_dim] in dense's dtype.

    Positions behind the last stored token are zeros. Values of a folded format are rotated back. `pages` may come flat,
    [batch, heads, bytes], so that no tracer has to follow a view of it.
    """
    fmt = PackedFormat.parse(spec)
    if pages.dim() == 3:
        pages = pages.unflatten(2, (pages.shape[2] // fmt.block_bytes, fmt.block_bytes))
    return unfold(held(pages, dense, state, length, fmt), fmt)


def held(pages: Tensor, dense: Tensor, state: Tensor, length: int, fmt: PackedFormat) -> Tensor:
    """The first `length` tokens that are held, in the basis in which they came; zeros for those that were evicted."""
    stored, _, begin = state.tolist()
    stored, sink_tokens = min(stored, begin + length), fmt.sink_tokens
    out = dense.new_zeros(*dense.shape[:2], length, fmt.head_dim)
    if begin < sink_tokens:
        out[:, :, : max(0, min(stored, sink_tokens) - begin)] = dense[:, :, begin : min(stored, sink_tokens)]
    coded, first, count = packed_pages(pages, state, stored, fmt)
    if count:
        head = fmt.head(dense)
        x = decoded(decode_blocks(coded, head, fmt), head, fmt)[:, :, first % fmt.block_tokens :][:, :, :count]
        column = sink_tokens + first - begin
        out[:, :, column : column + count] = x.to(dense.dtype)
    recent = max(first + count, begin - sink_tokens)
    if recent < stored - sink_tokens:
        slots = torch.arange(recent, stored - sink_tokens, device=dense.device) % fmt.residual_window
        out[:, :, sink_tokens + recent - begin : stored - begin] = dense[:, :, sink_tokens + slots]
    return out


def packed_pages(pages: Tensor, state: Tensor, end: int, fmt: PackedFormat) -> tuple[Tensor, int, int]:
    """The pages of the packed tokens before position `end` that are held, in order; the packed index of the first such
    token, and how many there are."""
    _, packed, begin = state.tolist()
    first = max(0, begin - fmt.sink_tokens)
    last = max(first, min(end - fmt.sink_tokens, packed))
    if first == last:
        return pages[:, :, :0], min(first, packed), 0
    size = fmt.block_tokens
    slots = torch.arange(first // size, -(-last // size), device=pages.device) % pages.shape[2]
    return pages[:, :, slots], first, last - first


def evicted(pages: Tensor, state: Tensor, columns: int, fmt: PackedFormat) -> Tensor | None:
    """Which of the first `columns` tokens were evicted, bool [batch, heads, columns]; None where none is."""
    coded, _, count = packed_pages(pages, state, min(int(state[0]), columns), fmt)
    if not fmt.evicts or not count:
        return None
    gone = torch.zeros(*pages.shape[:2], columns, dtype=torch.bool, device=pages.device)
    gone[:, :, fmt.sink_tokens : fmt.sink_tokens + count] = ~kept(coded, fmt)[:, :, :count]
    return gone


def remember(dense: Tensor, stored: int, query: Tensor, state_rows: Tensor | None, fmt: PackedFormat) -> None:
    """Write what the scorer of a cache's groups needs later into `dense` of its keys: the last queries, and its state.

    Args:
        stored: how many tokens there were before those of `query`.
        query: [batch, query_heads, n, head_dim].
        state_rows: [batch, heads, state_rows, head_dim]; None where it stays.
    """
    groups = fmt.groups
    assert groups
    first = fmt.token_rows + fmt.head_rows
    if groups.queries:
        count = min(query.shape[2], groups.queries)
        recent = query[:, :, query.shape[2] - count :].unflatten(1, (-1, groups.repeats))
        at = torch.arange(stored + query.shape[2] - count, stored + query.shape[2], device=dense.device)
        ring = dense[:, :, first : first + groups.repeats * groups.queries].unflatten(2, (groups.repeats, -1))
        ring[:, :, :, at % groups.queries] = recent.to(dense.dtype)
    if state_rows is not None:
        dense[:, :, first + groups.repeats * groups.queries : fmt.dense_rows] = state_rows


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
            [batch, query_heads, n, columns]; column 0 is the first token that is held; columns beyond stored and new
            tokens stand for keys and values of zeros, as a preallocated dense cache holds them.
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
    if not agree or int(k_state[2]) != int(v_state[2]):
        raise ValueError(f"k_state and v_state must agree: {int(k_state[0])} keys are stored and {v_length} values")
    begin = int(k_state[2])
    length -= begin
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
    coded, first, count = packed_pages(k_pages, k_state, min(int(k_state[0]), begin + length), k_fmt)
    if count:
        added = correction(query, coded, k_fmt.head(k_dense), scale, k_fmt)[..., first % k_fmt.block_tokens :][
            ..., :count
        ]
        at = k_fmt.sink_tokens + first - begin
        scores[..., at : at + count] += added
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        else:
            scores = scores + attn_mask
    gone = evicted(k_pages, k_state, length, k_fmt)
    if gone is not None:
        hidden = gone.repeat_interleave(scores.shape[1] // heads, dim=1).unsqueeze(2)
        scores[..., :length] = scores[..., :length].masked_fill(hidden, -math.inf)
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


def correction(query: Tensor, pages: Tensor, head: Tensor, scale: float, fmt: PackedFormat) -> Tensor:
    """What attention adds to the scores of packed tokens for their coding error.

    By its codes a token of scale s has the score s p, p = (scale q) . level, q being multiplied by the head's balance.
    What of p exceeds |scale q| is stretched by D, the error of a coordinate of unit variance: max(0, D s (p - |scale
    q|)) is added.

    Why: the codes shrink the true s p by 1 - D and add noise of variance (1 - D) v, v = D s^2 |scale q|^2. If keys
    have rho times the variance along q that they have on average, then, given the codes, exp(score) is
    exp(a s p + a v / 2) on average, with a = 1 / (1 - D + D / rho). To add v / 2 to all tokens, as for rho = 1, does
    harm where rho is small (large keys in channels to which the query does not look), without bound. Each token's p
    bears witness for rho: p^2 is about |scale q|^2 where rho is 1, and D of that where all is noise. So up to
    |scale q| nothing is added, and behind it what large rho gives, a - 1 being about D. The term in v is left out: it
    is the mean of many errors, and few tokens win a softmax.

    Args:
        query: [batch, query_heads, rows, head_dim].
        pages: uint8 [batch, heads, n, block_bytes] of the keys.
        head: their rows with centre and balance, [batch, heads, 2, head_dim].

    Returns:
        float32 [batch, query_heads, rows, n * block_tokens], zeros for evicted tokens.
    """
    if fmt.groups is None:
        return _correction(query, pages, head, scale, fmt)
    added = query.new_zeros(*query.shape[:3], pages.shape[2] * fmt.block_tokens, dtype=torch.float32)
    for tier, coded, place in tier_pages(pages, fmt):
        columns = place.repeat_interleave(query.shape[1] // pages.shape[1], dim=1).unsqueeze(2)
        of_tier = _correction(query, coded, head, scale, tier)
        added = added.scatter(3, columns.expand_as(of_tier), of_tier)
    return added


def _correction(query: Tensor, pages: Tensor, head: Tensor, scale: float, fmt: PackedFormat) -> Tensor:
    rows = query.shape[2]
    grouped = query.float().unflatten(1, (pages.shape[1], -1)).flatten(2, 3) * scale
    if fmt.centred:
        grouped = grouped * head[:, :, 1:].float()
    levels = decode_levels(pages, fmt).flatten(2, 3)
    levels = levels if fmt.folded else unrotate(levels, fmt)
    above = (grouped @ levels.transpose(-1, -2) - grouped.square().sum(-1, keepdim=True).sqrt()).clamp_min(0.0)
    added = fmt.score_stretch * above * token_scales(pages, fmt).flatten(2).unsqueeze(2)
    return added.unflatten(2, (-1, rows)).flatten(1, 2)


def position(positions: Tensor | int, device: torch.device) -> Tensor:
    """Positions as `append` takes them: int64 [1 or more]."""
    return positions if isinstance(positions, Tensor) else torch.full((1,), positions, dtype=torch.int64, device=device)
