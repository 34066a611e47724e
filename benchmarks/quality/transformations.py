"""Real models with hard keys: each transformation leaves the dense model's function as it is, so that rows compare.

- `bias`: a constant of norm 600 in two rotary pairs of K, as Qwen2 models have. In a pair that turns, a constant in the
  keys would change the scores; so the two slowest pairs, which turn by hundredths over a few thousand tokens, stand
  still, and the perplexity is another one for that by a little.
- `pairs-N`: K times N and Q over N in two rotary pairs of each head.
- `channel`: the same in one pair, times 256.
- `at-32K`: the text begins at position 32,768.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

TRANSFORMATIONS = ("plain", "bias", "pairs-4", "pairs-16", "pairs-64", "channel", "at-32K")
BIAS_NORM = 600.0
STILL_PAIRS = 2
FURTHER = 32_768


def transformed(model: Any, name: str) -> Any:
    """`model`, a decoder of rotary embeddings, with the transformation `name`, in place.

    Raises:
        ValueError: if there is no such transformation.
    """
    if name == "plain":
        return model
    if match := re.fullmatch(r"pairs-(\d+)", name):
        return with_outlier_pairs(model, int(match[1]), (5, 9))
    if name == "channel":
        return with_outlier_pairs(model, 256, (7,))
    if name == "bias":
        return with_bias(with_still_pairs(model))
    if name == "at-32K":
        model.model.rotary_emb = Further(model.model.rotary_emb, FURTHER)
        return model
    raise ValueError(f"transformation must be one of {', '.join(TRANSFORMATIONS)} or pairs-N; got {name!r}")


@torch.no_grad()
def with_outlier_pairs(model: Any, factor: float, pairs: tuple[int, ...]) -> Any:
    """K times and Q over `factor` in rotary pairs `pairs` of each head: the products are the same."""
    for attention in _attentions(model):
        for name, by in (("k", factor), ("q", 1 / factor)):
            gain = torch.ones(attention.head_dim)
            gain[_channels(attention.head_dim, pairs)] = by
            norm, projection = getattr(attention, f"{name}_norm", None), getattr(attention, f"{name}_proj")
            if norm is not None:  # Gemma's norms multiply by 1 + weight
                one = 1.0 if "Gemma" in type(norm).__name__ else 0.0
                norm.weight.copy_((one + norm.weight) * _heads(gain, norm.weight.numel()) - one)
                continue
            gains = _heads(gain, projection.out_features)
            projection.weight.mul_(gains[:, None])
            if projection.bias is not None:
                projection.bias.mul_(gains)
    return model


@torch.no_grad()
def with_still_pairs(model: Any) -> Any:
    """The slowest `STILL_PAIRS` rotary pairs do not turn."""
    for name, frequencies in model.model.rotary_emb.named_buffers():
        if name.endswith("inv_freq"):
            frequencies[-STILL_PAIRS:] = 0
    return model


@torch.no_grad()
def with_bias(model: Any) -> Any:
    """A constant in the keys' slowest rotary pairs: where these stand still, all scores of a query rise alike."""
    for attention in _attentions(model):
        dim = attention.head_dim
        bias = torch.zeros(dim)
        signs = torch.tensor([1.0, -1.0]).repeat(STILL_PAIRS)
        bias[_channels(dim, range(dim // 2 - STILL_PAIRS, dim // 2))] = BIAS_NORM / len(signs) ** 0.5 * signs
        if hasattr(attention, "k_norm"):
            attention.k_norm = Biased(attention.k_norm, bias)
            continue
        projection = attention.k_proj
        bias = _heads(bias, projection.out_features)
        projection.bias = torch.nn.Parameter(bias if projection.bias is None else projection.bias + bias)
    return model


class Biased(torch.nn.Module):
    def __init__(self, norm: Any, bias: Tensor) -> None:
        super().__init__()
        self.norm, self.bias = norm, torch.nn.Parameter(_heads(bias, norm.weight.numel()))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.bias


class Further(torch.nn.Module):
    """Rotary embeddings of positions that are `by` further on."""

    def __init__(self, rotary: Any, by: int) -> None:
        super().__init__()
        self.rotary, self.by = rotary, by

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.rotary(x, position_ids + self.by, *args, **kwargs)


def _attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def _channels(head_dim: int, pairs: Any) -> list[int]:
    return [half * head_dim // 2 + pair for half in (0, 1) for pair in pairs]


def _heads(of_a_head: Tensor, width: int) -> Tensor:
    return of_a_head.repeat(width // len(of_a_head))
