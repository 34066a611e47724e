"""Make `torch.compile(model, backend="tqai").generate(...)` run the compiled model.

What `torch.compile` returns hands out the methods of the module it wraps, bound to that module: `generate` then calls
the module itself, uncompiled, and a user gets no compression and no word about it. `install` gives it an attribute
look-up that, for this backend alone, returns methods which see the compiled call while they run, in their own thread.
The wrapped module is otherwise left as it was, so it still runs dense when called by its own name.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tqc import torch_private
from tqc.config import options_of_mode

_backend: Callable[..., Any] | None = None


def install(backend: Callable[..., Any]) -> None:
    """Look for models compiled by `backend` from now on; more than once does nothing more."""
    global _backend
    _backend = backend
    torch_private.patch_attributes(_getattr)


def _getattr(original: Callable[..., Any], compiled: Any, name: str) -> Any:
    attribute = original(compiled, name)
    if (
        isinstance(attribute, types.MethodType)
        and attribute.__self__ is compiled.__dict__["_modules"]["_orig_mod"]
        and not hasattr(torch.nn.Module, name)
        and not name.startswith("_")
        and options_of(compiled) is not None
    ):
        return with_compiled_call(compiled, attribute)
    return attribute


def with_compiled_call(compiled: Any, method: types.MethodType) -> Callable[..., Any]:
    """`method` of the module that `compiled` wraps, such that the module's own calls in this thread run
    compiled meanwhile."""
    module: torch.nn.Module = method.__self__  # type: ignore[assignment]

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        call = compiled.__dict__.get("_tqai_call")
        if call is None:
            call = compiled.__dict__["_tqai_call"] = torch_private.compiled_call(compiled, module)
        with torch_private.called_through(module, call):
            return method(*args, **kwargs)

    return run


def options_of(model: torch.nn.Module) -> Mapping[str, Any] | None:
    """The options that `model` was compiled with for this backend; None if it was not."""
    found = torch_private.backend_of(model)
    if found is None or found[0] is not _backend:
        return None
    return {**options_of_mode(found[1].get("mode")), **(found[1].get("options") or {})}
