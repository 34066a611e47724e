"""An exported model beside torch's own: the same tokens through both."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from tqc.backend import tqai
from tqc.export.generator import OnnxGenerator
from tqc.format import PackedFormat
from tqc.lowering.onnx.layout import to_planes


@dataclass
class Differences:
    """How far onnxruntime is from torch.

    Attributes:
        prefill, decode: largest absolute differences of logits.
        steps: how many calls, the prompt's among them.
        same_tokens: in how many of them the most likely token of all sequences was the same.
        codes: how many bytes of codes and scales of packed caches differ.
        code_bytes: of how many.
    """

    prefill: float = 0.0
    decode: float = 0.0
    steps: int = 0
    same_tokens: int = 0
    codes: int = 0
    code_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    model: Any,
    folder: str | os.PathLike[str],
    options: dict[str, Any] | None,
    ids: Tensor,
    prompt: int,
    mask: Tensor | None = None,
) -> Differences:
    """Run a prompt and then single tokens through `model` and through what was exported of it.

    Args:
        options: of the backend, which runs its reference: the CPU kernels round more. None: `model` as it is.
        ids: int64 [batch, tokens].
        prompt: how many of them are given at once.
        mask: int64 as `ids`, 0 for padding on the left; what is said of padding does not count.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    call = model
    if options is not None:
        call = torch.compile(model, backend=tqai, options={**options, "rest": "eager", "provider": "reference"})
    cache, generator, found = DynamicCache(config=model.config), OnnxGenerator(folder), Differences()
    generator.reset(len(ids))
    for begin, end in [(0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1]))]:
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        with torch.no_grad():
            wanted = call(ids[:, begin:end], past_key_values=cache, use_cache=True, **given).logits.float()
        step = (ids[:, begin:end].numpy(), mask[:, begin:end].numpy())
        made = torch.from_numpy(generator.step(*step, keep=range(end - begin))).float()
        real = mask[:, begin:end].bool()
        difference = (made - wanted)[real].abs().max().item()
        if begin:
            found.decode = max(found.decode, difference)
        else:
            found.prefill = difference
        found.steps += 1
        found.same_tokens += int(torch.equal(made[:, -1].argmax(-1), wanted[:, -1].argmax(-1)))
    if options is not None:
        _compare_codes(generator, cache, found)
    return found


def _compare_codes(generator: OnnxGenerator, cache: Any, found: Differences) -> None:
    held = generator.cache
    for packed in generator.metadata["packed"]:
        layer, part = packed["name"].split(".")
        tensor, fmt = getattr(cache.layers[int(layer)], f"{part}s"), PackedFormat.parse(packed["spec"])
        pages, _ = to_planes({name: held[f"{packed['name']}.{name}"] for name in packed["parts"]}, fmt)
        theirs = tensor.pages.numpy()
        count = min(pages.shape[2], theirs.shape[2], int(tensor.state[1]) // 32)
        for begin, end in ((fmt.scales_offset, fmt.centre_offset), (fmt.planes[0][2], fmt.page_bytes)):
            ours, other = (x[:, :, :count, begin:end] for x in (pages, theirs))
            found.codes += int(np.count_nonzero(ours != other))
            found.code_bytes += ours.size
