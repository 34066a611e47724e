"""Out of the basis of a folded format; `fold` is the way in."""

from __future__ import annotations

from torch import Tensor

from tqc.format import PackedFormat, quantizer
from tqc.ops.op import op


@op()
def unfold(output: Tensor, spec: str) -> Tensor:
    """Turn the output of attention over folded values back: R' o for each vector.

    Args:
        output: [batch, query_heads, n, head_dim].
        spec: of the values' format.

    Returns:
        The same shape and dtype, a transposed view of [batch, n, query_heads, head_dim], as `attend` lays it out.
    """
    return quantizer.unfold(output, PackedFormat.parse(spec)).transpose(1, 2).contiguous().transpose(1, 2)


@unfold.register_fake
def _(output: Tensor, spec: str) -> Tensor:
    return output.transpose(1, 2).contiguous().transpose(1, 2)


unfold.register_traceable(unfold.reference)
