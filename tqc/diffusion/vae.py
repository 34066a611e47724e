"""Memory of a pipeline's VAE, and what Apple's MPS cannot compute."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch


def optimize_vae_memory(pipe: Any, *, tiling: bool = True, slicing: bool = True, **tile: float) -> list[str]:
    """Let the pipeline's VAE decode by tiles, and one sample of a batch at a time, as far as its class can.

    Args:
        tile: sizes for its `enable_tiling`, such as `tile_sample_min_height=512`; what is not given stays as diffusers
            has it.

    Returns:
        What was switched on: "tiling", "slicing".

    Raises:
        ValueError: for a pipeline without a VAE, one that can do neither, or sizes that its class does not take; the
            VAE is as it was.
    """
    vae = getattr(pipe, "vae", None)
    if not isinstance(vae, torch.nn.Module):
        raise ValueError(f"pipe must have a vae, and {type(pipe).__name__} has none")
    if tile:
        _check_tile(vae, tile, tiling)
    done = []
    for name, wanted, sizes in (("tiling", tiling, tile), ("slicing", slicing, {})):
        enable = getattr(vae, f"enable_{name}", None)
        if wanted and enable is not None:
            try:
                enable(**sizes)
            except NotImplementedError:  # the class has the method of its base, and no way to do it
                continue
            done.append(name)
    if (tiling or slicing) and not done:
        raise ValueError(f"{type(vae).__name__} can decode neither by tiles nor by slices")
    return done


def _check_tile(vae: torch.nn.Module, tile: dict[str, float], tiling: bool) -> None:
    enable = getattr(vae, "enable_tiling", None)
    names = list(inspect.signature(enable).parameters) if enable else []
    for name, size in tile.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            takes = ", ".join(names) or "no sizes"
            raise ValueError(f"tiles of {type(vae).__name__} have no {name!r}{hint}; they take {takes}")
        if isinstance(size, bool) or not isinstance(size, (int, float)) or size <= 0:
            raise ValueError(f"{name} must be a positive number, got {size!r}")
    if not tiling:
        raise ValueError(f"{', '.join(tile)} is the size of a tile, and tiling is False")


def patch_mps_compatibility(pipe: Any) -> int:
    """Let rotary embeddings of the pipeline's modules be computed in float32 where they ask for float64, which Apple's
    MPS lacks.

    Returns:
        How many modules were changed.
    """
    parts = getattr(pipe, "components", None) or vars(pipe)
    modules = {module for part in parts.values() if isinstance(part, torch.nn.Module) for module in part.modules()}
    double = [module for module in modules if getattr(module, "double_precision", None) is True]
    for module in double:
        module.double_precision = False  # type: ignore[assignment]
    return len(double)
