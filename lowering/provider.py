"""What a provider is: the kernels of one platform as a value, with what they can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from tqc.format import PackedFormat
from tqc.lowering.grouped import Grouped


class Unavailable(RuntimeError):
    """Why a provider's kernels cannot be had on this machine, which shows only when they are asked for."""


@dataclass(frozen=True)
class Provider:
    """Kernels for one platform. A file or folder of `tqc.lowering` with a `PROVIDER` is found by `tqc.lowering.select`.

    Attributes:
        name: what options and `tqc.explain` call it.
        rank: which one "auto" prefers, the lowest first.
        supports: `(k_fmt, v_fmt, dtype, device_type)` -> why it cannot take these, or None; from metadata alone, so it
            builds nothing and imports nothing heavy.
        load: gives the kernels, built or imported at the first call: an object with `append`, `read` and `attend` as in
            `tqc.ops.planes`, same arguments, same results.

            Raises: `Unavailable`, if they cannot be had.
        folded: whether they take folded formats.
        grouped: whether `attend`, `append` where no group leaves the window, and chains take formats with groups; the
            rest is `tqc.lowering.grouped`.
        pairs: whether there is `append_pair(k_pages, k_dense, k_state, key, v_pages, v_dense, v_state, value, start,
            k_spec, v_spec)`, which appends keys and values in one launch.
        chains: whether there are `make_chain`, `run_chain` and `chain_seconds`, by which layers run in one call (see
            `tqc.execute.chains`).
        waits_for_device: whether a call looks at the state of a cache on the host; such calls cannot be recorded.
    """

    name: str
    rank: int
    supports: Callable[[PackedFormat, PackedFormat, torch.dtype, str], str | None]
    load: Callable[[], Any]
    folded: bool = False
    grouped: bool = False
    pairs: bool = False
    chains: bool = False
    waits_for_device: bool = True

    @cached_property
    def kernels(self) -> Any:
        return self.load()

    @cached_property
    def for_groups(self) -> Provider:
        """The same for formats with groups."""
        if not self.grouped:
            return self
        return replace(self, load=lambda: Grouped(self.kernels), pairs=False)

    def unavailable(self) -> str | None:
        """Why its kernels cannot be had here, or None. May build them."""
        try:
            self.load()
        except Unavailable as error:
            return str(error)
        return None
