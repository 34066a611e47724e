"""Graph to graph: find attention and cache writes, give the caches a packed type, fuse the reads into attention.

`rewrite` looks at the graph once (`plan.py`, with what `finders` know), then applies PASSES in order and verifies the
graph behind each. A pass is a function `(gm, plan) -> int` that returns how many sites it rewrote; its docstring shows
before and after, and says what it must follow. The rewritten graph holds torch ops and those of `tqc.ops`, no others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torch.fx import GraphModule

from tqc.config import Config
from tqc.ops.text import graph_text
from tqc.passes.edit import erase_unused
from tqc.passes.plan import Plan, make_plan
from tqc.passes.rewrites.fold_rotation import fold_rotation
from tqc.passes.rewrites.fuse_attention import fuse_attention
from tqc.passes.rewrites.pack_cache import pack_cache
from tqc.passes.rewrites.read_cache import read_cache
from tqc.passes.verify import verify

log = logging.getLogger(__name__)

PASSES: list[Callable[[GraphModule, Plan], int]] = [
    fold_rotation,  # first: it changes which nodes are a site's values and output
    fuse_attention,  # before the others: it needs the cache writes as the model spelled them
    pack_cache,  # caches that start in this graph
    read_cache,  # last: whatever still reads a packed cache as if it were dense
]


def rewrite(gm: GraphModule, config: Config, number: int = 0, keep_texts: bool = False) -> Plan:
    """Apply every pass to `gm` in place.

    Args:
        number: tells graphs apart in `config.debug_dir`.
        keep_texts: whether the plan shall hold the graph as text before and after each pass.

    Raises:
        InvalidGraph: if a pass left a graph that no target can realize.
    """
    plan = make_plan(gm, config)
    keep_texts = keep_texts or config.debug_dir is not None
    if keep_texts:
        plan.texts["traced"] = graph_text(gm.graph)
    for site in plan.sites:
        log.info("%s", site)
    for graph_pass in PASSES:
        name = graph_pass.__name__
        plan.rewritten[name] = graph_pass(gm, plan)
        erase_unused(gm)
        gm.graph.lint()
        verify(gm, name, finished=graph_pass is PASSES[-1])
        if keep_texts and plan.rewritten[name]:
            plan.texts[name] = graph_text(gm.graph)
        log.info("graph %d: %s rewrote %d", number, name, plan.rewritten[name])
    gm.recompile()
    if config.debug_dir is not None:
        folder = Path(config.debug_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for order, (name, text) in enumerate(plan.texts.items()):
            (folder / f"graph{number}.{order}.{name}.txt").write_text(text, "utf-8")
    return plan
