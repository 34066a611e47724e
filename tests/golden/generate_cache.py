"""Wrote cache_v2.safetensors and cache_v2_values.safetensors, and of version 1 in its time. Kept to show how.

Run it for a new file version only: the files of the others must load for ever as they do.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from tqc import save_cache
from tqc.cache.packed_tensor import extend, pack
from tqc.format import PackedFormat
from tqc.format.quantizer import fold

WINDOW = 100
FORMATS = (PackedFormat(16, 3, True, 4, 32), PackedFormat(16, 2, False, 4, 32))
FOLDED = (FORMATS[0], PackedFormat(16, 2, False, 4, 32, folded=True))
WINDOWS = (PackedFormat(16, 3, True, 4, 32, keep=WINDOW - 1), PackedFormat(16, 2, False, 4, 32, keep=WINDOW - 1))


def golden_cache() -> DynamicCache:
    """Layers: 75 tokens whose keys have a balance; a window that has wrapped, of 230 tokens; 9 tokens, of which none is
    packed; 75 tokens with folded values; 3 dense tokens."""
    generator = torch.Generator().manual_seed(0)
    cache = DynamicCache()

    def states(length: int) -> list[Tensor]:
        """Keys, one channel of which is large, values, and queries that hardly look at it."""
        keys, values, query = (torch.randn(1, 2, length, 16, generator=generator) for _ in range(3))
        return [x.bfloat16() for x in (keys * _LARGE, values, query / _LARGE)]

    for layer, (length, formats) in enumerate([(75, FORMATS), (230, WINDOWS), (9, FORMATS), (75, FOLDED), (3, None)]):
        keys, values, query = states(length)
        cache.update(keys[:, :, :1], values[:, :, :1], layer)
        held = cache.layers[layer]
        if formats is WINDOWS:
            held = cache.layers[layer] = DynamicSlidingWindowLayer(WINDOW)
            held.lazy_initialization(keys, values)
            held.cumulative_length = length
        if formats is None:
            held.keys, held.values = keys, values
            continue
        values = fold(values, formats[1])
        first = min(length, 70)
        held.keys = pack(keys[:, :, :first], formats[0], query=query[:, :, :first])
        held.values = pack(values[:, :, :first], formats[1])
        for at in range(first, length):
            held.keys = extend(held.keys, keys[:, :, at : at + 1])
            held.values = extend(held.values, values[:, :, at : at + 1])
    return cache


_LARGE = torch.ones(16)
_LARGE[3] = 16.0


def main() -> None:
    cache, folder = golden_cache(), Path(__file__).parent
    save_cache(cache, folder / "cache_v2.safetensors")
    parts = {f"{i}.{name}": getattr(layer, name) for i, layer in enumerate(cache.layers) for name in ("keys", "values")}
    save_file({name: part.clone() + 0 for name, part in parts.items()}, folder / "cache_v2_values.safetensors")


if __name__ == "__main__":
    main()
