"""Make `torch.compile(model, backend="tqai").generate(...)` run the compiled model.

`OptimizedModule` hands out the methods of the module it wraps, bound to that module: `generate` then calls the module
itself, uncompiled, and a user gets no compression and no word about it. Importing the backend gives `OptimizedModule`
an attribute look-up that, for this backend alone, returns methods which see the compiled call while they run. The
wrapped module is otherwise left as it was, so it still runs dense when called by its own name.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule, _TorchDynamoContext, innermost_backend

from tqc.config import options_of_mode

_plain_getattr = OptimizedModule.__getattr__


def install() -> None:
    """Replace `OptimizedModule.__getattr__`; more than once does nothing more."""
    OptimizedModule.__getattr__ = _getattr  # type: ignore[method-assign]


def _getattr(self: OptimizedModule, name: str) -> Any:
    attribute = _plain_getattr(self, name)
    if (
        isinstance(attribute, types.MethodType)
        and attribute.__self__ is self.__dict__["_modules"]["_orig_mod"]
        and not hasattr(torch.nn.Module, name)
        and not name.startswith("_")
        and _options(self.__dict__.get("dynamo_ctx")) is not None
    ):
        return with_compiled_call(self, attribute)
    return attribute


def with_compiled_call(compiled: OptimizedModule, method: types.MethodType) -> Callable[..., Any]:
    """`method` of the module that `compiled` wraps, such that the module's own calls run compiled meanwhile."""
    module: torch.nn.Module = method.__self__  # type: ignore[assignment]

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        call = compiled.__dict__.get("_tqai_call")
        if call is None:
            call = compiled.__dict__["_tqai_call"] = compiled.dynamo_ctx(module._call_impl)
        before = module._compiled_call_impl
        module._compiled_call_impl = call
        try:
            return method(*args, **kwargs)
        finally:
            module._compiled_call_impl = before

    return run


def options_of(model: torch.nn.Module) -> Mapping[str, Any] | None:
    """The options that `model` was compiled with for this backend; None if it was not."""
    if isinstance(model, OptimizedModule):
        return _options(model.dynamo_ctx)
    # `Module.compile` keeps a function whose closure holds the dynamo context, and no other trace of it.
    call = model.__dict__.get("_compiled_call_impl")
    cells = [cell.cell_contents for cell in getattr(call, "__closure__", None) or ()]
    return next((_options(cell) for cell in cells if isinstance(cell, _TorchDynamoContext)), None)


def _options(context: _TorchDynamoContext | None) -> Mapping[str, Any] | None:
    from tqc.backend import tqai

    if context is None or not callable(context.callback):
        return None
    backend = innermost_backend(context.callback)
    if getattr(backend, "compiler_fn", backend) is not tqai:
        return None
    given = getattr(backend, "kwargs", {})
    return {**options_of_mode(given.get("mode")), **(given.get("options") or {})}
