"""Peak memory of decoding a video, and the seams of tiles: benchmarks/results/diffusion_vae.json.

    python benchmarks/diffusion/vae.py             81 frames of 480 x 832 by a Wan VAE of small width, random weights
    python benchmarks/diffusion/vae.py --quick     9 frames, and no file

Each way runs in a process of its own; its peak is the largest resident size less that before decoding.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLWan

import tqc

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envelope

WIDTH = 16
WAYS: dict[str, dict[str, Any] | None] = {
    "whole": None,
    "tqc.optimize_vae_memory": {},
    "smaller tiles": {
        "tile_sample_min_height": 128, "tile_sample_min_width": 128,
        "tile_sample_stride_height": 96, "tile_sample_stride_width": 96,
    },
}  # fmt: skip


def resident() -> int:
    """The largest resident size so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def decode(way: str, frames: int, height: int, width: int, out: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    vae = AutoencoderKLWan(base_dim=WIDTH, z_dim=16, num_res_blocks=1).eval().requires_grad_(False)
    if WAYS[way] is not None:
        tqc.optimize_vae_memory(SimpleNamespace(vae=vae), **WAYS[way])
    latents = torch.randn(1, 16, frames // 4 + 1, height // 8, width // 8)
    with torch.no_grad():
        vae.decode(latents[:, :, :1, :8, :8])
        before = resident()
        video = vae.decode(latents, return_dict=False)[0]
    print(json.dumps({"peak_bytes": resident() - before, "video_bytes": video.nbytes}))
    torch.save(video.half(), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    frames, height, width = (9, 480, 832) if arguments.quick else (81, 480, 832)
    if arguments.way:
        decode(arguments.way, frames, height, width, arguments.out)
        return
    folder = Path(__file__).resolve().parents[2] / "build" / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for number, way in enumerate(WAYS):
        out = folder / f"{number}.pt"
        command = [sys.executable, __file__, "--way", way, "--out", str(out), *(["--quick"] if arguments.quick else [])]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        row = {"way": way, "frames": frames, "height": height, "width": width, "base_dim": WIDTH, **found}
        if rows:
            whole, tiled = torch.load(folder / "0.pt").float(), torch.load(out).float()
            error = (tiled - whole).square().mean()
            row["of_whole"] = round(row["peak_bytes"] / rows[0]["peak_bytes"], 4)
            row["seam_rms"] = round(float((error / whole.square().mean()).sqrt()), 4)
        rows.append(row)
        print(row, flush=True)
    if not arguments.quick:
        envelope.write("diffusion_vae", rows, packages=("diffusers",))


if __name__ == "__main__":
    main()
