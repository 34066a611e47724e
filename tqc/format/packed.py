"""The packed format, version 2: one byte layout for every device and for disk. docs/format.md shows it byte for byte.

One packed tensor of shape [batch, num_key_value_heads, length, head_dim] is held in three tensors:

- `pages`, uint8 [batch, heads, num_pages, page_bytes]: the packed tokens, 32 to a page;
- `dense`, model dtype [batch, heads, rows, head_dim]: the first `sink_tokens` tokens, a ring of the `residual_window`
  most recent ones, both as they came (not rotated, unless the format is `folded`), and in centred formats the head's
  centre and balance. While nothing was packed there may be fewer rows, those of the tokens alone;
- `state`, int64 [3]: how many tokens came, how many of them were packed, and the first one that is still held.

Token t >= sink_tokens has the packed index u = t - sink_tokens. It lives in page u // 32 if u < packed, else in the
ring at row sink_tokens + u % residual_window. Page p lies at p % num_pages, so that the pages of a sliding window form
a ring; elsewhere there are as many as are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch

from tqc.format import codebook
from tqc.format.groups import PAGE_TOKENS, Groups
from tqc.format.rotation import ROTATIONS, rotation
from tqc.torch_private import no_modes

FORMAT_VERSION = 2
HEADER_BYTES = 16
# Scales are stored as base * 2**(-code / SCALE_STEPS), the two codes above the last one are special.
SCALE_STEPS = 32
SCALE_NAN = 254
SCALE_ZERO = 255
# A page's centre is stored as (code + CENTRE_ZERO), codes -7 to 7, in half a byte.
CENTRE_LIMIT = 7
CENTRE_ZERO = 8
ALIGNMENT = 16
# A rotation is a matrix of head_dim x head_dim.
MAX_HEAD_DIM = 1024
MAX_KEEP = 2**31 - 1


@dataclass(frozen=True)
class PackedFormat:
    """How one cached tensor is packed: everything that its bytes depend on, apart from shape and dtype.

    Attributes:
        head_dim: size of one key or value vector; a multiple of 8, at most 1024.
        bits: width of a code, 1 to 8.
        centred: whether a per-head and per-page mean is taken off before coding (keys).
        sink_tokens: how many tokens at the start stay dense.
        residual_window: how many of the most recent tokens stay dense at most; a multiple of 32. At least
            `residual_window - 31` do.
        rotation: "hadamard" or "haar".
        seed: of the rotation, below 2**64.
        folded: whether the model itself makes the vectors rotated, by weights that the rotation was folded into
            (values): then dense rows hold them so, and packing does not rotate. Only `read` gives them back as the
            model without folding makes them.
        keep: how many of the last tokens are held, those before them being dropped (sliding windows); None for all.
        groups: what becomes of tokens that leave the window together (see `tqc.format.groups`); None where each 32 of
            them become a page of `bits`. With groups, `bits` is that of the first tier.
    """

    head_dim: int
    bits: int
    centred: bool
    sink_tokens: int = 4
    residual_window: int = 64
    rotation: str = "hadamard"
    seed: int = 0
    folded: bool = False
    keep: int | None = None
    groups: Groups | None = None

    def __post_init__(self) -> None:
        if self.head_dim < 8 or self.head_dim % 8:
            raise ValueError(f"head_dim must be a multiple of 8, got {self.head_dim}")
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim must be at most {MAX_HEAD_DIM}, got {self.head_dim}")
        if not 1 <= self.bits <= codebook.MAX_BITS:
            raise ValueError(f"bits must be between 1 and {codebook.MAX_BITS}, got {self.bits}")
        if self.sink_tokens < 0:
            raise ValueError(f"sink_tokens must be at least 0, got {self.sink_tokens}")
        if self.residual_window < PAGE_TOKENS or self.residual_window % PAGE_TOKENS:
            raise ValueError(
                f"residual_window must be a positive multiple of {PAGE_TOKENS}, got {self.residual_window}"
            )
        if self.rotation not in ROTATIONS:
            raise ValueError(f"rotation must be one of {', '.join(ROTATIONS)}; got {self.rotation!r}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be between 0 and 2**64 - 1, got {self.seed}")
        if self.keep is not None and not 1 <= self.keep <= MAX_KEEP:
            raise ValueError(f"keep must be between 1 and {MAX_KEEP}, or None; got {self.keep}")
        if self.groups is not None:
            self._check_groups(self.groups)

    def _check_groups(self, groups: Groups) -> None:
        if self.keep is not None:
            raise ValueError("a sliding window has no groups")
        if self.bits != groups.tiers[0][1]:
            raise ValueError(f"bits must be those of the first tier, {groups.tiers[0][1]}; got {self.bits}")
        least = groups.tokens + max(groups.queries - 1, 0)
        if self.residual_window < least:
            raise ValueError(
                f"residual_window must be at least {least} for groups of {groups.tokens} tokens that are scored by "
                f"{groups.queries} queries behind them; got {self.residual_window}"
            )

    @cached_property
    def spec(self) -> str:
        """Names the format in op calls, compiled graphs and files."""
        return str(self)

    def __str__(self) -> str:
        kind = "centred" if self.centred else "plain"
        return (
            f"tq{FORMAT_VERSION}:d{self.head_dim}:b{self.bits}:{kind}:s{self.sink_tokens}:w{self.residual_window}"
            f":{self.rotation}:{self.seed}{'' if self.keep is None else f':keep{self.keep}'}"
            f"{':folded' if self.folded else ''}{'' if self.groups is None else f':{self.groups}'}"
        )

    @staticmethod
    @cache
    def parse(spec: str) -> PackedFormat:
        """The format that `str` wrote.

        Raises:
            ValueError: if `spec` is malformed or of another version.
        """
        parts = spec.split(":")
        if parts[0] != f"tq{FORMAT_VERSION}":
            raise ValueError(f"spec {spec!r} is not of packed format version {FORMAT_VERSION}")
        try:
            _, d, b, kind, s, w, rot, seed, *rest = parts
            if (d[0], b[0], s[0], w[0]) != ("d", "b", "s", "w") or kind not in ("centred", "plain"):
                raise ValueError
            head_dim, bits, sink_tokens, window, number = (int(text) for text in (d[1:], b[1:], s[1:], w[1:], seed))
            keep = int(rest.pop(0).removeprefix("keep")) if rest and rest[0].startswith("keep") else None
            folded = rest[:1] == ["folded"]
            groups = Groups.parse(rest := rest[folded:])
            if rest:
                raise ValueError
        except (ValueError, IndexError):
            raise ValueError(f"malformed spec {spec!r}") from None
        return PackedFormat(head_dim, bits, kind == "centred", sink_tokens, window, rot, number, folded, keep, groups)

    @cached_property
    def planes(self) -> tuple[tuple[int, int, int], ...]:
        """(width, shift, byte offset in the page) of each bit plane; a code is the sum of plane value << shift."""
        offset, shift, result = self._planes_offset, 0, []
        for width in (8, 4, 2, 1):
            if self.bits & width:
                result.append((width, shift, offset))
                shift += width
                offset = _align(offset + PAGE_TOKENS * self.head_dim * width // 8)
        return tuple(result)

    @cached_property
    def scales_offset(self) -> int:
        return HEADER_BYTES

    @cached_property
    def score_stretch(self) -> float:
        """By how much attention stretches high products of queries and levels (see `tqc.ops.planes.correction`): the
        mean squared error of the codes in a coordinate of unit variance."""
        return codebook.distortion(self.head_dim, self.bits)

    @cached_property
    def centre_offset(self) -> int:
        return HEADER_BYTES + PAGE_TOKENS

    @cached_property
    def _planes_offset(self) -> int:
        return _align(self.centre_offset + (self.head_dim // 2 if self.centred else 0))

    @cached_property
    def page_bytes(self) -> int:
        width, _, offset = self.planes[-1]
        return _align(offset + PAGE_TOKENS * self.head_dim * width // 8)

    @cached_property
    def block_tokens(self) -> int:
        """How many tokens are packed at once, into an entry of `pages`."""
        return PAGE_TOKENS if self.groups is None else self.groups.tokens

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of an entry of `pages`: of a page or, with groups, of what is kept of a group."""
        if self.groups is None:
            return self.page_bytes
        return self.places_offset + self.groups.kept

    @cached_property
    def tiers(self) -> tuple[tuple[PackedFormat, int, int], ...]:
        """Of each tier the format of its pages, how many a block has, and the byte where they begin."""
        if self.groups is None:
            return ((self, 1, 0),)
        found, offset = [], 0
        for pages, bits in self.groups.tiers:
            found.append((replace(self, bits=bits, groups=None), pages, offset))
            offset += pages * found[-1][0].page_bytes
        return tuple(found)

    @cached_property
    def places_offset(self) -> int:
        fmt, pages, offset = self.tiers[-1]
        return offset + pages * fmt.page_bytes

    @cached_property
    def of_least_window(self) -> PackedFormat:
        """The same pages behind the smallest window and without sinks."""
        return replace(self, sink_tokens=0, residual_window=PAGE_TOKENS, groups=None)

    @property
    def evicts(self) -> bool:
        return self.groups is not None and self.groups.evicts

    @cached_property
    def token_rows(self) -> int:
        """Rows of `dense` that hold tokens; the head's centre is behind them, and then its balance."""
        return self.sink_tokens + self.residual_window

    @cached_property
    def head_rows(self) -> int:
        return 2 if self.centred else 0

    def head(self, dense: torch.Tensor) -> torch.Tensor:
        """The rows of `dense` with the centre and the balance of each head, [batch, heads, head_rows, head_dim]."""
        return dense[:, :, self.token_rows : self.token_rows + self.head_rows]

    @cached_property
    def score_rows(self) -> int:
        """Rows of `dense` that the scorer of groups needs, behind all others; zeros at first."""
        return self.groups.rows if self.groups else 0

    @cached_property
    def dense_rows(self) -> int:
        """Rows of `dense` as soon as something is packed."""
        return self.token_rows + self.head_rows + self.score_rows

    @cached_property
    def ring_pages(self) -> int | None:
        """Pages that hold a sliding window, with spare ones so that up to 32 new tokens overwrite nothing that the
        tokens before them need; None where all tokens are kept."""
        if self.keep is None:
            return None
        return max(1, -(-(self.keep - self.residual_window + 2 * PAGE_TOKENS) // PAGE_TOKENS))

    def empty_dense(
        self, batch: int, heads: int, rows: int, dtype: torch.dtype, device: torch.device | str
    ) -> torch.Tensor:
        """`dense` of a cache without tokens, [batch, heads, rows, head_dim]; the balance, if it has the row, is one."""
        zeros = torch.zeros(batch, heads, rows, self.head_dim, dtype=dtype, device=device)
        if not self.centred or rows < self.token_rows + self.head_rows:
            return zeros
        before, one, behind = zeros.tensor_split((self.token_rows + 1, self.token_rows + 2), dim=2)
        return torch.cat([before, one + 1, behind], dim=2)

    def rows_for(self, tokens: int) -> int:
        """How many rows of `dense` `tokens` tokens need."""
        return tokens if tokens <= self.token_rows and not self.score_rows else self.dense_rows

    def packed_tokens(self, length: int, already: int = 0) -> int:
        """How many of `length` tokens are packed (not dense), whole blocks of them, never fewer than `already`."""
        return max(already, -(-(length - self.token_rows) // self.block_tokens) * self.block_tokens, 0)

    def pages_for(self, tokens: int, already: int = 0) -> int:
        """How many entries of `pages` `tokens` tokens need."""
        pages = self.packed_tokens(tokens, already) // self.block_tokens
        return pages if self.ring_pages is None else min(pages, self.ring_pages)

    def held_tokens(self, tokens: Any) -> Any:
        """How many of `tokens` tokens, a number or a symbolic one, are held."""
        return tokens if self.keep is None else torch.sym_min(tokens, self.keep)

    def first_held(self, length: int, begin: int = 0) -> int:
        """The first token that is held when there are `length`, none before `begin` being held any more."""
        return begin if self.keep is None else max(begin, length - self.keep)

    def levels(self, device: torch.device | str = "cpu") -> torch.Tensor:
        return _on_device(codebook.levels, (self.head_dim, self.bits), str(device))

    def boundaries(self, device: torch.device | str = "cpu") -> torch.Tensor:
        return _on_device(codebook.boundaries, (self.head_dim, self.bits), str(device))

    def rotation_matrix(self, device: torch.device | str = "cpu") -> torch.Tensor:
        return _on_device(rotation, (self.head_dim, self.rotation, self.seed), str(device))


def scale_table(device: str = "cpu") -> torch.Tensor:
    """Factor of each scale code, float32 [256]: 2**(-code / 32), then NaN and 0 for the two special codes."""
    return _on_device(_scale_table, (), device)


@cache
def _on_device(table, args, device: str) -> torch.Tensor:
    # A table stays for good, so it must hold numbers even if the first to ask is a trace, whose tensors hold none.
    with torch.DisableTorchFunction(), no_modes():
        return table(*args).to(device)


def _scale_table() -> torch.Tensor:
    table = torch.exp2(-torch.arange(256, dtype=torch.float64) / SCALE_STEPS).float()
    table[SCALE_NAN] = float("nan")
    table[SCALE_ZERO] = 0.0
    return table


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def pack_plane(values: torch.Tensor, width: int) -> torch.Tensor:
    """Pack `values`, uint8 [..., head_dim] below 2**width, into bytes, uint8 [..., head_dim * width // 8].

    With n = 8 // width fields in a byte and stride = head_dim // n, element e is field e // stride of byte e % stride,
    lowest bits first: no value spans two bytes and unpacking is a shift and a mask.
    """
    fields = 8 // width
    split = values.unflatten(-1, (fields, values.shape[-1] // fields))
    packed = torch.zeros_like(split[..., 0, :])
    for field in range(fields):
        packed = packed | (split[..., field, :] << (field * width))
    return packed


def unpack_plane(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Inverse of `pack_plane`: uint8 [..., head_dim]."""
    mask = 2**width - 1
    return torch.cat([(packed >> (field * width)) & mask for field in range(8 // width)], dim=-1)
