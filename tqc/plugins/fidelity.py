"""Fidelity: packed attention beside the exact one, in one head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tqc.plugins.monitor import Moment, Monitor


@dataclass(frozen=True)
class Fidelity(Monitor):
    """Relative error of the head's attention. What coding does to a cache is steady; a fault (a damaged page, a wrong
    kernel) shows as an error of `factor` times the median of the `recent` looks before, and at least `floor`."""

    name: ClassVar[str] = "fidelity"
    columns: ClassVar[tuple[str, ...]] = ("error",)

    factor: float = 4.0
    floor: float = 0.2
    recent: int = 16

    def check(self) -> None:
        super().check()
        self.require("factor", self.factor > 1, "above 1")
        self.require("floor", self.floor > 0, "above 0")
        self.require("recent", self.recent >= 1, "1 or more looks")

    def observe(self, moment: Moment, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        exact = moment.weights() @ moment.values
        error = (moment.output - exact).norm() / exact.norm().clamp_min(1e-20)
        return error[None], state

    def judge(self, record: Tensor) -> str | None:
        errors = record[:, 0]
        for look, error in enumerate(errors.tolist()):
            before = errors[max(0, look - self.recent) : look]
            usual = float(before.median()) if len(before) else 0.0
            if not error <= max(self.floor, self.factor * usual):  # NaN as well
                return (
                    f"attention is off by {error:.3g} of its size in look {look + 1} of {len(errors)}, {usual:.3g} "
                    "in the median before: a page may be damaged, or the widths too small"
                )
        return None


PLUGIN = Fidelity
