"""Step time of a Wan-shaped transformer in full and shared: benchmarks/results/diffusion_wan.json.

    python benchmarks/diffusion/wan.py             half the width of Wan 2.1 1.3B, 13 frames of 480 x 832, two blocks
    python benchmarks/diffusion/wan.py --quick     a small one, and no file

Blocks are alike, so that two tell the ratio of them all; random weights. A step is two calls, one for each branch of
guidance. Shared is strategy "share" (self-attention in every second step) with cfg_sharing.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from tqc.diffusion.pipeline import make_dispatcher

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envelope

WIDTHS = {"num_attention_heads": 6, "attention_head_dim": 128, "ffn_dim": 4480, "text_dim": 4096, "freq_dim": 256}
SMALL = {"num_attention_heads": 4, "attention_head_dim": 32, "ffn_dim": 512, "text_dim": 64, "freq_dim": 64}


def step(model: Any, number: int, sample: torch.Tensor, prompts: torch.Tensor) -> None:
    timestep = torch.tensor([900 - number])
    for branch, prompt in zip(("cond", "uncond"), prompts, strict=True):
        with model.cache_context(branch):
            model(sample, timestep=timestep, encoder_hidden_states=prompt[None], return_dict=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--frames", type=int, default=13, help="of the video, 4 n + 1")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    widths = SMALL if arguments.quick else WIDTHS
    model = WanTransformer3DModel(num_layers=arguments.layers, **widths).eval().requires_grad_(False)
    latents = (5, 8, 8) if arguments.quick else (arguments.frames // 4 + 1, 60, 104)
    sample, prompts = torch.randn(1, 16, *latents), torch.randn(2, 64, widths["text_dim"])
    rows = []
    for setting, how in {"full": {}, "shared": {"strategy": "share", "cfg_sharing": True}}.items():
        dispatcher = make_dispatcher(model, options={"rest": "eager"}, **how)
        dispatcher.install()
        with torch.no_grad():
            # Those of an even number compute, and compile too; what is shared comes in pairs of steps.
            warm, timed = (2, 2) if how else (1, 1)
            for number in range(warm):
                step(model, number, sample, prompts)
            seconds = []
            for number in range(warm, warm + timed):
                begin = time.perf_counter()
                step(model, number, sample, prompts)
                seconds.append(time.perf_counter() - begin)
        flops = [variant.flops for variant, _ in dispatcher.variants.values()]
        rows.append(
            {
                "setting": setting,
                "tokens": latents[0] * latents[1] * latents[2] // 4,
                "layers": arguments.layers,
                "seconds_by_step": [round(value, 3) for value in seconds],
                "seconds": round(sum(seconds) / len(seconds), 3),
                "tflop_by_variant": [round(count["total"] / 1e12, 3) for count in flops],
            }
        )
        print(rows[-1], flush=True)
    for row in rows:
        row["of_full"] = round(row["seconds"] / rows[0]["seconds"], 3)
    print(rows[-1]["of_full"])
    if not arguments.quick:
        envelope.write("diffusion_wan", rows, packages=("diffusers",))


if __name__ == "__main__":
    main()
