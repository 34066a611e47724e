"""diffusers' own caches on the trained DiT: each with the settings that it is tried with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    faster_cache,
    first_block_cache,
    mag_cache,
    pyramid_attention_broadcast,
    sea_cache,
)
from diffusers.hooks import taylorseer_cache as taylor
from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context
from torch import Tensor, nn

ALWAYS = (-1, 1001)


class Hooked(nn.Module):
    """Calls a transformer as diffusers' newer pipelines do: within a cache context that knows the step.

    Attributes:
        swaps: whether the halves of the batch are swapped: FasterCache takes the first for the unconditional one, and
            DiTPipeline has it second.
    """

    def __init__(self, inner: DiTTransformer2DModel, swaps: bool = False) -> None:
        super().__init__()
        self.inner, self.swaps = inner, swaps
        self.config, self.dtype, self.device = inner.config, inner.dtype, inner.device
        self.pipe: Any = None
        self.timestep = 0

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        scheduler = self.pipe.scheduler
        self.timestep = int(timestep[0])
        steps = scheduler.timesteps.tolist()
        signal = float(scheduler.alphas_cumprod[self.timestep])
        # Of flow matching: noise over noise and signal.
        sigma = (1 - signal) ** 0.5 / ((1 - signal) ** 0.5 + signal**0.5)
        context = CacheContext("both", steps.index(self.timestep), len(steps), self.timestep, sigma)
        HookRegistry.check_if_exists_or_initialize(self.inner)
        _set_cache_context(self.inner, context)
        if not self.swaps:
            return self.inner(sample, timestep=timestep, class_labels=class_labels)
        found = self.inner(
            sample.roll(len(sample) // 2, 0), timestep=timestep, class_labels=class_labels.roll(len(sample) // 2, 0)
        )
        found.sample = found.sample.roll(len(sample) // 2, 0)
        return found


def settings(ratios: list[float], steps: int) -> Iterator[tuple[str, str, Callable[[Hooked], None]]]:
    """Name of the hook, what it is set to, and what applies it.

    Args:
        ratios: of MagCache, from a calibration on other noise.
    """
    for what, patterns in _TAYLOR.items():
        for order in (0, 1, 2) if what == "lite" else (1,):
            for every in (2, 3, 4) if what == "lite" else (2, 3):
                yield "TaylorSeer", f"{what}, every {every}, order {order}", _taylor(patterns, every, order)
    for threshold, order, most in ((0.5, 1, 1), (0.5, 1, 2), (1.0, 1, 2), (1.0, 1, 4), (2.0, 1, 2), (1.0, 0, 2)):
        yield "SeaCache", f"threshold {threshold}, order {order}, at most {most}", _sea(threshold, order, most)
    for threshold in (0.1, 0.2, 0.3):
        yield "FirstBlockCache", f"threshold {threshold}", _first_block(threshold)
    for threshold, most in ((0.12, 1), (0.12, 3), (0.24, 3), (0.24, 5)):
        yield "MagCache", f"threshold {threshold}, at most {most}", _mag(threshold, most, ratios, steps)
    for every in (2, 3, 4):
        yield "PyramidAttentionBroadcast", f"every {every}", _pyramid(every, ALWAYS)
    for uncond in (2, 5):
        yield "FasterCache", f"attention every 2, unconditional every {uncond}", _faster(2, uncond)


def calibrate(hooked: Hooked, run: Callable[[], Any], steps: int) -> list[float]:
    """MagCache's ratios, which it prints and does not return."""
    import io

    mag_cache.apply_mag_cache(hooked.inner, MagCacheConfig(calibrate=True, num_inference_steps=steps))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run()
    return [float(ratio) for ratio in printed.getvalue().split("[")[-1].split("]")[0].split(",")]


# As the documentation has them for other models: attention, whole blocks, and "lite", which forecasts the output alone.
_TAYLOR: dict[str, dict[str, list[str] | None]] = {
    "attention": {"cache_identifiers": [r"transformer_blocks\.\d+\.attn1"]},
    "attention and feed-forward": {"cache_identifiers": [r"transformer_blocks\.\d+\.(attn1|ff)"]},
    "lite": {"cache_identifiers": ["proj_out_2"], "skip_predict_identifiers": [r"transformer_blocks\.\d+"]},
}


def _pyramid(every: int, spans: tuple[int, int]) -> Callable[[Hooked], None]:
    def apply(hooked: Hooked) -> None:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=every,
            spatial_attention_timestep_skip_range=spans,
            current_timestep_callback=lambda: hooked.timestep,
        )
        pyramid_attention_broadcast.apply_pyramid_attention_broadcast(hooked.inner, config)

    return apply


def _faster(attention: int, uncond: int) -> Callable[[Hooked], None]:
    def apply(hooked: Hooked) -> None:
        hooked.swaps = True
        config = FasterCacheConfig(
            spatial_attention_block_skip_range=attention,
            unconditional_batch_skip_range=uncond,
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BCHW",
            current_timestep_callback=lambda: hooked.timestep,
            _unconditional_conditional_input_kwargs_identifiers=["hidden_states", "timestep", "class_labels"],
        )
        faster_cache.apply_faster_cache(hooked.inner, config)

    return apply


def _first_block(threshold: float) -> Callable[[Hooked], None]:
    return lambda hooked: first_block_cache.apply_first_block_cache(hooked.inner, FirstBlockCacheConfig(threshold))


def _taylor(patterns: dict[str, Any], every: int, order: int) -> Callable[[Hooked], None]:
    config = TaylorSeerCacheConfig(
        cache_interval=every, max_order=order, taylor_factors_dtype=torch.float32, **patterns
    )
    return lambda hooked: taylor.apply_taylorseer_cache(hooked.inner, config)


def _mag(threshold: float, most: int, ratios: list[float], steps: int) -> Callable[[Hooked], None]:
    config = MagCacheConfig(
        threshold=threshold, max_skip_steps=most, num_inference_steps=steps, mag_ratios=torch.tensor(ratios)
    )
    return lambda hooked: mag_cache.apply_mag_cache(hooked.inner, config)


def _sea(threshold: float, order: int, most: int) -> Callable[[Hooked], None]:
    def apply(hooked: Hooked) -> None:
        config = sea_cache.SeaCacheConfig(
            threshold=threshold,
            residual_order=order,
            max_consecutive_cached=most,
            raw_vision_callback=lambda module, args, kwargs: [image[:, None] for image in args[0]],
        )
        sea_cache.apply_sea_cache(hooked.inner, config)

    return apply
