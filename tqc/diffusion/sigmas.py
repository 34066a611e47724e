"""Noise over signal of a scheduler's steps, in one unit for all of diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tqc.plugins.snr import Snr

LEAST_SIGNAL = 1e-3  # of pure noise, which has none


def tells_noise(scheduler: Any) -> bool:
    return hasattr(scheduler, "sigmas") or hasattr(scheduler, "alphas_cumprod")


def check_scheduler(scheduler: Any) -> None:
    """Raises ValueError for a scheduler that says nothing of its noise."""
    if not tells_noise(scheduler):
        raise ValueError(f"scorer snr reads the sigmas of the scheduler, and {type(scheduler).__name__} has none")


def step_weights(pipe: Any) -> list[float]:
    """Weights of the steps that the pipeline's scheduler is set to, 1 in the mean; none if it says nothing of noise."""
    scheduler = getattr(pipe, "scheduler", None)
    return Snr.step_weights(sigmas_of(scheduler)).tolist() if tells_noise(scheduler) else []


def sigmas_of(scheduler: Any) -> Tensor:
    """Noise over signal before each step and behind the last, float32 [steps + 1], of a scheduler that is set to steps.

    Flow matching mixes (1 - sigma) of the sample with sigma of noise; others add sigma of noise to the sample, or have
    the signal's share of the power by timestep (`alphas_cumprod`).
    """
    timesteps, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    if not isinstance(sigmas, Tensor) or len(sigmas) != len(timesteps) + 1:
        signal = scheduler.alphas_cumprod[timesteps.long().cpu()].float().clamp_min(LEAST_SIGNAL**2)
        return torch.cat([((1 - signal) / signal).sqrt(), torch.zeros(1)])
    sigmas = sigmas.float().cpu()
    config = getattr(scheduler, "config", {})
    flows = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    if flows or "FlowMatch" in type(scheduler).__name__:
        return sigmas / (1 - sigmas).clamp_min(LEAST_SIGNAL)
    return sigmas
