"""The balance of a layer's keys: how large each channel is when keys are coded.

Keys K / s and queries Q * s have the same products for any positive s. The rotation spreads the coding error of a key
evenly over the channels, so for queries q and keys k, less their mean m, a score errs by

    D sum_c E[q_c^2] s_c^2 * sum_c E[(k_c - m_c)^2] / s_c^2 / head_dim      on average, D: that of a coordinate of
                                                                            variance 1
By the Cauchy-Schwarz inequality this is least where s_c^2 = std(k_c) / rms(q_c), up to a factor for all channels. So
s_c = exp(l_c), l_c a quarter of the logarithm of E[(k_c - m_c)^2] / E[q_c^2].

Moments of few rows are noisy, and what looks like gain there is loss later. The logarithm of a mean square over n
normal rows has the variance trigamma(n / 2); so l_c, less its median over the channels, counts only by what it exceeds
two standard errors. Then channels that are alike lose 1 % with 32 keys and 3 queries and a third with one query, not
29 % and 6 times that much, while channels that stand out keep most of theirs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tqc.format.quantizer import without_autocast

# At most about this many rows are looked at, spread over those given.
SAMPLED_ROWS = 2048
# A mean square counts as at least this part of the head's median: a channel that hardly varies so far may do so later.
# Keys are held tighter, for many more of them come.
LEAST_OF_KEYS = 1e-3
LEAST_OF_QUERIES = 1e-8
LARGEST = 1024.0
STANDARD_ERRORS = 2.0


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
    rows = _spread(query).unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    key_square, key_variance = _moments(_spread(keys), LEAST_OF_KEYS, centred=True)
    query_square, query_variance = _moments(rows, LEAST_OF_QUERIES, centred=False)
    log_s = (key_square / query_square).log() / 4
    log_s = log_s - log_s.median(-1, keepdim=True).values
    error = (key_variance + query_variance).sqrt() / 4
    return (log_s.sign() * (log_s.abs() - STANDARD_ERRORS * error).clamp(0.0, math.log(LARGEST))).exp().to(keys.dtype)


def _spread(x: Tensor) -> Tensor:
    return x[:, :, :: max(1, x.shape[2] // SAMPLED_ROWS)]


def _moments(x: Tensor, least: float, centred: bool) -> tuple[Tensor, Tensor]:
    """Mean squares of the channels of x [batch, heads, rows, head_dim], if centred less the mean of the rows.

    Returns:
        (float32 [batch, heads, head_dim], up to a factor for each head and at least `least` of their median;
        variance of their logarithms, [batch, heads, 1], infinite where there is nothing to go by).
    """
    x = x.float()
    good = x.isfinite().all(-1, keepdim=True) & (x != 0).any(-1, keepdim=True)
    x = x.masked_fill(~good, 0.0)
    x = x / x.abs().amax((2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    rows = good.sum(2)
    if centred:
        x = (x - (x.sum(2) / rows.clamp_min(1)).unsqueeze(2)).masked_fill(~good, 0.0)
    square = x.square().mean(2)
    middle = square.median(-1, keepdim=True).values
    known = middle > 1e-30
    square = torch.where(known, square.clamp_min(least * middle), 1.0)
    return square, torch.special.polygamma(1, torch.where(known, rows, 0) / 2)
