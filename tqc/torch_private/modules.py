"""Modules that dynamo compiled: what is called, and with which backend."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tqc.torch_private.lookup import find
from tqc.torch_private.needs import OPTIONS, lacking


def patch_attributes(get: Callable[[Callable[..., Any], Any, str], Any]) -> None:
    """Let `get(original, module, name)` look up attributes of modules that `torch.compile` returns; the first call
    counts. `original` hands out methods of the wrapped module. No public way to have `generate` compiled."""
    cls = find("torch._dynamo.eval_frame.OptimizedModule")
    if cls is None or "_tqc_original" in cls.__dict__:
        return
    original = cls._tqc_original = cls.__getattr__
    cls.__getattr__ = lambda self, name: get(original, self, name)


def patch_compile(starting: Callable[[Any, Any], None], made: Callable[[torch.nn.Module, Any], Any]) -> None:
    """Let `starting(function, context)` know of each function or method that dynamo will compile, before it does, and
    `made(module, context)` of each module whose call `Module.compile` compiles from now on, the one that is being
    compiled included: the first `Module.compile` of a process is what loads this package. `backend_of` and
    `compiled_call` take the context. The first call counts. No public way."""
    cls = find("torch._dynamo.eval_frame.OptimizeContext")
    if cls is None or "_tqc_original" in cls.__dict__:
        return
    original = cls._tqc_original = cls.__call__

    def call(context: Any, function: Any) -> Any:
        starting(function, context)
        compiled = original(context, function)
        module = getattr(function, "__self__", None)
        if isinstance(module, torch.nn.Module) and getattr(function, "__func__", None) is torch.nn.Module._call_impl:
            return made(module, context) or compiled
        return compiled

    cls.__call__ = call


def compiled_call(context: Any, module: torch.nn.Module) -> Callable[..., Any]:
    """What runs the call of `module`, hooks included, as a context of dynamo compiles it: what `patch_compile` gives,
    or the `dynamo_ctx` of a module that `torch.compile` returned."""
    compile_call = getattr(type(context), "_tqc_original", type(context).__call__)
    return compile_call(context, module._call_impl)


def call_of(module: torch.nn.Module) -> Callable[..., Any]:
    """What a call of `module` in this thread runs, compiled if it is. No public way."""
    call = module._compiled_call_impl
    return (call.of_this_thread() if isinstance(call, _CallByThread) else call) or module._call_impl


def get_compiled(module: torch.nn.Module) -> Callable[..., Any] | None:
    """What `Module.compile` made of the call of `module`, if anything. No public way."""
    call = module._compiled_call_impl
    return call.before if isinstance(call, _CallByThread) else call


def set_compiled(module: torch.nn.Module, call: Callable[..., Any] | None) -> None:
    """Calls of `module` go through `call` from now on; None undoes it, which `Module.compile` cannot."""
    ways = module._compiled_call_impl
    if isinstance(ways, _CallByThread):
        ways.before = call
    else:
        module._compiled_call_impl = call


class _CallByThread:
    """Calls of a module that goes another way in some threads; in all others it is called as it was before."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.before = module._compiled_call_impl
        self.plain = module._call_impl
        self.of_thread = threading.local()
        self.users = 0

    def of_this_thread(self) -> Callable[..., Any]:
        return getattr(self.of_thread, "call", None) or self.before or self.plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.of_this_thread()(*args, **kwargs)


_swapping = threading.Lock()


@contextlib.contextmanager
def called_through(module: torch.nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Calls of `module` in this thread go through `call` meanwhile; it may be so in several threads at once, and the
    last to leave puts back what was there. The public `Module.compile` does it for good and for all threads."""
    with _swapping:
        ways = module._compiled_call_impl
        if not isinstance(ways, _CallByThread):
            ways = module._compiled_call_impl = _CallByThread(module)
        ways.users += 1
    outer = getattr(ways.of_thread, "call", None)
    ways.of_thread.call = call
    try:
        yield
    finally:
        ways.of_thread.call = outer
        with _swapping:
            ways.users -= 1
            if not ways.users and module._compiled_call_impl is ways:
                module._compiled_call_impl = ways.before


def backend_of(model: Any) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """The backend that `torch.compile(model)` or `model.compile()` was given, and its keyword arguments; None if the
    model is not compiled. A context of dynamo may stand for the model. No public way."""
    if lacking(OPTIONS):
        return None
    from torch._dynamo.eval_frame import OptimizedModule, _TorchDynamoContext, innermost_backend

    if isinstance(model, _TorchDynamoContext):
        contexts: list[Any] = [model]
    elif isinstance(model, OptimizedModule):
        contexts = [model.__dict__.get("dynamo_ctx")]
    else:
        # `Module.compile` keeps a function whose closure holds the dynamo context, and no other trace of it.
        call = getattr(model, "__dict__", {}).get("_compiled_call_impl")
        contexts = [cell.cell_contents for cell in getattr(call, "__closure__", None) or ()]
    for context in contexts:
        if isinstance(context, _TorchDynamoContext) and callable(context.callback):
            backend = innermost_backend(context.callback)
            return getattr(backend, "compiler_fn", backend), getattr(backend, "kwargs", {})
    return None
