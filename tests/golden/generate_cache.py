"""Wrote cache_v1.safetensors and cache_v1_values.safetensors, once for each file version. Kept to show how.

Run it for a new file version only: the files of version 1 must load for ever as they do.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import DynamicCache

from tqc import save_cache
from tqc.cache.packed_tensor import pack
from tqc.format import PackedFormat

FORMATS = (PackedFormat(16, 3, True, 4, 32), PackedFormat(16, 2, False, 4, 32))


def golden_cache() -> DynamicCache:
    """One packed layer of 75 tokens, one dense layer of 3."""
    generator = torch.Generator().manual_seed(0)
    cache = DynamicCache()
    for layer, length in enumerate((75, 3)):
        keys, values = (torch.randn(1, 2, length, 16, generator=generator).bfloat16() for _ in range(2))
        cache.update(keys, values, layer)
    layer = cache.layers[0]
    layer.keys, layer.values = pack(layer.keys, FORMATS[0]), pack(layer.values, FORMATS[1])
    return cache


def main() -> None:
    cache, folder = golden_cache(), Path(__file__).parent
    save_cache(cache, folder / "cache_v1.safetensors")
    first, second = cache.layers
    dense = {"0.keys": first.keys.dequantize(), "0.values": first.values.dequantize()}
    save_file(dense | {"1.keys": second.keys, "1.values": second.values}, folder / "cache_v1_values.safetensors")


if __name__ == "__main__":
    main()
