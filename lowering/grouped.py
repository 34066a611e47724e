"""Caches with groups by the kernels that a provider has for pages: attention tier by tier, joined by log-sum-exps.

The page of a tier at one place of each block is a strided tensor of pages, which kernels read as they lie. What is
dense is a cache of which nothing is packed, from behind the packed tokens on. Groups are sorted in torch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.ops import planes


class Grouped:
    """The functions of `tqc.ops.planes` for formats with groups.

    Args:
        kernels: a provider's, for formats without.
    """

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    read = staticmethod(planes.read)

    def append(
        self,
        pages: Tensor,
        dense: Tensor,
        state: Tensor,
        new: Tensor,
        start: Tensor | None,
        spec: str,
        score: Tensor | None = None,
    ) -> None:
        planes.append_by(self._encode, pages, dense, state, new, start, spec, score)

    def _encode(self, x: Tensor, head: Tensor, fmt: PackedFormat) -> Tensor:
        """As `encode_pages`: the tokens are pushed through a window by others that nobody reads."""
        batch, heads, count, dim = x.shape
        fmt = fmt.of_least_window
        pages = x.new_empty(batch, heads, 1 + count // PAGE_TOKENS, fmt.page_bytes, dtype=torch.uint8)
        # One page is there already, so that the head's centre is not chosen anew.
        dense, state = (
            torch.cat([x[:, :, :PAGE_TOKENS], head.to(x.dtype)], dim=2),
            torch.tensor([2 * PAGE_TOKENS, PAGE_TOKENS, 0]),
        )
        behind = torch.cat([x[:, :, PAGE_TOKENS:], x.new_zeros(batch, heads, fmt.residual_window, dim)], dim=2)
        self.kernels.append(pages, dense, state, behind, None, fmt.spec)
        return pages[:, :, 1:]

    def attend(
        self,
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
        k_fmt, v_fmt = PackedFormat.parse(k_spec), PackedFormat.parse(v_spec)
        assert k_fmt.groups
        length, packed, _ = k_state.tolist()
        end = length if start is None else int(start.flatten()[0])
        if end != length or int(v_state[0]) != length:
            whole = (query, k_pages, k_dense, k_state, v_pages, v_dense, v_state, key, value, attn_mask, sinks, start)
            return planes.attend(*whole, scale, softcap, is_causal, k_spec, v_spec)
        first = k_fmt.sink_tokens
        blocks = packed // k_fmt.block_tokens
        how = (scale, softcap)
        k_rows, v_rows = (
            dense[:, :, : fmt.token_rows + fmt.head_rows] for dense, fmt in ((k_dense, k_fmt), (v_dense, v_fmt))
        )
        parts = []
        if blocks:
            state = torch.tensor([first + PAGE_TOKENS * blocks, PAGE_TOKENS * blocks, first])
            for place, k_at, v_at in _pages_of_blocks(k_fmt, v_fmt):
                (k_page, k_tier), (v_page, v_tier) = k_at, v_at
                pages = (k_pages[:, :, :blocks, k_page], k_rows, state, v_pages[:, :, :blocks, v_page], v_rows, state)
                seen = None if attn_mask is None else _columns(attn_mask, query, k_pages[:, :, :blocks, place], k_fmt)
                out = self.kernels.attend(
                    query, *pages, None, None, seen, None, None, *how, False, k_tier.spec, v_tier.spec
                )
                parts.append(out)
            # Sinks go as if they were new, so that what is dense is one call.
            key, value = _behind(k_dense[:, :, :first], key), _behind(v_dense[:, :, :first], value)
        begin = first + packed if blocks else 0
        state = torch.tensor([length, 0, begin])
        if attn_mask is not None and blocks:
            attn_mask = torch.cat(
                [attn_mask[..., begin:length], attn_mask[..., :first], attn_mask[..., length:]], dim=-1
            )
        # Neither has pages, so their width does not matter.
        k_tier, v_tier = k_fmt.tiers[0][0], v_fmt.tiers[0][0]
        k_none, v_none = (k_pages[:, :, :0, : k_tier.page_bytes], v_pages[:, :, :0, : v_tier.page_bytes])
        rest = (query, k_none, k_rows, state, v_none, v_rows, state, key, value, attn_mask, sinks, start)
        parts.append(self.kernels.attend(*rest, *how, is_causal, k_tier.spec, v_tier.spec))
        return _joined(parts)


@functools.cache
def _pages_of_blocks(k_fmt: PackedFormat, v_fmt: PackedFormat) -> list[tuple[slice, Any, Any]]:
    """Of each page of a block: where its tokens' places are, and of keys and values where it is and how it is coded."""
    found: list[tuple[slice, Any, Any]] = []
    at = k_fmt.places_offset
    for (k_tier, pages, k_offset), (v_tier, _, v_offset) in zip(k_fmt.tiers, v_fmt.tiers, strict=True):
        for page in range(pages):
            k_at, v_at = (
                (slice(offset + page * tier.page_bytes, offset + (page + 1) * tier.page_bytes), tier)
                for offset, tier in ((k_offset, k_tier), (v_offset, v_tier))
            )
            found.append((slice(at, at + PAGE_TOKENS), k_at, v_at))
            at += PAGE_TOKENS
    return found


def _columns(mask: Tensor, query: Tensor, places: Tensor, fmt: PackedFormat) -> Tensor:
    """The columns of the tokens of pages, [batch, query_heads, n, tokens]."""
    batch, heads, blocks, _ = places.shape
    at = places.long() + fmt.block_tokens * torch.arange(blocks, device=places.device).unsqueeze(-1) + fmt.sink_tokens
    at = at.flatten(2).repeat_interleave(query.shape[1] // heads, dim=1).unsqueeze(2)
    whole = mask.expand(batch, query.shape[1], query.shape[2], mask.shape[-1])
    return whole.gather(3, at.expand(-1, -1, query.shape[2], -1))


def _behind(rows: Tensor, new: Tensor | None) -> Tensor:
    return rows if new is None else torch.cat([rows, new], dim=2)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over all tokens from that over some of them each."""
    if len(parts) == 1:
        return parts[0]
    lse = torch.stack([part for _, part in parts])
    whole = lse.logsumexp(0)
    weights = torch.exp(lse - whole.masked_fill(whole == -torch.inf, 0.0)).transpose(2, 3).unsqueeze(-1)
    outs = torch.stack([out.transpose(1, 2) for out, _ in parts]).float()
    return (outs * weights).sum(0).to(parts[0][0].dtype).transpose(1, 2), whole
