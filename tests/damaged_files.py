"""Files of caches, damaged on purpose, and what they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def damaged(path: Path, change: Any) -> Path:
    """A copy of the file at `path` whose tensors and description `change(tensors, description, metadata)` altered."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    description = json.loads(metadata["cache"])
    before = metadata["cache"]
    change(tensors, description, metadata)
    if metadata.get("cache") == before:
        metadata["cache"] = json.dumps(description)
    result = path.with_name("damaged.safetensors")
    save_file(tensors, result, metadata=metadata)
    return result


def content(path: Path) -> Any:
    """The tensors of a file, in bytes."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return {name: (x.dtype, x.shape, x.flatten().view(torch.uint8).tolist()) for name, x in tensors.items()}


def of_keys(**numbers: Any):
    return lambda tensors, description, metadata: description["layers"][0]["keys"].update(numbers)


def of_layer(**numbers: Any):
    return lambda tensors, description, metadata: description["layers"][0].update(numbers)


def of_tensor(name: str, change: Any):
    return lambda tensors, *_: tensors.update({f"layers.0.{name}": change(tensors[f"layers.0.{name}"]).contiguous()})


def state_of_keys(*numbers: int):
    return of_tensor("keys.state", lambda state: torch.tensor(numbers, dtype=torch.int64))
