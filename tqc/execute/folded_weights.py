"""Weights that the rotation of V has been folded into: made once for each weight and remembered while it lives.

With R the rotation, the layer that makes the values then makes R v, and the layer behind the attention takes R o:

    W_v' = R W_v,  b_v' = R b_v,  W_o' = W_o R'        (per head)

Equal up to the rounding of weights.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from tqc.format import PackedFormat
from tqc.format.quantizer import rotate

# Where in a weight the vectors of the heads lie, and how they are rotated: (dim, start, stop, spec).
Fold = tuple[int, int, int, str]


@dataclass
class _Folded:
    weight: weakref.ref[Tensor]
    stamp: tuple[int, int]
    folded: Tensor


_folded: dict[tuple[int, Fold], _Folded] = {}


def fold_weight(weight: Tensor, fold: Fold) -> Tensor:
    """`weight` with the vectors of all heads rotated; they lie one after the other in [start, stop) of `dim`."""
    dim, start, stop, spec = fold
    fmt = PackedFormat.parse(spec)
    with torch.inference_mode(False), torch.no_grad():
        rows = weight.detach().movedim(dim, -1)
        heads = rows[..., start:stop].unflatten(-1, (-1, fmt.head_dim))
        rotated = rotate(heads, fmt).to(weight.dtype).flatten(-2)
        return torch.cat([rows[..., :start], rotated, rows[..., stop:]], dim=-1).movedim(-1, dim).contiguous()


def folded_weights(weights: list[Tensor], folds: list[Fold], anew: bool) -> list[Tensor]:
    """Each weight with its fold applied, from memory where the weight has not changed.

    A change shows in torch's count of writes or in the address. Edits through `weight.data` show in neither: graphs
    that take a prompt ask for all `anew`.
    """
    result = []
    for weight, fold in zip(weights, folds, strict=True):
        known = _folded.get((id(weight), fold))
        if anew or known is None or known.weight() is not weight or known.stamp != _stamp(weight):
            known = _remember(weight, fold)
        result.append(known.folded)
    return result


def _remember(weight: Tensor, fold: Fold) -> _Folded:
    key = (id(weight), fold)
    reference = weakref.ref(weight, lambda _: _folded.pop(key, None))
    _folded[key] = _Folded(reference, _stamp(weight), fold_weight(weight, fold))
    return _folded[key]


def _stamp(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version
