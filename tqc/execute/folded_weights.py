"""Weights that the rotation of V has been folded into: made once for each weight and remembered while it lives."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tqc.ops import fold
from tqc.torch_private import writes

# How a weight is folded: the arguments of `tqc.ops.fold` behind the first, (spec, dim, start, stop).
Fold = tuple[str, int, int, int]


@dataclass
class _Folded:
    weight: weakref.ref[Tensor]
    stamp: tuple[int, int]
    folded: Tensor


_folded: dict[tuple[int, Fold], _Folded] = {}


def folded_weights(weights: Sequence[Tensor], folds: Sequence[Fold], anew: bool) -> list[Tensor]:
    """Each weight with its fold applied, from memory where the weight has not changed.

    A change shows in torch's count of writes or in the address. Edits through `weight.data` show in neither: graphs
    that take a prompt ask for all `anew`.
    """
    result = []
    for weight, how in zip(weights, folds, strict=True):
        known = _folded.get((id(weight), how))
        if anew or known is None or known.weight() is not weight or known.stamp != _stamp(weight):
            known = _remember(weight, how)
        result.append(known.folded)
    return result


def _remember(weight: Tensor, how: Fold) -> _Folded:
    key = (id(weight), how)
    reference = weakref.ref(weight, lambda _: _folded.pop(key, None))
    with torch.inference_mode(False), torch.no_grad():
        _folded[key] = _Folded(reference, _stamp(weight), fold(weight.detach(), *how))
    return _folded[key]


def _stamp(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), 0 if weight.is_inference() else writes(weight)
