"""Formats with groups by kernels that attend to them as they lie: groups are sorted and their pages encoded here, in
torch, once in as many steps as a group has tokens; all other steps are the kernels' alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.ops import planes


class Grouped:
    """The functions of `tqc.ops.planes` for formats with groups; what is not here is the kernels' own.

    Args:
        kernels: a provider's.
    """

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)

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
        if score is None and start is None:
            self.kernels.append(pages, dense, state, new, start, spec)
        else:
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

    def attend(self, *args: Any) -> tuple[Tensor, Tensor]:
        """As `attend` of `tqc.ops.planes`, whose arguments it takes by position. A part of a cache, or one with a gap
        behind it, is the reference's."""
        k_state, start = args[3], args[11]
        if start is not None and int(start.flatten()[0]) != int(k_state[0]):
            return planes.attend(*args)
        return self.kernels.attend(*args)
