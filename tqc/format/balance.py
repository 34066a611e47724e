"""The balance of a layer's keys: how large each channel is when keys are coded.

Keys K / s and queries Q * s have the same products for any positive s. The rotation spreads the coding error of a key
evenly over the channels, so the score of query i and key j (less the mean of keys) errs, with D the error of a
coordinate of unit variance, by

    D sum_c q_ic^2 s_c^2 * sum_c k_jc^2 / s_c^2 / head_dim      on average, squared

By the Cauchy-Schwarz inequality the mean over pairs of independent q and k is least where s_c^2 = rms(k_c) / rms(q_c),
up to a factor for all channels: s_c = exp(l_c), l_c a quarter of the logarithm of E[k_c^2] / E[q_c^2].

Which pairs count: an error of the score moves the softmax by w_ij (1 - w_ij), w the attention's weights. Heads that
look sharply at few keys are those that lose most, and means over all pairs say nothing of those keys. So half of the
weight goes to pairs by w (1 - w) and half to all pairs alike, which holds where later queries look elsewhere.

Moments of few rows are noisy, and what looks like gain there is loss later. The logarithm of a mean square over n
normal rows has the variance trigamma(n / 2), so l_c, less its median over the channels, counts only by what it exceeds
two standard errors. Channels that stand out keep most of theirs, channels that are alike get 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tqc.format.quantizer import without_autocast

# At most about so many rows are looked at, spread over those given; fewer queries where there are so many heads and
# sequences that their scores would take more than this.
SAMPLED_KEYS = 1024
SAMPLED_QUERIES = 256
MOST_SCORES = 1 << 24
# A mean square counts as at least this part of the head's median: a channel that hardly varies so far may do so later.
# Keys are held tighter, for many more of them come.
LEAST_OF_KEYS = 1e-3
LEAST_OF_QUERIES = 1e-8
LARGEST = 1024.0
STANDARD_ERRORS = 2.0
TINY = 1e-30


@without_autocast
def balance(keys: Tensor, query: Tensor) -> Tensor:
    """Balance s of the channels of each head.

    Args:
        keys: [batch, heads, n, head_dim], any float dtype, n >= 1: the tokens that are packed first, as they come
            (behind the rotary embedding); a prefill's are best given whole.
        query: [batch, query_heads, rows, head_dim], rows >= 1, queries of the same call; query head h reads the keys
            of head h // (query_heads // heads).

    Returns:
        [batch, heads, head_dim] in keys' dtype, between 1 / 1024 and 1024 with the median 1; ones in heads for which
        there is nothing to go by. Rows that are zeros or hold a NaN or an infinity are ignored.
    """
    k, key_good, key_peak = _usable(_spread(keys, SAMPLED_KEYS))
    most = MOST_SCORES // max(1, query.shape[0] * query.shape[1] * k.shape[2])
    grouped = _spread(query, min(SAMPLED_QUERIES, max(1, most))).unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    q, query_good, query_peak = _usable(grouped)
    k = (k - k.sum(2, keepdim=True) / key_good.sum(2, keepdim=True).clamp_min(1)) * key_good
    q_good, k_good = query_good.squeeze(-1).float(), key_good.squeeze(-1).float()
    factor = (keys.shape[-1] ** -0.5 * query_peak * key_peak).clamp(max=1e30)
    hidden = torch.where(key_good, 0.0, -1e35).transpose(-1, -2)
    scores = torch.baddbmm(hidden.flatten(0, 1), (q * factor).flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    weights = scores.softmax(-1)
    sharp = weights.addcmul_(weights, weights, value=-1).unflatten(0, k.shape[:2])
    some = k_good.amax(2, keepdim=True)
    key_mass, query_mass = (
        _share(of_sharp * good) + _share(good * others.amax(2, keepdim=True))
        for of_sharp, good, others in (
            ((q_good.unsqueeze(2) @ sharp).squeeze(2) * some, k_good, q_good),
            (sharp.sum(3) * some, q_good, k_good),
        )
    )
    key_square, key_variance = _moments(k, key_mass, LEAST_OF_KEYS)
    query_square, query_variance = _moments(q, query_mass, LEAST_OF_QUERIES)
    log_s = (key_square / query_square).log() / 4
    log_s = log_s - log_s.median(-1, keepdim=True).values
    error = STANDARD_ERRORS * (key_variance + query_variance).sqrt() / 4
    return (log_s.sign() * (log_s.abs() - error).clamp(0.0, math.log(LARGEST))).exp().to(keys.dtype)


def _spread(x: Tensor, count: int) -> Tensor:
    return x[:, :, :: max(1, x.shape[2] // count)]


def _share(x: Tensor) -> Tensor:
    return x / x.sum(2, keepdim=True).clamp_min(TINY)


def _usable(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 rows over the largest number of their head, zeros where ignored; which are not; that number."""
    x = x.float()
    good = x.isfinite().all(-1, keepdim=True) & (x != 0).any(-1, keepdim=True)
    x = x.masked_fill(~good, 0.0)
    peak = x.abs().amax((2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return x / peak, good, peak


def _moments(x: Tensor, mass: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Mean squares of the channels of x [batch, heads, rows, head_dim] with weights mass [batch, heads, rows].

    Returns:
        (float32 [batch, heads, head_dim], up to a factor for each head and at least `least` of their median;
        variance of their logarithms, [batch, heads, 1], infinite where there is nothing to go by).
    """
    square = (mass.unsqueeze(-1) * x.square()).sum(2)
    middle = square.median(-1, keepdim=True).values
    known = middle > TINY
    square = torch.where(known, square.clamp_min(least * middle), 1.0)
    rows = mass.sum(-1, keepdim=True).square() / mass.square().sum(-1, keepdim=True).clamp_min(TINY)
    return square, torch.special.polygamma(1, torch.where(known, rows, 0.0) / 2)
