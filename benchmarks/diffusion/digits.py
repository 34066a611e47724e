"""A small DiT and a classifier trained on scikit-learn's 8x8 digits: real denoising trajectories in minutes on a CPU.

    python benchmarks/diffusion/digits.py --out build/digits           train both, go on where a run was stopped
    python benchmarks/diffusion/digits.py --out build/digits --steps 4000

The folder gets `dit.pt` (averaged weights, with the optimizer to go on from) and `classifier.pt`.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

NULL = 1000  # the class of DiTPipeline's unconditional branch
SHAPE = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 8, "sample_size": 8, "patch_size": 1}
DECAY = 0.999


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [-1, 1] and their classes."""
    from sklearn.datasets import load_digits

    held = load_digits()
    return torch.tensor(held.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(held.target)


def make_transformer() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(in_channels=1, out_channels=1, num_embeds_ada_norm=NULL, **SHAPE)


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, prediction_type="epsilon")


def make_classifier() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10))


class Pixels(nn.Module):
    """The VAE of a pipeline whose latents are pixels."""

    config = SimpleNamespace(scaling_factor=1.0)
    device, dtype = torch.device("cpu"), torch.float32

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=latents)


def load_pipeline(folder: Path) -> tuple[DiTPipeline, nn.Module]:
    """The trained pipeline, and the classifier of its images."""
    transformer, classifier = make_transformer(), make_classifier()
    transformer.load_state_dict(torch.load(folder / "dit.pt")["average"])
    classifier.load_state_dict(torch.load(folder / "classifier.pt"))
    pipe = DiTPipeline(transformer.eval().requires_grad_(False), Pixels(), make_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe, classifier.eval().requires_grad_(False)


def train_classifier(path: Path, epochs: int = 30) -> float:
    """Accuracy on every fifth image, which it does not see."""
    images, classes = digits()
    held_out = torch.arange(len(images)) % 5 == 0
    model, seen = make_classifier(), torch.nonzero(~held_out)[:, 0]
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    for _ in range(epochs):
        for batch in seen[torch.randperm(len(seen))].split(64):
            loss = nn.functional.cross_entropy(model(images[batch]), classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    torch.save(model.state_dict(), path)
    with torch.no_grad():
        return float((model(images[held_out]).argmax(1) == classes[held_out]).float().mean())


def train_dit(path: Path, steps: int, batch: int = 64, rate: float = 1.5e-3) -> None:
    images, classes = digits()
    model, scheduler = make_transformer(), make_scheduler()
    average = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    first = 0
    if path.exists():
        held = torch.load(path)
        model.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        average, first = held["average"], held["steps"]
    begin, losses = time.monotonic(), []
    for step in range(first, steps):
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100, 0.02 + (steps - step) / (0.3 * steps))
        chosen = torch.randint(len(images), (batch,))
        labels = torch.where(torch.rand(batch) < 0.1, NULL, classes[chosen])
        noise, timesteps = torch.randn(batch, 1, 8, 8), torch.randint(1000, (batch,))
        noisy = scheduler.add_noise(images[chosen], noise, timesteps)
        loss = nn.functional.mse_loss(model(noisy, timesteps, labels).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
        with torch.no_grad():
            decay = min(DECAY, (step + 1) / (step + 10))
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            held = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average}
            torch.save({**held, "steps": step + 1}, f"{path}.part")
            os.replace(f"{path}.part", path)
            mean = sum(losses[-100:]) / len(losses[-100:])
            print(f"step {step + 1}: loss {mean:.4f}, {time.monotonic() - begin:.0f} s", flush=True)


def main() -> None:
    parser: Any = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not (arguments.out / "classifier.pt").exists():
        print(f"classifier: {train_classifier(arguments.out / 'classifier.pt'):.3f} of images that it did not see")
    train_dit(arguments.out / "dit.pt", arguments.steps)


if __name__ == "__main__":
    main()
