"""The reference as a provider: runs everywhere, in plain torch."""

from __future__ import annotations

from tqc.lowering.provider import Provider
from tqc.ops import planes

PROVIDER = Provider("reference", rank=100, supports=lambda *_: None, load=lambda: planes, folded=True)
