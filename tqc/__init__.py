"""tqc: a compressed KV cache and compressed attention for any transformer, by compilation.

model = torch.compile(model, backend="tqai")
model.generate(**inputs, max_new_tokens=200)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqc.cache.packed_tensor import PackedTensor
    from tqc.cache.watch import monitor
    from tqc.caches import cache_bytes, load_cache, save_cache
    from tqc.config import PRESETS, Config
    from tqc.diffusion.make_plan import plan
    from tqc.diffusion.pipeline import compile_pipeline, decompile_pipeline
    from tqc.diffusion.vae import optimize_vae_memory, patch_mps_compatibility
    from tqc.explainer import explain
    from tqc.export.generator import OnnxGenerator
    from tqc.export.onnx import export_onnx
    from tqc.mlx_trace.compile import compile_mlx, decompile_mlx

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Config",
    "OnnxGenerator",
    "PackedTensor",
    "cache_bytes",
    "compile_mlx",
    "compile_pipeline",
    "decompile_mlx",
    "decompile_pipeline",
    "explain",
    "export_onnx",
    "load_cache",
    "monitor",
    "optimize_vae_memory",
    "patch_mps_compatibility",
    "plan",
    "save_cache",
]

_HOME = {
    "PRESETS": "config",
    "Config": "config",
    "PackedTensor": "cache.packed_tensor",
    "cache_bytes": "caches",
    "compile_mlx": "mlx_trace.compile",
    "compile_pipeline": "diffusion.pipeline",
    "decompile_mlx": "mlx_trace.compile",
    "decompile_pipeline": "diffusion.pipeline",
    "plan": "diffusion.make_plan",
    "optimize_vae_memory": "diffusion.vae",
    "patch_mps_compatibility": "diffusion.vae",
    "load_cache": "caches",
    "monitor": "cache.watch",
    "save_cache": "caches",
    "explain": "explainer",
    "export_onnx": "export.onnx",
    "OnnxGenerator": "export.generator",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"tqc.{_HOME[name]}"), name)
    raise AttributeError(f"module 'tqc' has no attribute {name!r}")
