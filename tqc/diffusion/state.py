"""What attention gave, kept from one call of a transformer to the next, dense or packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.format.quantizer import decode_pages, decoded, encode_pages

STATE_BITS = (8, 4, 2)


@dataclass(frozen=True)
class PackedState:
    """A state [batch, n, heads, head_dim] of which all whole pages of 32 tokens are packed, and the rest is dense.

    Attributes:
        pages: uint8 [batch, heads, n // 32, page_bytes].
        rest: the last n % 32 tokens as they came.
    """

    fmt: PackedFormat
    pages: Tensor
    rest: Tensor

    @classmethod
    def of(cls, state: Tensor, bits: int) -> PackedState:
        fmt = PackedFormat(state.shape[-1], bits, centred=False)
        whole = state.shape[1] // PAGE_TOKENS * PAGE_TOKENS
        rows = state[:, :whole].transpose(1, 2)
        return cls(fmt, encode_pages(rows, rows[:, :, :0], fmt), state[:, whole:].clone())

    def read(self) -> Tensor:
        head = self.rest[:, :0].transpose(1, 2)
        rows = decoded(decode_pages(self.pages, head, self.fmt), head, self.fmt)
        return torch.cat([rows.transpose(1, 2).to(self.rest.dtype), self.rest], 1)

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes + self.rest.nbytes


@dataclass(frozen=True)
class Scope:
    """The call of a pipeline that a generation belongs to.

    Attributes:
        guided: whether a batch holds both branches of the guidance.
        timesteps: those of the pipeline's scheduler; None if it has none.
    """

    guided: Callable[[], bool]
    timesteps: Callable[[], Tensor | None]


@dataclass
class Generation:
    """What one generation keeps: by guidance branch and attention site, and where it stands.

    Attributes:
        scope: the pipeline's call that began it, and ends it; None where a transformer is called by itself.
        step: of the transformer's last call.
        called: the branches that were called in this step, in order.
        filled: by branch, the layers whose state the next step may read.
    """

    scope: Scope | None = None
    bits: int | None = None
    step: int = -1
    timestep: float | None = None
    like: tuple[object, ...] | None = None
    called: list[str] = field(default_factory=list)
    filled: dict[str, set[int]] = field(default_factory=dict)
    held: dict[str, dict[tuple[int, str], Tensor | PackedState]] = field(default_factory=dict)

    def clear(self) -> None:
        """Back to where nothing was called."""
        self.step, self.timestep, self.like = -1, None, None
        self.called, self.filled, self.held = [], {}, {}

    def keep(self, branch: str, site: tuple[int, str], state: Tensor) -> None:
        packed = self.bits is not None and state.dim() == 4 and state.shape[-1] % 8 == 0
        held = PackedState.of(state.detach(), int(self.bits or 0)) if packed else state.detach()
        self.held.setdefault(branch, {})[site] = held

    def read(self, branch: str, site: tuple[int, str]) -> Tensor:
        held = self.held[branch][site]
        return held.read() if isinstance(held, PackedState) else held

    def take_over(self, branch: str, other: str, site: tuple[int, str]) -> None:
        """The same state for both branches, in one place."""
        self.held.setdefault(branch, {})[site] = self.held[other][site]

    def drop(self, branch: str, layers: set[int]) -> None:
        held = self.held.get(branch, {})
        for site in [site for site in held if site[0] in layers]:
            del held[site]

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is held, once where two branches share it."""
        return sum({id(held): held.nbytes for of_branch in self.held.values() for held in of_branch.values()}.values())
