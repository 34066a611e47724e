"""A realized graph that runs as compiled regions and instructions in turn."""

from __future__ import annotations

import logging
import threading
from typing import Any

from torch.fx import GraphModule

from tqc.execute import chains
from tqc.execute.aliasing import shared_writes
from tqc.execute.regions import split

log = logging.getLogger(__name__)


class SplitGraph:
    """A realized graph, cut into regions; layers in a row are one call where their provider can run such.

    A graph whose regions are all static runs eagerly once and is compiled at its second call: dynamo makes such
    graphs for lengths that it meets only once. Any other graph is compiled at once, while dynamo still collects the
    guards that Inductor adds, and so is one that is wanted `at_once`.
    """

    def __init__(self, gm: GraphModule, rest: str, at_once: bool = False) -> None:
        outside = shared_writes(gm.graph) if rest == "inductor" else set()
        if outside:
            log.warning(
                "%d operations run uncompiled: what is written in place is seen through views across attention",
                len(outside),
            )
        self.regions, self.outer = split(gm, outside)
        self.chains = chains.link(self.outer) if rest == "inductor" else []
        self._forward = self.outer.forward
        self._calls = 0
        self._compiling = threading.Lock()
        self._lazy = rest == "inductor"
        if self._lazy and (at_once or any(region.symbolic for region in self.regions)):
            self.compile()

    def compile(self) -> None:
        self._lazy = False
        for region in self.regions:
            region.compile_with_inductor()
        for chain in self.chains:
            chain.compile_with_provider()

    def __call__(self, *args: Any) -> Any:
        if self._lazy:
            with self._compiling:
                self._calls += 1
                if self._lazy and self._calls > 1:
                    self.compile()
        return self._forward(*args)
