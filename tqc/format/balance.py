"""By how much the channels of keys are scaled before they are coded."""

from __future__ import annotations

from torch import Tensor


def channel_balance(keys: Tensor, query: Tensor) -> Tensor:
    return keys.new_ones(keys.shape[0], keys.shape[1], keys.shape[3])
