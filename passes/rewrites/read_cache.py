"""Pass: whatever still reads a packed cache as if it were dense gets dense values."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule

from tqc.cache.packed_tensor import PackedTensor
from tqc.execute import calls as runtime
from tqc.passes.edit import set_value
from tqc.passes.graph import is_packed, value, writers
from tqc.passes.plan import Plan


def read_cache(gm: GraphModule, plan: Plan) -> int:
    """Decode each packed input that an op other than ours reads.

    Before:
        y = some_op(k_cache)
    After:
        dense = read(k_cache); y = some_op(dense)

    Must run last: the other passes turn reads into fused ones. The sites where this happens are correct but slow, and
    the plan says why they were not understood. A write in place stays, and what comes behind it reads anew.
    """
    count = 0
    provider = next((site.provider for site in plan.sites if site.provider), "reference")
    for node in list(gm.graph.nodes):
        if node.op != "placeholder" or not is_packed(node):
            continue
        example: PackedTensor = value(node)
        writes = writers(node)
        users = [user for user in node.users if isinstance(value(user), Tensor) and user.target not in runtime.BOUNDARY]
        dense = None
        for user in users:
            if user in writes or user.op == "output":
                continue
            if dense is None or writes:
                with gm.graph.inserting_before(user):
                    dense = gm.graph.call_function(runtime.read, (node, provider))
                set_value(dense, example.new_empty(example.shape))
            user.replace_input_with(node, dense)
        count += dense is not None
    return count
