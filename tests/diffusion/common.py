"""Small diffusion transformers with random weights, their inputs, and how attention is shared in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel, WanTransformer3DModel
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

SDPA = torch.nn.functional.scaled_dot_product_attention
EAGER = {"rest": "eager"}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2}


def transformer(name: str) -> Any:
    torch.manual_seed(0)
    if name == "dit":
        made = DiTTransformer2DModel(
            in_channels=4, out_channels=4, sample_size=16, patch_size=2, num_embeds_ada_norm=1000, **HEADS
        )
    elif name == "sd3":
        made = SD3Transformer2DModel(
            sample_size=8, in_channels=4, out_channels=4, joint_attention_dim=48, caption_projection_dim=64,
            pooled_projection_dim=32, pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm", **HEADS,
        )  # fmt: skip
    elif name == "wan":
        made = WanTransformer3DModel(
            in_channels=4,
            out_channels=4,
            text_dim=48,
            freq_dim=32,
            ffn_dim=128,
            rope_max_seq_len=32,
            **{**HEADS, "num_layers": 1},
        )
    else:
        made = FluxTransformer2DModel(
            in_channels=16, num_single_layers=1, joint_attention_dim=48, pooled_projection_dim=32,
            axes_dims_rope=(8, 12, 12), **{**HEADS, "num_layers": 1},
        )  # fmt: skip
    return made.eval().requires_grad_(False)


def inputs(name: str, timestep: float, batch: int = 2, seed: int = 0, size: int = 8) -> dict[str, Any]:
    """Of one call; the seed gives sample and prompt."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    held: dict[str, Any] = {"timestep": torch.full((batch,), timestep), "return_dict": False}
    if name == "dit":
        return held | {"hidden_states": normal(4, 16, 16), "class_labels": torch.arange(batch) % 10}
    held["encoder_hidden_states"] = normal(5, 48)
    if name == "wan":
        return held | {"hidden_states": normal(4, 3, size, size)}
    held["pooled_projections"] = normal(32)
    if name == "sd3":
        return held | {"hidden_states": normal(4, size, size)}
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return held | {"hidden_states": normal(16, 16), "txt_ids": torch.zeros(5, 3), "img_ids": ids}


def generate(model: Any, name: str, steps: int = 4, **how: Any) -> list[torch.Tensor]:
    """The outputs of one generation; timesteps fall, and each step has a sample of its own."""
    return [model(**inputs(name, 900.0 - 100 * step, seed=step, **how))[0] for step in range(steps)]


class SharedInTorch(TorchFunctionMode):
    """Plain torch whose attention gives what `decide(site, query, key)` names: "keep" for what it computes and keeps
    by the site's number in a call, "read" for what was kept, "half" for that of the second half of the batch."""

    def __init__(self, decide: Any) -> None:
        super().__init__()
        self.decide, self.held, self.site = decide, {}, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not SDPA:
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs)
        query, key, value = (kwargs.pop(n, a) for n, a in zip(("query", "key", "value"), (*args, *[None] * 3)))  # noqa: B905
        what, self.site = self.decide(self.site, query, key), self.site + 1
        if what == "read":
            return self.held[self.site - 1]
        if what == "half":
            half = SDPA(query.chunk(2)[1], key.chunk(2)[1], value.chunk(2)[1], *args[3:], **kwargs)
            return torch.cat([half, half])
        out = SDPA(query, key, value, *args[3:], **kwargs)
        self.held[self.site - 1] = out
        return out

    def call(self, model: Any, **given: Any) -> torch.Tensor:
        self.site = 0
        with self:
            return model(**given)[0]


def is_cross(query: torch.Tensor, key: torch.Tensor) -> bool:
    return query.shape[-2] != key.shape[-2]


def counted(function: Any) -> dict[str, int]:
    """How often `function` ran attention and projections."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        function()
    counts = {event.key: event.count for event in found.key_averages()}
    return {
        "attention": counts.get("aten::scaled_dot_product_attention", 0),
        "linear": counts.get("aten::linear", 0),
    }
