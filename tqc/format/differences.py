"""States that follow each other, coded as what the ones before do not tell: `delta` and `delta2`, in a closed loop.

A state is predicted from what a *reader* has of the earlier ones, never from these themselves, and only what the
prediction misses is coded. So errors do not add up, and what is stored is all that a reader needs. Each page chooses
its prediction, by the smaller rest: none, the last state, or the last one moved on as it moved before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tqc.format.packed import PAGE_TOKENS, PackedFormat
from tqc.format.quantizer import decode_pages, decoded, encode_pages

# Weights of the last states, newest first, in the prediction of each order.
PREDICTIONS: tuple[tuple[float, ...], ...] = ((), (1.0,), (2.0, -1.0))


@dataclass(frozen=True)
class Difference:
    """A state as it is stored.

    Attributes:
        pages: of what the prediction misses, uint8 [batch, heads, n, page_bytes].
        orders: of each page's prediction, uint8 [batch, heads, n].
    """

    pages: Tensor
    orders: Tensor

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + self.orders.nbytes


@dataclass(frozen=True)
class Differences:
    """Writes and reads a sequence of states [batch, heads, n * 32, head_dim]. Both sides hold the last `order` states
    that were read, newest first.

    Attributes:
        fmt: plain (not centred).
        order: of the best prediction that pages may choose: 0, 1 (delta) or 2 (delta2).
    """

    fmt: PackedFormat
    order: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.order < len(PREDICTIONS):
            raise ValueError(f"order must be 0 to {len(PREDICTIONS) - 1}, got {self.order!r}")
        if self.fmt.centred or self.fmt.groups:
            raise ValueError(f"fmt must be plain, got {self.fmt}")

    def write(self, state: Tensor, read: Sequence[Tensor] = ()) -> Difference:
        """Code a state.

        Args:
            read: what `read` made of the states before, newest first.

        Raises:
            ValueError: if the state has another shape than those before, or no whole pages.
        """
        if state.shape[-2] % PAGE_TOKENS or any(before.shape != state.shape for before in read):
            raise ValueError(
                f"state must have a multiple of {PAGE_TOKENS} tokens and the shape of those before; got "
                f"{[*state.shape]} behind {[list(before.shape) for before in read]}"
            )
        rests = torch.stack([state.float() - guess for guess in self._predictions(state, read)])
        sizes = rests.unflatten(-2, (-1, PAGE_TOKENS)).square().sum((-1, -2))
        orders = sizes.nan_to_num(torch.inf).argmin(0)
        return Difference(encode_pages(_chosen(rests, orders), state[:, :, :0], self.fmt), orders.to(torch.uint8))

    def read(self, stored: Difference, read: Sequence[Tensor] = ()) -> Tensor:
        """The state that `write` stored, float32, from what was read of those before."""
        none = stored.pages.new_empty(*stored.pages.shape[:2], 0, self.fmt.head_dim, dtype=torch.float32)
        rest = decoded(decode_pages(stored.pages, none, self.fmt), none, self.fmt)
        return rest + _chosen(torch.stack(self._predictions(rest, read)), stored.orders.long())

    def _predictions(self, like: Tensor, read: Sequence[Tensor]) -> list[Tensor]:
        """By order, as many as there are states for, float32."""
        found = [torch.zeros_like(like, dtype=torch.float32)]
        for weights in PREDICTIONS[1 : 1 + min(self.order, len(read))]:
            found.append(sum((w * x.float() for w, x in zip(weights, read, strict=False)), found[0]))
        return found


def _chosen(states: Tensor, orders: Tensor) -> Tensor:
    """Of `states` [order, batch, heads, n * 32, head_dim] each page that of its order [batch, heads, n]."""
    index = orders.repeat_interleave(PAGE_TOKENS, dim=-1)[None, ..., None].expand(1, *states.shape[1:])
    return states.gather(0, index)[0]
