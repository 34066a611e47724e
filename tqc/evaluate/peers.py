"""Caches of other projects that can be evaluated beside ours, where their packages are installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Peer:
    """Another project's cache.

    Attributes:
        packages: (name to install, name to import) of what it needs.
        new_cache: makes an empty cache for a model.
    """

    name: str
    packages: tuple[tuple[str, str], ...]
    new_cache: Callable[[Any], Any]

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        absent = [
            package for package, module in self.packages if importlib.util.find_spec(module.split(".")[0]) is None
        ]
        return f"not installed: {', '.join(absent)}" if absent else None


def _quantized(backend: str, **options: Any) -> Callable[[Any], Any]:
    def new_cache(model: Any) -> Any:
        from transformers.cache_utils import QuantizedCache

        return QuantizedCache(backend, model.config, **options)

    return new_cache


def _tqai(bits_k: int, bits_v: int) -> Callable[[Any], Any]:
    def new_cache(model: Any) -> Any:
        base: Any = importlib.import_module("tqai.cache.hf").TurboQuantDynamicCache
        config = importlib.import_module("tqai.config").TurboQuantConfig(bits_k=bits_k, bits_v=bits_v, backend="torch")

        class Cache(base):
            # It keeps no `layers`, from which transformers would learn how many columns a mask needs.
            def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
                return self.get_seq_length(layer_idx) + query_length, 0

        return Cache(config)

    return new_cache


_QUANTO = (("optimum-quanto", "optimum.quanto"),)
_HQQ = (("hqq", "hqq"),)
_TQAI = (("tqai", "tqai"),)

# Group axes as the documentation of transformers advises for each of its backends.
PEERS = (
    Peer("transformers quanto 4 bits", _QUANTO, _quantized("quanto", nbits=4, axis_key=0, axis_value=0)),
    Peer("transformers quanto 2 bits", _QUANTO, _quantized("quanto", nbits=2, axis_key=0, axis_value=0)),
    Peer("transformers hqq 4 bits", _HQQ, _quantized("hqq", nbits=4, axis_key=1, axis_value=1)),
    Peer("transformers hqq 2 bits", _HQQ, _quantized("hqq", nbits=2, axis_key=1, axis_value=1)),
    Peer("transformers fp8", (), _quantized("fp8")),
    Peer("tqai K4 V2", _TQAI, _tqai(4, 2)),
    Peer("tqai K8 V8", _TQAI, _tqai(8, 8)),
)
