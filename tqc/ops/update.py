"""What becomes of a cache of the caller's."""

from __future__ import annotations

from torch import Tensor

from tqc.ops.op import op
from tqc.ops.value import PackedValue, Planes


@op()
def update(cache: Planes | Tensor, new: Planes) -> Planes:
    """Says that an input of the graph, a preallocated cache of the caller's, is `new` from the end of the graph on.

    It stands at the end and makes no value for other nodes. A target that runs in place lets the input become `new`;
    one with explicit state makes it an output.

    Args:
        cache: an input of the graph.
        new: what it becomes, of the same capacity.

    Returns:
        `new` itself.
    """
    return new


@update.register_fake
def _(cache: PackedValue | Tensor, new: PackedValue) -> PackedValue:
    return new


update.register_traceable(update.reference)
