"""Models whose `generate` calls another model inside: BLIP-2's language model, Bark's three, the model in a wrapper.

The module that a user compiled is then never called. What has a `generate` of its own is called by itself, so that it
is compiled with the module around it; what dynamo traces from the outer call is not changed by that. Where `generate`
calls something else again, nothing is packed, and a warning says so after the first time.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from tqc import torch_private

log = logging.getLogger(__name__)

# On what `compile_in_place` leaves in a module: the call of one that is compiled with the module around it, a watch.
_WITH_OUTER = "_tqai_with_outer"


def generating(module: torch.nn.Module) -> list[torch.nn.Module]:
    """What generates by itself inside `module`; not what the user compiled by itself."""
    return [
        inner
        for inner in module.modules()
        if inner is not module
        and callable(getattr(type(inner), "generate", None))
        and (torch_private.get_compiled(inner) is None or hasattr(torch_private.get_compiled(inner), _WITH_OUTER))
    ]


def compiled_inside(module: torch.nn.Module) -> dict[torch.nn.Module, Callable[..., Any]]:
    """The compiled calls of `module` and of what is inside it."""
    return {inner: call for inner in module.modules() if (call := torch_private.get_compiled(inner))}


class Calls:
    """The compiled calls of a module and of what is inside it.

    Attributes:
        called: names of the modules that `noting` saw called, of those that are not compiled only if from outside of
            any other; "" is the module itself.
    """

    def __init__(self, module: torch.nn.Module, compiled: Mapping[torch.nn.Module, Callable[..., Any]]) -> None:
        self.module, self.compiled = module, compiled
        self.called: list[str] = []

    @classmethod
    def of(cls, module: torch.nn.Module, context: Any, others: Iterable[torch.nn.Module] = ()) -> Calls:
        """The calls of `module`, of what generates inside it and of `others` as a context of dynamo compiles them."""
        ours = {m: torch_private.compiled_call(context, m) for m in (module, *generating(module), *others)}
        return cls(module, {**compiled_inside(module), **ours})

    def compiled_called(self) -> list[str]:
        return [name for name, inner in self.module.named_modules() if name in self.called and inner in self.compiled]

    def taking_caches(self) -> list[str]:
        """Of what was called, what takes a cache; all if nothing does."""
        takes = {name: inspect.signature(self.module.get_submodule(name).forward).parameters for name in self.called}
        return [name for name in takes if any("cache" in p or "past" in p for p in takes[name])] or self.called

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Modules are called through their compiled calls meanwhile."""
        with _through(self.compiled):
            yield

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """The same, and `called` is filled."""
        names = {inner: name for name, inner in self.module.named_modules()}
        depth = 0

        def noted(inner: torch.nn.Module) -> Callable[..., Any]:
            call = self.compiled.get(inner) or torch_private.call_of(inner)

            def run(*args: Any, **kwargs: Any) -> Any:
                nonlocal depth
                if (not depth or inner in self.compiled) and names[inner] not in self.called:
                    self.called.append(names[inner])
                depth += 1
                try:
                    return call(*args, **kwargs)
                finally:
                    depth -= 1

            return run

        with _through({inner: noted(inner) for inner in names}):
            yield

    def warn_if_unused(self, method: str) -> None:
        if self.compiled_called():
            return
        log.warning(
            "%s.%s does not call the module that was compiled, nor a model inside that generates by itself, so that "
            'nothing is packed. It calls %s: compile that by its own name, model.NAME.compile(backend="tqai")',
            type(self.module).__name__,
            method,
            ", ".join(self.taking_caches()) or "nothing in this thread",
        )


@contextlib.contextmanager
def _through(calls: Mapping[torch.nn.Module, Callable[..., Any]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module, call in calls.items():
            stack.enter_context(torch_private.called_through(module, call))
        yield


def compile_in_place(module: torch.nn.Module, context: Any) -> None:
    """To be called where `module.compile()` compiles the call of `module`: compiles for good what generates inside, and
    lets the first `module.generate` warn if nothing that is compiled was called."""
    for inner in generating(module):
        call = torch_private.compiled_call(context, inner)
        setattr(call, _WITH_OUTER, True)
        torch_private.set_compiled(inner, call)
    method = getattr(type(module), "generate", None)
    if method is None or calls_its_module(method):
        return

    @functools.wraps(method)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.pop("generate", None)
        calls = Calls(self, compiled_inside(self))
        if not calls.compiled:  # in a copy, which torch leaves uncompiled
            return method(self, *args, **kwargs)
        with calls.noting():
            result = method(self, *args, **kwargs)
        calls.warn_if_unused("generate")
        return result

    setattr(generate, _WITH_OUTER, True)
    # A method, which `copy.deepcopy` and `pickle` bind to the copy.
    module.__dict__["generate"] = types.MethodType(generate, module)


def release(module: torch.nn.Module) -> None:
    """Undo `compile_in_place`, where another backend now compiles `module`."""
    for inner in generating(module):
        torch_private.set_compiled(inner, None)
    if hasattr(module.__dict__.get("generate"), _WITH_OUTER):
        del module.__dict__["generate"]


def calls_its_module(method: Callable[..., Any]) -> bool:
    """Whether a `generate` is that of transformers, which calls its own module."""
    return method.__module__ == "transformers.generation.utils"


def generate_of(module: torch.nn.Module) -> Callable[..., Any] | None:
    """`module.generate` without what `compile_in_place` put there; None if it has none."""
    method = getattr(type(module), "generate", None)
    return types.MethodType(method, module) if method else getattr(module, "generate", None)
