"""How big tiles and launches are: a small table per architecture, and defaults where nothing was measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from tqc.format import PAGE_TOKENS, PackedFormat

TABLE = Path(__file__).with_name("tuned.json")
# Architectures with 99 KB of shared memory to a program, where others have 163 or more.
SMALL_SHARED_MEMORY = ("sm_86", "sm_89", "sm_120", "sm_121")
# More shares than this cost more in joining them than they bring.
MAX_SHARES = 128


@dataclass(frozen=True)
class Launch:
    """How a launch of the attention kernel is shaped.

    Attributes:
        tile: packed tokens decoded at once, a multiple of 32.
        dense_tile: dense tokens taken at once.
        rows: query rows of a program.
        num_warps, num_stages: as Triton has them; a tile is fetched num_stages - 1 tiles ahead.
        programs_per_sm: how many programs the number of shares aims at.
        maxnreg: registers a thread may have, None for as many as the compiler likes: fewer make room for more warps.
    """

    tile: int
    dense_tile: int
    rows: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 2
    maxnreg: int | None = None


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 1 for other devices."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def architecture(device: torch.device) -> str:
    """As "sm_90"; "interpreter" for devices other than CUDA."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "interpreter"


@cache
def _table() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


@cache
def choose(arch: str, rows: int, k_fmt: PackedFormat, v_fmt: PackedFormat, exact: bool) -> Launch:
    """The launch for `rows` query rows to a key/value head (those of all its query heads).

    The table's keys are as "decode d128 k4v2" and "prefill d128 k4v2" (`exact` is never in it); its values are fields
    of `Launch`.
    """
    kind = "prefill" if rows > 64 else "decode"
    width = max(k_fmt.head_dim, v_fmt.head_dim)
    small = arch in SMALL_SHARED_MEMORY
    narrow = max(k_fmt.bits, v_fmt.bits) <= 4
    padded = any(fmt.head_dim & (fmt.head_dim - 1) for fmt in (k_fmt, v_fmt))
    # What registers hold without spilling, as benchmarks/gpu/compile_table.py finds it. Hopper's products read the
    # queries from shared memory.
    if exact:
        most = 8
    elif arch == "sm_90":
        most = 64 if width <= 64 else 32 if width <= 128 or narrow else 16
    elif width > 128:
        most = 16 if narrow else 8
    else:
        most = 16 if padded or width > 64 and not narrow else 32
    block = next(block for block in (8, 16, 32, 64) if block >= min(rows, most))
    # Registers bound the tile, whose levels they hold; wide codes take more of them on the way. Shared memory bounds
    # the dense tile, which is not packed.
    if exact or not narrow and width > 128 and arch.startswith("sm_8"):
        tile = 32
    else:
        tile = 128 if narrow and block == 8 and not (small and width > 128) else 64
    # Three programs of four warps to a multiprocessor where two would fit.
    three = not exact and narrow and not padded and block == 8 and width <= 128
    default = Launch(
        tile=tile,
        dense_tile=16 if exact or width > 128 or block > 16 else 32,
        rows=block,
        num_warps=8 if block == 64 or width > 128 or exact and padded else 4,
        num_stages=1 if exact and width > 128 else 2 if exact or width > 128 or small else 3,
        programs_per_sm=3 if three else 2,
        maxnreg=168 if three else None,
    )
    key = f"{kind} d{k_fmt.head_dim} k{k_fmt.bits}v{v_fmt.bits}"
    tuned = {} if exact else _table().get(arch, {}).get(key, {})
    return Launch(**{**default.__dict__, **tuned})


def shares(launch: Launch, device: torch.device, programs: int, capacity: int) -> int:
    """Into how many shares the packed tokens of each row block are split, one more counted for the dense tokens.

    Args:
        programs: blocks of rows times batch times heads.
        capacity: tokens that the pages can hold: what is stored only the device knows.
    """
    wanted = launch.programs_per_sm * multiprocessors(device) // programs
    most = capacity // max(4 * launch.tile, 8 * PAGE_TOKENS)
    split = min(wanted, most, MAX_SHARES - 1)
    return split + 1 if split > 1 else 1
