"""What is kept of groups of tokens: the reference of encoding and decoding blocks (see `tqc.format.groups`)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tqc.format.packed import PAGE_TOKENS, PackedFormat
from tqc.format.quantizer import decode_pages, encode_pages


def encode_blocks(
    x: torch.Tensor,
    head: torch.Tensor,
    fmt: PackedFormat,
    score: torch.Tensor | None,
    encode: Callable[[torch.Tensor, torch.Tensor, PackedFormat], torch.Tensor] = encode_pages,
) -> torch.Tensor:
    """Encode what packing takes at once: whole pages or, where the format has groups, whole groups.

    Args:
        x: [batch, heads, n * block_tokens, head_dim], any float dtype.
        head: as in `encode_pages`.
        score: of each token, float32 [batch, heads, n * block_tokens]: the higher, the more exactly it is kept; among
            equals the later one. Only for groups.
        encode: in the place of `encode_pages`.

    Returns:
        uint8 [batch, heads, n, block_bytes].
    """
    if fmt.groups is None:
        return encode(x, head, fmt)
    if score is None:
        raise ValueError(f"tokens of groups are packed by their scores, and there are none: {fmt}")
    order = _ranked(score.unflatten(-1, (-1, fmt.block_tokens)))
    tokens = x.unflatten(2, (-1, fmt.block_tokens))
    parts, places, first = [], [], 0
    for tier, pages, _ in fmt.tiers:
        count = pages * PAGE_TOKENS
        place = order[..., first : first + count].sort(-1).values
        chosen = tokens.gather(3, place.unsqueeze(-1).expand(*place.shape, x.shape[-1]))
        coded = encode(chosen.flatten(2, 3), head, tier)
        parts.append(coded.unflatten(2, (-1, pages)).flatten(3))
        places.append(place.to(torch.uint8))
        first += count
    return torch.cat([*parts, *places], dim=-1)


def _ranked(score: torch.Tensor) -> torch.Tensor:
    """Places in a group, the highest score first; a score that is no number counts as the lowest."""
    lowest = torch.finfo(score.dtype).min
    score = score.nan_to_num(lowest, neginf=lowest)
    last = score.shape[-1] - 1
    return last - score.flip(-1).argsort(dim=-1, descending=True, stable=True)


def tier_pages(blocks: torch.Tensor, fmt: PackedFormat) -> list[tuple[PackedFormat, torch.Tensor, torch.Tensor]]:
    """The pages of each tier.

    Args:
        blocks: uint8 [batch, heads, n, block_bytes], of a format with groups.

    Returns:
        Of each tier (format of the pages; pages, uint8 [batch, heads, m, page_bytes]; for each token of them its number
        among the n * block_tokens tokens of the groups, int64 [batch, heads, m * 32]).
    """
    found, at = [], fmt.places_offset
    group = fmt.block_tokens * torch.arange(blocks.shape[2], device=blocks.device).unsqueeze(-1)
    for tier, pages, offset in fmt.tiers:
        coded = blocks[..., offset : offset + pages * tier.page_bytes]
        place = blocks[..., at : at + pages * PAGE_TOKENS].long() + group
        found.append((tier, coded.unflatten(3, (pages, -1)).flatten(2, 3), place.flatten(2)))
        at += pages * PAGE_TOKENS
    return found


def decode_blocks(blocks: torch.Tensor, head: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """Decode what `encode_blocks` made, as `decode_pages` does: float32 [batch, heads, n * block_tokens, head_dim],
    *rotated*; zeros for tokens that were evicted."""
    if fmt.groups is None:
        return decode_pages(blocks, head, fmt)
    batch, heads, count, _ = blocks.shape
    out = torch.zeros(batch, heads, count * fmt.block_tokens, fmt.head_dim, device=blocks.device)
    for tier, pages, place in tier_pages(blocks, fmt):
        y = decode_pages(pages, head, tier)
        out = out.scatter(2, place.unsqueeze(-1).expand_as(y), y)
    return out


def kept(blocks: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """Which tokens of whole groups were not evicted: bool [batch, heads, n * block_tokens]."""
    batch, heads, count, _ = blocks.shape
    out = torch.zeros(batch, heads, count * fmt.block_tokens, dtype=torch.bool, device=blocks.device)
    for _, _, place in tier_pages(blocks, fmt):
        out = out.scatter(2, place, torch.ones_like(place, dtype=torch.bool))
    return out
