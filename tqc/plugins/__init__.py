"""Methods from papers as plugins. A file of this folder with a `PLUGIN` is one, and so is what another package names in
the entry-point group `tqc.plugins`:

    [project.entry-points."tqc.plugins"]
    mine = "my_package.mine:Mine"

`plugin` says what a plugin is, `scorer` what scores the tokens of a cache. They know torch alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from tqc.plugins.plugin import Plugin, nearest, parse
from tqc.plugins.scorer import Scorer

GROUP = "tqc.plugins"


@cache
def plugins() -> dict[str, type[Plugin]]:
    """All plugins there are, by name.

    Raises:
        ValueError: if two have one name, or if an entry point names something else.
    """
    modules = (importlib.import_module(f"tqc.plugins.{module.name}") for module in pkgutil.iter_modules(__path__))
    own = [module.PLUGIN for module in modules if hasattr(module, "PLUGIN")]
    others = [point.load() for point in importlib.metadata.entry_points(group=GROUP)]
    found: dict[str, type[Plugin]] = {}
    for plugin in (*own, *others):
        if not (isinstance(plugin, type) and issubclass(plugin, Plugin) and plugin.name):
            raise ValueError(
                f"an entry point of {GROUP} must name a subclass of Plugin that has a name; got {plugin!r}"
            )
        if found.setdefault(plugin.name, plugin) is not plugin:
            raise ValueError(f"two plugins are called {plugin.name!r}: {found[plugin.name]} and {plugin}")
    return dict(sorted(found.items()))


def make(kind: str, name: Any, parameters: Mapping[str, Any] | None = None) -> Plugin:
    """The plugin of that kind and name.

    Raises:
        ValueError, TypeError: naming what is unknown or not allowed, and the nearest names.
    """
    known = {plugin.name: plugin for plugin in plugins().values() if plugin.kind == kind}
    if name not in known:
        raise ValueError(f"{kind} must be one of {', '.join(known)}; got {name!r}{nearest(name, known)}")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise TypeError(f"{kind}_kwargs must be a dict, got {parameters!r}")
    return known[name].of(parameters or {})


@cache
def scorer_of(text: str) -> Scorer:
    """The scorer that a format names. Raises ValueError, TypeError."""
    return cast(Scorer, make(Scorer.kind, *parse(text)))
