"""Pass: the rotation of values moves out of the kernels, into the weights on either side of attention."""

from __future__ import annotations

import operator
from collections import defaultdict

from torch.fx import GraphModule, Node

from tqc.execute import calls as runtime
from tqc.execute.folded_weights import Fold, fold_weight
from tqc.passes.edit import set_value
from tqc.passes.finders.projections import weights_of
from tqc.passes.graph import value
from tqc.passes.plan import FUSE, PACK, Plan, Site


def fold_rotation(gm: GraphModule, plan: Plan) -> int:
    """Hand the values of each folded cache over in its rotated basis, and take the output back from there.

    Before:
        v = linear(x, v_weight, v_bias).view(...).transpose(1, 2)
        out = attention(q, cat([k_cache, k], -2), cat([v_cache, v], -2))
        y = linear(out.transpose(1, 2).reshape(...), o_weight, o_bias)
    After:
        v_folded, v_bias_folded, o_folded = folded_weights([v_weight, v_bias, o_weight], ...)
        v = linear(x, v_folded, v_bias_folded).view(...).transpose(1, 2)
        out = attention(q, cat([k_cache, k], -2), cat([v_cache, v], -2))
        y = linear(out.transpose(1, 2).reshape(...), o_folded, o_bias)

    Attention is linear in its values, head by head, so this is exact. A cache may come folded to a site whose layers
    are not known: there the vectors themselves are rotated, by `fold` and `unfold`. Weights that the graph owns
    (`get_attr`) are replaced for good.

    Must run first: the others put nodes of their own where the sites' values and outputs are.
    """
    sites = [site for site in plan.sites if site.action in (FUSE, PACK) and site.v_fmt and site.v_fmt.folded]
    layers: dict[tuple[Node, Fold], list[Node]] = defaultdict(list)
    rotated: dict[Node, Node] = {}
    for site in sites:
        assert site.v_fmt and site.value
        spec, new = site.v_fmt.spec, site.value.new
        if site.v_proj:
            for weight in weights_of(site.v_proj.linear):
                layers[weight, (0, site.v_proj.start, site.v_proj.stop, spec)].append(site.v_proj.linear)
        elif new is not None:
            if new not in rotated:
                rotated[new] = _rotate(gm, site, new)
            site.value.new = rotated[new]
        if site.o_proj:
            weight = weights_of(site.o_proj.linear)[0]
            layers[weight, (1, site.o_proj.start, site.o_proj.stop, spec)].append(site.o_proj.linear)
        else:
            _rotate_back(gm, site)
    folded = _fold_weights(gm, list(layers), anew=any(site.action == PACK for site in sites))
    for (weight, fold), linears in layers.items():
        for linear in linears:
            linear.replace_input_with(weight, folded[weight, fold])
    return len(sites)


def _fold_weights(gm: GraphModule, wanted: list[tuple[Node, Fold]], anew: bool) -> dict[tuple[Node, Fold], Node]:
    """Nodes of the folded weights: one call makes all of them, above everything else, so that it cuts no region."""
    given = [(weight, fold) for weight, fold in wanted if weight.op == "placeholder"]
    nodes: dict[tuple[Node, Fold], Node] = {}
    with gm.graph.inserting_before(next(node for node in gm.graph.nodes if node.op != "placeholder")):
        if given:
            weights, folds = [weight for weight, _ in given], [fold for _, fold in given]
            call = gm.graph.call_function(runtime.folded_weights, (weights, folds, anew))
            for index, key in enumerate(given):
                nodes[key] = gm.graph.call_function(operator.getitem, (call, index))
                set_value(nodes[key], value(key[0]).new_empty(value(key[0]).shape))
        for weight, fold in wanted:
            if weight.op == "get_attr":
                name = f"_folded_{len(nodes)}"
                gm.register_buffer(name, fold_weight(operator.attrgetter(str(weight.target))(gm), fold))
                nodes[weight, fold] = gm.graph.get_attr(name)
                nodes[weight, fold].meta.update(weight.meta)
    return nodes


def _rotate(gm: GraphModule, site: Site, new: Node) -> Node:
    assert site.v_fmt
    with gm.graph.inserting_before(site.attention.output):
        node = gm.graph.call_function(runtime.fold, (new, site.v_fmt.spec))
    set_value(node, value(new).new_empty(value(new).shape))
    return node


def _rotate_back(gm: GraphModule, site: Site) -> None:
    assert site.v_fmt
    output = site.attention.output
    with gm.graph.inserting_after(output):
        node = gm.graph.call_function(runtime.unfold, (output, site.v_fmt.spec))
    set_value(node, value(output).transpose(1, 2).contiguous().transpose(1, 2))
    output.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
