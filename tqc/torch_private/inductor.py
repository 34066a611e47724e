"""Compiling regions of a graph with Inductor, and calling what it compiled."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule

from tqc.torch_private.lookup import find
from tqc.torch_private.needs import CHAINS, DIRECT, PRODUCTS, REGIONS, STATE, lacking, note

Compiled: TypeAlias = Callable[..., Any]


def compile_fx(gm: GraphModule, examples: list[Any], config_patches: dict[str, Any] | None = None) -> Compiled:
    """A graph of dynamo as `torch.compile(backend="inductor")` compiles it; torch's notes on backends teach this way
    to it."""
    return torch._dynamo.lookup_backend("inductor")(gm, examples, config_patches=config_patches)  # type: ignore


def inductor_decompositions() -> dict[Any, Callable[..., Any]] | None:
    """Inductor's table of decompositions under its present configuration, or None. `core_aten_decompositions` is
    public, but another one."""
    if lacking(PRODUCTS):
        return None
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def inductor_compile(
    module: GraphModule,
    examples: list[Any],
    cpp_wrapper: bool = False,
    decompositions: dict[Any, Callable[..., Any]] | None = None,
) -> tuple[Compiled, int | None]:
    """`module` compiled, and the address of its entry if C++ can call it (see `entry_of`).

    Where it neither writes nor aliases its inputs, AOTAutograd's wrapper around the compiled code would do nothing for
    some 20 us a call, and is left out. No public way leaves it out: `torch._inductor.standalone_compile` is this
    `compile_fx` with the wrapper, on a copy of the module; AOTInductor's C interface takes exported programs and keeps
    the weights in its library, while layers that share a region give theirs as inputs.

    Args:
        examples: fake tensors and symbolic ints, one an input.
        decompositions: in place of Inductor's, from `inductor_decompositions`.
    """
    with torch.inference_mode(False), torch.no_grad():
        if lacking(REGIONS):
            return module.forward, None
        if lacking(DIRECT):  # without the decompositions: the key of AOTAutograd's cache does not hold them
            return compile_fx(module, examples), None
        return _compile_directly(module, examples, cpp_wrapper, decompositions)


def _compile_directly(
    module: GraphModule, examples: list[Any], cpp_wrapper: bool, decompositions: Any
) -> tuple[Compiled, int | None]:
    from torch._functorch import config as functorch_config
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor import compile_fx as inductor
    from torch._inductor import config as inductor_config

    compiled: list[Any] = []

    def inner_compile(gm: GraphModule, inputs: Any, **kwargs: Any) -> Any:
        result = inductor.compile_fx_inner(gm, inputs, **kwargs)
        compiled.append((result, len(inputs)))
        return result

    cpp_wrapper = cpp_wrapper and not lacking(CHAINS)
    context = TracingContext(detect_fake_mode(examples))
    # AOTAutograd's own cache would return the wrapper without asking for the code inside; Inductor's stays on.
    with (
        tracing(context),
        functorch_config.patch(enable_autograd_cache=False),
        inductor_config.patch(cpp_wrapper=True) if cpp_wrapper else contextlib.nullcontext(),
    ):
        # Not by `lookup_backend`, which starts a pool of processes for Triton's compiler.
        function = inductor.compile_fx(module, examples, inner_compile=inner_compile, decompositions=decompositions)
    if len(compiled) != 1 or not _is_plain(context) or compiled[0][1] != len(examples):
        return function, None
    code = compiled[0][0]
    return lambda *args: code(list(args)), entry_of(code) if cpp_wrapper else None


def _is_plain(context: Any) -> bool:
    """Whether inputs and outputs of the code compiled last in a tracing context are just those of the graph."""
    metadata = getattr(context, "fw_metadata", None)
    counts = ("num_mutated_inp_runtime_indices", "num_outputs_aliased", "num_intermediate_bases", "tokens")
    return all(not getattr(metadata, count, True) for count in counts)


# void inductor_entry_impl(AtenTensorHandle* inputs, AtenTensorHandle* outputs), as gcc and clang name it.
ENTRY = "_Z19inductor_entry_implPP16AtenTensorOpaqueS1_"


def entry_of(code: Any) -> int | None:
    """Address of the C++ function in code that Inductor compiled with `cpp_wrapper`, or None if Python must call it.

    It takes over the handles of its inputs and gives those of its outputs. `current_callable` of the code is a function
    that Inductor writes around it, in all versions like this one:

        def g(args):
            input_tensors = [arg if isinstance(arg, torch.Tensor) else torch.tensor(arg) for arg in args]
            input_handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(input_tensors)
            output_handles = f(input_handles)
            output_tensors = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(output_handles)
            return output_tensors

    `f`, its one free variable, is a function of the extension module whose file has the entry. Where `g` also passes
    constants there is a variable `constants_tensor`, and where it returns numbers an attribute `item`: its names tell
    whether it does more than to pass handles, and nothing else does.
    """
    wrapper: Any = getattr(code, "current_callable", None)
    body = getattr(wrapper, "__code__", None)
    names = {*body.co_names, *body.co_varnames} if body else set()
    handles = {"unsafe_alloc_void_ptrs_from_tensors", "alloc_tensors_by_stealing_from_void_ptrs"}
    if not handles <= names:
        _not_understood("its code passes no handles of tensors")
        return None
    if names & {"item", "constants_tensor"}:
        return None
    try:
        library = ctypes.CDLL(wrapper.__closure__[0].cell_contents.__self__.__file__)
        return ctypes.cast(library[ENTRY], ctypes.c_void_p).value
    except (AttributeError, TypeError, IndexError, OSError):
        _not_understood(f"no file with {ENTRY} was found behind its code")
        return None


def _not_understood(why: str) -> None:
    note(CHAINS, f"Inductor of this torch ({torch.__version__}) is not understood, {why}")


_numbers = itertools.count()


def inductor_state() -> str:
    """A text that is equal only where Inductor would compile a graph to the same code: its configuration and what of
    torch's it reads. For keys of compiled code within one process; no public way. The part of torch's own key,
    `save_config_portable`, leaves out custom passes."""
    if lacking(STATE):
        return f"unknown {next(_numbers)}"
    settings = find("torch._inductor.config").get_config_copy()
    parts = [f"{name}={_describe(settings[name])}" for name in sorted(settings)]
    parts += [torch.__version__, str(torch.get_num_threads()), torch.get_float32_matmul_precision()]
    parts.append(str(torch.are_deterministic_algorithms_enabled()))
    for device in filter(None, ("cpu", torch.accelerator.current_accelerator())):
        parts.append(f"{torch.is_autocast_enabled(str(device))} {torch.get_autocast_dtype(str(device))}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _describe(setting: Any) -> str:
    """A custom pass by what it says it does, anything else as it prints."""
    uuid = getattr(setting, "uuid", None)
    return repr(uuid() if callable(uuid) else setting)
