"""Pass: the rotation of values moves out of the kernels, into the weights on either side of attention."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tqc import ops
from tqc.passes.edit import insert
from tqc.passes.finders.projections import Projection, weights_of
from tqc.passes.plan import FUSE, PACK, Plan


def fold_rotation(gm: GraphModule, plan: Plan) -> int:
    """Hand the values of each folded cache over in its rotated basis, and take the output back from there.

    Before:
        v = linear(x, v_weight, v_bias).view(...).transpose(1, 2)
        out = attention(q, cat([k_cache, k], -2), cat([v_cache, v], -2))
        y = linear(out.transpose(1, 2).reshape(...), o_weight, o_bias)
    After:
        v = linear(x, fold(v_weight, spec, 0), fold(v_bias, spec, 0)).view(...).transpose(1, 2)
        out = attention(q, cat([k_cache, k], -2), cat([v_cache, v], -2))
        y = linear(out.transpose(1, 2).reshape(...), fold(o_weight, spec, 1), o_bias)

    Attention is linear in its values, head by head, so this is exact. A cache may come folded to a site whose layers
    are not known: there the vectors themselves are rotated, by `fold` and `unfold`. Weights that the graph owns
    (`get_attr`) are replaced for good.

    Must run first: the others put nodes of their own where the sites' values and outputs are.
    """
    sites = [site for site in plan.sites if site.action in (FUSE, PACK) and site.v_fmt and site.v_fmt.folded]
    folded: dict[tuple[Any, ...], Node] = {}
    for site in sites:
        assert site.v_fmt and site.value
        spec, new = site.v_fmt.spec, site.value.new
        if site.v_proj:
            for weight in weights_of(site.v_proj.linear):
                _fold_weight(gm, site.v_proj, weight, (spec, 0, site.v_proj.start, site.v_proj.stop), folded)
        elif new is not None:
            if (new, spec) not in folded:
                with gm.graph.inserting_before(new.next):
                    folded[new, spec] = insert(gm.graph, ops.fold, new, spec)
            site.value.new = folded[new, spec]
            (site.value.operation or site.value.node).replace_input_with(new, folded[new, spec])
        if site.o_proj:
            weight = weights_of(site.o_proj.linear)[0]
            _fold_weight(gm, site.o_proj, weight, (spec, 1, site.o_proj.start, site.o_proj.stop), folded)
        else:
            output = site.attention.output
            with gm.graph.inserting_before(output.next):
                back = insert(gm.graph, ops.unfold, output, spec)
            output.replace_all_uses_with(back, lambda user, back=back: user is not back)
    return len(sites)


def _fold_weight(
    gm: GraphModule, layer: Projection, weight: Node, fold: tuple[Any, ...], folded: dict[tuple[Any, ...], Node]
) -> None:
    key = (weight, *fold)
    if key not in folded:
        # Above everything else, so that it cuts no region.
        with gm.graph.inserting_before(next(node for node in gm.graph.nodes if node.op != "placeholder")):
            if weight.op == "get_attr":
                name = f"_folded_{len(folded)}"
                with torch.no_grad():
                    gm.register_buffer(name, ops.fold(operator.attrgetter(str(weight.target))(gm).detach(), *fold))
                node = gm.graph.get_attr(name)
                node.meta.update(weight.meta)
            else:
                node = insert(gm.graph, ops.fold, weight, *fold)
        folded[key] = node
    layer.linear.replace_input_with(weight, folded[key])
