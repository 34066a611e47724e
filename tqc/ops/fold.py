"""Into the basis of a folded format; `unfold` is the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from tqc.format import PackedFormat
from tqc.format.quantizer import rotate
from tqc.ops.op import op


@op()
def fold(x: Tensor, spec: str, dim: int = -1, start: int = 0, stop: int | None = None) -> Tensor:
    """Turn vectors into the rotated basis, in which a folded cache takes them and holds them: R v for each.

    Applied to values, or once to the weights around attention. With R the rotation, the layer that makes the values
    then makes R v, and the layer behind the attention takes R o, equal up to the rounding of weights:

        W_v' = R W_v,  b_v' = R b_v,  W_o' = W_o R'        (per head)

    Args:
        x: any shape; the vectors of all heads lie one after the other in [start, stop) of `dim`.
        spec: of the format whose rotation it is.
        dim, start, stop: where the vectors lie; `stop` is None for the end of `dim`.

    Returns:
        Contiguous, in x's dtype.
    """
    fmt = PackedFormat.parse(spec)
    rows = x.movedim(dim, -1)
    stop = rows.shape[-1] if stop is None else stop
    rotated = rotate(rows[..., start:stop].unflatten(-1, (-1, fmt.head_dim)), fmt).to(x.dtype).flatten(-2)
    return torch.cat([rows[..., :start], rotated, rows[..., stop:]], dim=-1).movedim(-1, dim).contiguous()


@fold.register_fake
def _(x: Tensor, spec: str, dim: int, start: int, stop: int | None) -> Tensor:
    return x.new_empty(x.shape)


fold.register_traceable(fold.reference)
