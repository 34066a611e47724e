"""Sliding windows that stay dense, in ONNX: cuts at sizes of which torch cannot know whether they are met."""

from __future__ import annotations

import numpy as np
import torch
from onnx import FunctionProto
from torch import Tensor

from tqc.lowering.onnx.builder import Body

_END = np.iinfo(np.int64).max


def newest_function(keep: int) -> FunctionProto:
    """`(tokens) -> tokens`: the last `keep` of [batch, heads, n, d], or all."""
    body = Body(f"newest_{keep}")
    return body.function({"kept": body.slice(body.input("tokens"), -keep, _END, 2)})


def newest_like(keep: int, tokens: Tensor) -> list[Tensor]:
    batch, heads, count, dim = tokens.shape
    return [tokens.new_empty(batch, heads, torch.sym_min(count, keep), dim)]


def columns_function() -> FunctionProto:
    """`(mask, past, ids) -> mask`: the columns of the tokens in the cache `past` and of `ids`, the last ones."""
    body = Body("window_columns")
    mask, past, ids = (body.input(name) for name in ("mask", "past", "ids"))
    seen = body.size(past, 2) + body.size(ids, 1)
    return body.function({"columns": body.slice(mask, body.op("Neg", seen), _END, 3)})


def columns_like(mask: Tensor, past: Tensor, ids: Tensor) -> list[Tensor]:
    return [mask.new_empty(*mask.shape[:3], past.shape[2] + ids.shape[1])]
