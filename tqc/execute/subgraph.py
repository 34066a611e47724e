"""Taking consecutive nodes of a graph out, as a module of their own."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph, GraphModule, Node


def interface(nodes: Sequence[Node]) -> tuple[list[Node], list[Node]]:
    """Nodes that `nodes` read from outside, in order of first use, and those of them that others read.

    Constants of the graph (`get_attr`) are no inputs: they go with the nodes that read them.
    """
    members = set(nodes)
    sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in members)
    outputs = [node for node in nodes if any(user not in members for user in node.users)]
    return [source for source in sources if source.op != "get_attr"], outputs


def extract(gm: GraphModule, nodes: Sequence[Node], inputs: Sequence[Node], outputs: Sequence[Node]) -> GraphModule:
    """A module of copies of `nodes`, and of what they take from `gm`: it takes `inputs` and returns a tuple.

    `torch.fx.passes.utils.fuser_utils.fuse_as_graphmodule` does the same for inputs that it finds itself, at more than
    the cost of all else that is done to a graph here.
    """
    graph = Graph()
    env: dict[Node, Node] = {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in env:
                env[source] = graph.node_copy(source)
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(tuple(env[node] for node in outputs))
    return GraphModule(gm, graph)
