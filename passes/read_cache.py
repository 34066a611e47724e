"""Pass: whatever still reads a packed cache as if it were dense gets dense values."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule

from tqc import runtime
from tqc.packed_tensor import PackedTensor
from tqc.passes.edit import set_value
from tqc.passes.graph import is_packed, value
from tqc.passes.plan import Plan


def read_cache(gm: GraphModule, plan: Plan) -> int:
    """Decode each packed input that an op other than ours reads.

    Before:
        y = some_op(k_cache)
    After:
        dense = read(k_cache); y = some_op(dense)

    Must run last: the other passes turn reads into fused ones. The sites where this happens are correct but slow, and
    the plan says why they were not understood.
    """
    count = 0
    provider = next((site.provider for site in plan.sites if site.provider), "reference")
    for node in list(gm.graph.nodes):
        if node.op != "placeholder" or not is_packed(node):
            continue
        users = [user for user in node.users if isinstance(value(user), Tensor) and user.target not in runtime.BOUNDARY]
        if not users:
            continue
        with gm.graph.inserting_after(node):
            dense = gm.graph.call_function(runtime.read, (node, provider))
        example: PackedTensor = value(node)
        set_value(dense, example.new_empty(example.shape))
        for user in users:
            user.replace_input_with(node, dense)
        count += 1
    return count
