"""Reference encoding and decoding of pages, in plain torch: the semantics that every kernel is tested against.

A page holds 32 tokens of one head. With x the vector of a token, R the rotation and s the balance of the head's
channels (see `tqc.format.balance`):

    y   = R (x / s)                              balanced and rotated (R x in plain formats; x in folded ones, whose
                                                 vectors come rotated)
    r_t = y_t - centre_head - centre_page        (centred formats; see `encode_pages`)
    s_t = |r_t| / sqrt(head_dim)                 scale
    i_t = argmin_i |r_t / f s_t - level_i|       Lloyd-Max codes, for the f that leaves the least squared error
    s_t <- <r_t, level> / <level, level>         norm correction: the scale of least squared error
    y^_t = centre_head + centre_page + s_t level[i_t],   x^ = s (R' y^)

Scales are rounded to 2**(-1/32) of the largest one in the page *before* the codes are chosen, so their rounding costs
next to nothing. A vector whose residual is zero reads back exactly; one with a NaN or an infinity, or whose rotation
overflows float32, reads back as NaNs; neither disturbs its page. A residual below 1/240 of the longest one of its page
reads back with an error of that size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from tqc.format.packed import (
    CENTRE_LIMIT,
    CENTRE_ZERO,
    PAGE_TOKENS,
    SCALE_NAN,
    SCALE_STEPS,
    SCALE_ZERO,
    PackedFormat,
    pack_plane,
    scale_table,
    unpack_plane,
)

# Rows are coded in slices of about this many elements, so that temporaries stay small whatever the size of the cache.
_CHUNK_ELEMENTS = 1 << 22
# Scales tried for each vector, in steps of the scale code around the root mean square. The best of them errs 2, 10 and
# 20 % less than the root mean square itself at 2, 3 and 4 bits; wider codes err little as it is.
SCALE_SEARCH = (0, -4, 4, -8, 8)
SCALE_SEARCH_BITS = 5


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of tensors, in the dtypes that it names itself."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        first = next(x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return run


@without_autocast
def rotate(x: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """R x for each vector of `x` [..., head_dim], float32."""
    return x.float() @ fmt.rotation_matrix(x.device).T


@without_autocast
def unrotate(y: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """R' y for each vector of `y` [..., head_dim], float32."""
    return y.float() @ fmt.rotation_matrix(y.device)


