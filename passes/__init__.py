"""Graph to graph: find attention and cache writes, give the caches a packed type, fuse the reads into attention.

`rewrite` looks at the graph once (`plan.py`), then applies PASSES in order. A pass is a function `(gm, plan) -> int`
that returns how many sites it rewrote; its docstring shows before and after, and says what it must follow.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torch.fx import GraphModule

from tqc.config import Config
from tqc.passes.edit import erase_unused_sizes
from tqc.passes.plan import Plan, make_plan
from tqc.passes.rewrites.fold_rotation import fold_rotation
from tqc.passes.rewrites.fuse_attention import fuse_attention
from tqc.passes.rewrites.pack_cache import pack_cache
from tqc.passes.rewrites.read_cache import read_cache

log = logging.getLogger(__name__)

PASSES: list[Callable[[GraphModule, Plan], int]] = [
    fold_rotation,  # first: it changes which nodes are a site's values and output
    fuse_attention,  # before the others: it needs the cache writes as the model spelled them
    pack_cache,  # caches that start in this graph
    read_cache,  # last: whatever still reads a packed cache as if it were dense
]


def rewrite(gm: GraphModule, config: Config, number: int = 0) -> Plan:
    """Apply every pass to `gm` in place; `number` tells graphs apart in `config.debug_dir`."""
    plan = make_plan(gm, config)
    for site in plan.sites:
        log.info("%s", site)
    for order, graph_pass in enumerate(PASSES):
        name = graph_pass.__name__
        _dump(gm, config, f"graph{number}.{order}.{name}.before.py")
        plan.rewritten[name] = graph_pass(gm, plan)
        erase_unused_sizes(gm.graph)
        gm.graph.lint()
        gm.recompile()
        _dump(gm, config, f"graph{number}.{order}.{name}.after.py")
        log.info("graph %d: %s rewrote %d", number, name, plan.rewritten[name])
    return plan


def _dump(gm: GraphModule, config: Config, name: str) -> None:
    if config.debug_dir is None:
        return
    folder = Path(config.debug_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(gm.print_readable(print_output=False))
