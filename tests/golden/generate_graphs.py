"""Writes the graphs of docs/from_compile_to_kernel.md, between its markers: python tests/golden/generate_graphs.py."""

from __future__ import annotations

import inspect
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from tqc import backend, report
from tqc.cache.packed_tensor import pack
from tqc.config import Config
from tqc.execute.split_graph import SplitGraph
from tqc.ops import example, set_example
from tqc.ops.text import graph_text

PAGE = Path(__file__).parents[2] / "docs" / "from_compile_to_kernel.md"
BLOCK = re.compile(r"(<!-- graphs:begin (\w+) -->\n).*?(<!-- graphs:end -->)", re.DOTALL)

HEADS, HEAD_DIM, PAST = 2, 8, 40
OPTIONS = {"provider": "reference", "rest": "eager", "bits_k": 4, "bits_v": 2, "sink_tokens": 4, "residual_window": 32}
K_FORMAT, V_FORMAT = Config.from_options(OPTIONS).formats(HEAD_DIM, HEAD_DIM)


def step(query: Tensor, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, is_causal: bool) -> Any:
    keys = torch.cat([k_cache, key], dim=-2)
    values = torch.cat([v_cache, value], dim=-2)
    out = F.scaled_dot_product_attention(query, keys, values, is_causal=is_causal)
    return out, keys, values


def layer(
    x: Tensor, query: Tensor, key: Tensor, v_weight: Tensor, o_weight: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Any:
    value = F.linear(x, v_weight).view(1, 1, 2, 8).transpose(1, 2)
    out, keys, values = step(query, key, value, k_cache, v_cache, False)
    return F.linear(out.transpose(1, 2).reshape(1, 1, 16), o_weight), keys, values


def source(function: Callable[..., Any]) -> str:
    return f"```python\n{inspect.getsource(function)}```\n"


def prefill() -> str:
    inputs = (torch.zeros(1, HEADS, n, HEAD_DIM) for n in (PAST, PAST, PAST, 0, 0))
    return graphs(["traced", "pack_cache", "realized"], step, *inputs, True)


def decode() -> str:
    caches = (pack(torch.zeros(1, HEADS, PAST, HEAD_DIM), fmt) for fmt in (K_FORMAT, V_FORMAT))
    inputs = (torch.zeros(1, HEADS, 1, HEAD_DIM) for _ in range(3))
    return graphs(["traced", "fuse_attention", "realized"], step, *inputs, *caches, False)


def fold() -> str:
    caches = (pack(torch.zeros(1, HEADS, PAST, HEAD_DIM), f) for f in (K_FORMAT, replace(V_FORMAT, folded=True)))
    size = HEADS * HEAD_DIM
    x, weights = torch.zeros(1, 1, size), (nn.Parameter(torch.zeros(size, size)) for _ in range(2))
    query, key = (torch.zeros(1, HEADS, 1, HEAD_DIM) for _ in range(2))
    return graphs(["fold_rotation", "cut"], layer, x, query, key, *weights, *caches, fold_values=True)


SECTIONS: dict[str, Callable[[], str]] = {
    "step": lambda: source(step),
    "prefill": prefill,
    "decode": decode,
    "layer": lambda: source(layer),
    "fold": fold,
}


TITLES = {"traced": "What dynamo traced", "realized": "Realized", "cut": "Cut into regions"}


def graphs(stages: list[str], function: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The graph of a call as some stages of the compiler leave it; its inputs, which all have in common, only once."""
    texts: dict[str, str] = {}

    def realize(gm: GraphModule, requested: str) -> Any:
        choices = original(gm, requested)
        texts["realized"] = text(gm.graph)
        return choices

    def split(gm: GraphModule, *rest: Any, **named: Any) -> SplitGraph:
        graph = SplitGraph(gm, *rest, **named)
        texts["cut"] = text(graph.outer.graph)
        return graph

    def compile_renamed(gm: GraphModule, inputs: list[Any]) -> Any:
        for node in gm.graph.find_nodes(op="placeholder"):
            node.name = node.name.removeprefix("l_").removesuffix("_")
        return backend.tqai(gm, inputs, options={**OPTIONS, **options})

    original = backend.realize
    torch._dynamo.reset()
    with mock.patch.object(backend, "realize", realize), mock.patch.object(backend, "SplitGraph", split):
        with report.collect(texts=True) as plans, torch.no_grad():
            torch.compile(function, backend=compile_renamed, dynamic=False)(*args)
    torch._dynamo.reset()
    (plan,) = plans
    texts |= plan.texts
    inputs = texts[stages[0]].partition("):\n")[0]
    blocks = []
    for stage in stages:
        its_inputs, _, body = texts[stage].partition("):\n")
        assert its_inputs == inputs
        shown = texts[stage] if stage is stages[0] else "    ...\n" + body
        blocks.append(f"{TITLES.get(stage, f'After `{stage}`')}:\n```text\n{shown}```\n")
    return "\n".join(blocks)


def text(graph: Graph) -> str:
    """As `graph_text`; a call of several results has no type of its own, so it gets those of its parts."""
    for node in graph.nodes:
        parts = {user.args[1]: example(user) for user in node.users if user.target is operator.getitem}
        if parts and example(node) is None:
            set_example(node, tuple(parts[index] for index in sorted(parts)))
    return graph_text(graph)


def render(page: str) -> str:
    """A page with the text between its markers made anew.

    Raises:
        ValueError: if its sections are not those that there are.
    """
    found = [name for _, name, _ in BLOCK.findall(page)]
    if found != list(SECTIONS):
        raise ValueError(f"{PAGE.name} must have sections {', '.join(SECTIONS)} in this order, has {', '.join(found)}")
    return BLOCK.sub(lambda block: f"{block[1]}{SECTIONS[block[2]]()}{block[3]}", page)


def main() -> None:
    committed = PAGE.read_text()
    page = render(committed)
    PAGE.write_text(page)
    print(f"{PAGE.name}: {'as it was' if page == committed else 'written'}", file=sys.stderr)


if __name__ == "__main__":
    main()