def fold(x: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """Vectors of a model without folding, as a cache of this format takes and holds them; dtype as it was."""
    return rotate(x, fmt).to(x.dtype) if fmt.folded else x


def unfold(x: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """Inverse of `fold`."""
    return unrotate(x, fmt).to(x.dtype) if fmt.folded else x


def _coded(x: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """Balanced vectors in the rotated basis, float32."""
    return x.float() if fmt.folded else rotate(x, fmt)


def decoded(y: torch.Tensor, head: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """Vectors [batch, heads, n, head_dim] of pages as dense rows hold them, float32.

    Args:
        y: in the rotated basis.
        head: as in `encode_pages`.
    """
    x = y.float() if fmt.folded else unrotate(y, fmt)
    return x * head[:, :, 1:].float() if fmt.centred else x


def head_rows(first_page: torch.Tensor, fmt: PackedFormat, balance: torch.Tensor | None = None) -> torch.Tensor:
    """The centre of each head in its balanced and rotated basis, which is the mean of these tokens, and its balance.

    Args:
        first_page: [batch, heads, 32, head_dim], as they came.
        balance: [batch, heads, 1, head_dim]; None for ones.

    Returns:
        In `first_page`'s dtype, [batch, heads, 2, head_dim]; no rows in plain formats.
    """
    if not fmt.centred:
        return first_page[:, :, :0]
    balance = torch.zeros_like(first_page[:, :, :1]) + 1 if balance is None else balance
    # A rotated mean can exceed float16 where no coordinate did; the centre of the page makes up for the clamp.
    limits = torch.finfo(first_page.dtype)
    mean = _finite_mean(_coded(first_page.float() / balance.float(), fmt)).clamp(limits.min, limits.max)
    return torch.cat([mean.unsqueeze(2).to(first_page.dtype), balance.to(first_page.dtype)], dim=2)


def encode_pages(x: torch.Tensor, head: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """Encode whole pages.

    Args:
        x: [batch, heads, n * 32, head_dim], any float dtype.
        head: [batch, heads, head_rows, head_dim], from `head_rows`.

    Returns:
        uint8 [batch, heads, n, page_bytes].
    """
    batch, heads, tokens, dim = x.shape
    rows = x.reshape(batch * heads, tokens // PAGE_TOKENS, PAGE_TOKENS, dim)
    head = head.reshape(batch * heads, 1, fmt.head_rows, dim).float()
    step = max(1, _CHUNK_ELEMENTS // max(1, rows.shape[0] * PAGE_TOKENS * dim))
    parts = [_encode(part, head, fmt) for part in rows.split(step, dim=1)]
    return torch.cat(parts, dim=1).reshape(batch, heads, tokens // PAGE_TOKENS, fmt.page_bytes)


def _encode(x: torch.Tensor, head: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    r = _coded(x / head[:, :, 1:] if fmt.centred else x, fmt)
    if fmt.centred:
        r = r - head[:, :, :1]
    bad = ~torch.isfinite(r).all(-1, keepdim=True)
    r = r.masked_fill(bad, 0.0)
    page = torch.zeros(*r.shape[:2], fmt.page_bytes, dtype=torch.uint8, device=x.device)
    if fmt.centred:
        mean = _finite_mean(r.masked_fill(bad, float("nan")))
        step = mean.abs().amax(-1, keepdim=True) / CENTRE_LIMIT
        code = torch.round(mean / step).nan_to_num(0.0, 0.0, 0.0)
        r = r - (code * step).unsqueeze(-2)
        page[..., 4:8] = _recast(step, torch.uint8)
        nibbles = pack_plane((code + CENTRE_ZERO).to(torch.uint8), 4)
        page[..., fmt.centre_offset : fmt.centre_offset + fmt.head_dim // 2] = nibbles
    r = r.masked_fill(bad, 0.0)

    # |r| by way of its largest coordinate, so that squares neither overflow nor vanish.
    peak = r.abs().amax(-1, keepdim=True)
    unit = r / peak.clamp_min(torch.finfo(torch.float32).tiny)
    scale = peak * unit.square().mean(-1, keepdim=True).sqrt()
    base = scale.amax(-2, keepdim=True)
    scale = _scale_of(_scale_code(scale, base), base)
    best = None
    for steps in SCALE_SEARCH if fmt.bits <= SCALE_SEARCH_BITS else (0,):
        divisor = (scale * 2.0 ** (steps / SCALE_STEPS)).clamp_min(torch.finfo(torch.float32).tiny)
        tried = torch.bucketize(r / divisor, fmt.boundaries(x.device), out_int32=True)
        level = fmt.levels(x.device)[tried]
        product, square = (unit * level).sum(-1, keepdim=True), level.square().sum(-1, keepdim=True)
        # The squared error that the scale of least squares leaves is |r|^2 - fit.
        fit = product.square() / square
        if best is None:
            best, codes, factor = fit, tried, product / square
        else:
            better = fit > best
            best, codes = torch.where(better, fit, best), torch.where(better, tried, codes)
            factor = torch.where(better, product / square, factor)
    scale = (peak * factor).clamp_min(0.0)
    base = scale.amax(-2, keepdim=True)
    scale_code = _scale_code(scale, base).masked_fill(bad, SCALE_NAN)

    page[..., 0:4] = _recast(base.flatten(-2), torch.uint8)
    page[..., fmt.scales_offset : fmt.scales_offset + PAGE_TOKENS] = scale_code.squeeze(-1)
    codes = codes.to(torch.uint8)
    for width, shift, offset in fmt.planes:
        plane = pack_plane((codes >> shift) & (2**width - 1), width).flatten(-2)
        page[..., offset : offset + plane.shape[-1]] = plane
    return page


def decode_pages(pages: torch.Tensor, head: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """Decode pages, uint8 [batch, heads, n, page_bytes], to float32 [batch, heads, n * 32, head_dim], *rotated*.

    The caller goes on with `decoded`, or rotates the query instead. `head` is that of `encode_pages`.
    """
    y = decode_levels(pages, fmt) * token_scales(pages, fmt).unsqueeze(-1)
    if fmt.centred:
        step = _recast(pages[..., 4:8], torch.float32)
        code = unpack_plane(pages[..., fmt.centre_offset : fmt.centre_offset + fmt.head_dim // 2], 4).float()
        y = y + ((code - CENTRE_ZERO) * step).unsqueeze(-2) + head[:, :, :1].float().unsqueeze(3)
    return y.flatten(2, 3)


def decode_levels(pages: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """Levels of the codes of pages, without their scales: float32 [batch, heads, n, 32, head_dim], *rotated*."""
    codes = torch.zeros(*pages.shape[:-1], PAGE_TOKENS, fmt.head_dim, dtype=torch.uint8, device=pages.device)
    for width, shift, offset in fmt.planes:
        plane = pages[..., offset : offset + PAGE_TOKENS * fmt.head_dim * width // 8]
        codes = codes | (unpack_plane(plane.unflatten(-1, (PAGE_TOKENS, -1)), width) << shift)
    return fmt.levels(pages.device)[codes.int()]


def token_scales(pages: torch.Tensor, fmt: PackedFormat) -> torch.Tensor:
    """Scale of each packed token, float32 [batch, heads, n, 32]."""
    base = _recast(pages[..., 0:4], torch.float32)
    return _scale_of(pages[..., fmt.scales_offset : fmt.scales_offset + PAGE_TOKENS], base)


def _recast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same bytes as another type; `contiguous` would leave the odd strides of a tensor without elements."""
    return x.clone(memory_format=torch.contiguous_format).view(dtype)


def _finite_mean(y: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens (dim -2) that hold no NaN or infinity; 0 where none is left."""
    good = torch.isfinite(y).all(-1, keepdim=True)
    count = good.sum(-2).clamp_min(1)
    return (y.masked_fill(~good, 0.0) / count.unsqueeze(-2)).sum(-2)


def _scale_code(scale: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    ratio = torch.where(base > 0, scale / base, 0.0)
    code = torch.round(-SCALE_STEPS * torch.log2(ratio)).clamp(0, SCALE_NAN - 1)
    return torch.where(ratio > 0, code, SCALE_ZERO).to(torch.uint8)


def _scale_of(code: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return scale_table(str(code.device))[code.int()] * base
