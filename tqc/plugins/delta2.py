"""delta2: attention goes on in a curve while the curve met what was computed, else in a line, else it is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tqc.plugins.delta import Delta


@dataclass(frozen=True)
class Delta2(Delta):
    """As delta, with forecasts of second order: where the curve through three computed steps misses more than the line
    through two, the line is taken, and where that misses more than the threshold, the step is computed."""

    name: ClassVar[str] = "delta2"
    paper: ClassVar[str] = "QuantSparse (arXiv 2509.23681); tqai 0.4, strategy delta2"
    ORDER: ClassVar[int] = 2


PLUGIN = Delta2
