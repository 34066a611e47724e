"""Looking up what a version may lack."""

from __future__ import annotations

import importlib
from typing import Any

ABSENT = object()


def find(path: str, default: Any = None) -> Any:
    """What a dotted path leads to, modules on the way imported; `default` if this version has no such thing."""
    names = path.split(".")
    try:
        found: Any = importlib.import_module(names[0])
        for index, name in enumerate(names[1:], 2):
            if not hasattr(found, name):
                importlib.import_module(".".join(names[:index]))
            found = getattr(found, name)
    except Exception:  # an import fails by whatever a machine lacks: Inductor's own, where the locale is ASCII
        return default
    return found
