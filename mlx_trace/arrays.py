"""Tensors as arrays of MLX, and back."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor


def array_of(tensor: Tensor) -> mx.array:
    """A tensor's elements as an array of the same dtype."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.view(torch.int16).numpy()).view(mx.bfloat16)
    return mx.array(np.asarray(tensor))


def tensor_of(array: mx.array) -> Tensor:
    """An array's elements as a tensor of the same dtype."""
    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def dtype_of(dtype: torch.dtype) -> mx.Dtype:
    name = str(dtype).removeprefix("torch.")
    return mx.bool_ if name == "bool" else mx.float32 if name == "float64" else getattr(mx, name)
