"""Make `torch.compile(model, backend="tqai").generate(...)` run the compiled model.

What `torch.compile` returns hands out the methods of the module it wraps, bound to that module: `generate` then calls
the module itself, uncompiled, and a user gets no compression and no word about it. `install` gives it an attribute
look-up that, for this backend alone, returns methods which see the compiled call while they run, in their own thread.
The wrapped module is otherwise left as it was, so it still runs dense when called by its own name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from tqc import inner_models, torch_private
from tqc.config import options_of_mode, read_widths
from tqc.inner_models import Calls

# Options of diffusion transformers, which `tqc.compile_pipeline` has as arguments.
SHARING = frozenset({"strategy", "strategy_kwargs", "scorer", "cfg_sharing", "skip_layers", "plan", "state_bits"})
_backend: Callable[..., Any] | None = None
# By compiled module, and not in it: a copy of it has calls of its own.
_calls: WeakKeyDictionary[Any, Calls] = WeakKeyDictionary()


def install(backend: Callable[..., Any]) -> None:
    """Look for models compiled by `backend` from now on; more than once does nothing more."""
    global _backend
    _backend = backend
    torch_private.patch_attributes(_getattr)
    torch_private.patch_compile(_read_widths, _compiled_in_place)


def _read_widths(function: Any, context: Any) -> None:
    """Put the widths in the place of their file's name, before dynamo compares options: models whose options are equal
    share graphs, and a file may change."""
    found = torch_private.backend_of(context)
    if found is None or found[0] is not _backend:
        return
    options = found[1].get("options") or {}
    if options.get("widths") is None:
        return
    widths = read_widths(options["widths"])
    found[1]["options"] = {**options, "widths": widths}
    text_config = getattr(getattr(getattr(function, "__self__", None), "config", None), "get_text_config", None)
    layers = getattr(text_config(), "num_hidden_layers", None) if text_config else None
    if isinstance(layers, int):
        widths.check_model(layers)


def _compiled_in_place(module: torch.nn.Module, context: Any) -> Callable[..., Any] | None:
    """What stands for the module's compiled call, if anything does."""
    options = options_of(context)
    if options is None:
        inner_models.release(module)
    elif not SHARING.isdisjoint(options) and "timestep" in inspect.signature(module.forward).parameters:
        # By name: what compiles diffusion transformers stands on the backend, which stands on this file.
        sharing = importlib.import_module("tqc.diffusion.pipeline")
        return sharing.compile_transformer(module, options)
    else:
        inner_models.compile_in_place(module, context)
    return None


def _getattr(original: Callable[..., Any], compiled: Any, name: str) -> Any:
    attribute = original(compiled, name)
    if (
        isinstance(attribute, types.MethodType)
        and not hasattr(torch.nn.Module, name)
        and not name.startswith("_")
        and any(attribute.__self__ is module for module in compiled.__dict__["_modules"]["_orig_mod"].modules())
        and options_of(compiled) is not None
    ):
        return with_compiled_call(compiled, attribute)
    return attribute


def with_compiled_call(compiled: Any, method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` of the module that `compiled` wraps, such that the module's own calls in this thread run compiled
    meanwhile, and those of what generates inside it."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        calls = _calls.get(compiled)
        if calls is None:
            calls = _calls[compiled] = Calls.of(compiled._orig_mod, compiled.dynamo_ctx)
        name = method.__name__
        if calls.called or not name.startswith("generate") or inner_models.calls_its_module(method):
            with calls.used():
                return method(*args, **kwargs)
        with calls.noting():
            result = method(*args, **kwargs)
        calls.warn_if_unused(name)
        return result

    return run


def options_of(model: Any) -> Mapping[str, Any] | None:
    """The options that `model` was compiled with for this backend, or that a context of dynamo compiles with; None if
    it is another's."""
    found = torch_private.backend_of(model)
    if found is None or found[0] is not _backend:
        return None
    return {**options_of_mode(found[1].get("mode")), **(found[1].get("options") or {})}
