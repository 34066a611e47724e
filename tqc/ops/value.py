"""What nodes of a graph hold: the type of a packed cache, and its planes where the reference runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from tqc.format import PackedFormat
from tqc.torch_private import EXAMPLE_VALUE


@dataclass(frozen=True)
class PackedValue:
    """Type of a packed cache, for every target: what a node that makes one has as its example.

    Attributes:
        fmt: how it is packed.
        batch, heads: sizes, ints or symbolic.
        length: how many tokens it has, or can have where it is preallocated; an int or symbolic.
        dtype, device: of the dense tensor that it stands for.
    """

    fmt: PackedFormat
    batch: Any
    heads: Any
    length: Any
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.batch, self.heads, self.length, self.fmt.head_dim))

    def size(self, dim: int) -> Any:
        return self.shape[dim]

    def dim(self) -> int:
        return 4

    def is_floating_point(self) -> bool:
        return True

    def empty(self) -> Tensor:
        """A dense tensor of the same type, without memory where a fake mode is on."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def longer(self, by: Any) -> PackedValue:
        return replace(self, length=self.fmt.held_tokens(self.length + by))

    def __str__(self) -> str:
        return f"packed{list(self.shape)} {str(self.dtype).removeprefix('torch.')} {self.device} {self.fmt}"


# What an example may be where a node holds keys or values.
TENSORS = (Tensor, PackedValue)


@dataclass(frozen=True)
class Planes:
    """A packed cache as the reference and the traceable forms see it: immutable (see `tqc.format` for the parts).

    Attributes:
        pages: uint8 [batch, heads, num_pages, block_bytes].
        dense: [batch, heads, rows, head_dim].
        state: int64 [3], (tokens that came, of which packed, the first that is held).
        fmt: how they are packed.
        length: how many tokens the cache holds, or can hold where it is preallocated. Fewer than it does: a prefix.
    """

    pages: Tensor
    dense: Tensor
    state: Tensor
    fmt: PackedFormat
    length: int

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.pages, self.dense, self.state

    def copy(self, tokens: int = 0) -> Planes:
        """Memory of its own, with room for `tokens` tokens in all, dropped ones included."""
        missing = self.fmt.pages_for(tokens) - self.pages.shape[2]
        pages = torch.nn.functional.pad(self.pages, (0, 0, 0, max(0, missing)))
        batch, heads, rows, _ = self.dense.shape
        wanted = max(rows, self.fmt.rows_for(tokens))
        dense = self.fmt.empty_dense(batch, heads, wanted, self.dense.dtype, self.dense.device)
        dense[:, :, :rows] = self.dense
        return replace(self, pages=pages.clone(), dense=dense, state=self.state.clone())

    @property
    def end(self) -> int:
        """Position behind the last token."""
        return int(self.state[2]) + self.length

    @staticmethod
    def empty(batch: int, heads: int, fmt: PackedFormat, dtype: torch.dtype, device: Any, tokens: int) -> Planes:
        """No tokens, and pages for `tokens` of them."""
        pages = torch.zeros(batch, heads, fmt.pages_for(tokens), fmt.block_bytes, dtype=torch.uint8, device=device)
        dense = fmt.empty_dense(batch, heads, fmt.rows_for(tokens), dtype, device)
        state = torch.zeros(3, dtype=torch.int64, device=device)
        return Planes(pages, dense, state, fmt, fmt.held_tokens(tokens))


def example(node: Any) -> Any:
    """Example of what a node holds (a fake tensor, a symbolic int, a `PackedValue`), or the constant itself."""
    return node.meta.get(EXAMPLE_VALUE) if isinstance(node, Node) else node


def set_example(node: Node, held: Any) -> None:
    """Record the example that later passes, `verify` and the target read."""
    node.meta[EXAMPLE_VALUE] = held


def is_packed(node: Any) -> bool:
    return isinstance(example(node), PackedValue)
