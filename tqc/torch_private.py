"""Every private API of torch and transformers that tqc uses, in one place.

A name that a version lacks costs the feature that needs it, never an import: `NEEDS` lists the names of each feature,
`missing` says which features are lost. Supported are torch from 2.11 and transformers from 5.0; the names were read in
torch 2.11, 2.13 and 2.15, and transformers 5.0, 5.23 and 5.24.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule

_ABSENT = object()


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


PACKED_TENSORS = "packed caches"
CROPS = "cropping a packed cache without a copy"
PREALLOCATED = "packing caches that the caller allocated"
GROWTH = "caches that grow without recompiling"
LIMIT = "a higher limit of graphs a model, and a word when it is met"
GENERATE = "torch.compile(model).generate"
OPTIONS = "the options of a compiled model"
INNER = "model.compile where generate calls another model inside"
REGIONS = "compiling the rest of the graph"
DIRECT = "direct calls of compiled regions"
PRODUCTS = "products of few rows without BLAS"
CHAINS = "running all layers by one call"
STATE = "regions compiled once for several graphs"
CUDA_GRAPHS = "CUDA graphs"
FOLDED = "fold_values"
TRITON = "building the tables of the Triton kernels while tracing"
CPU = "the CPU kernels"
THREADS = "threads of the CPU kernels"
SAVED = "saving caches of transformers"

# By feature: what is lost without it, and the names that it needs.
NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {
    PACKED_TENSORS: (
        "every cache stays dense",
        (
            "torch.Tensor._make_wrapper_subclass",
            "torch._C._disabled_torch_function_impl",
            "torch._subclasses.fake_tensor.FakeTensor",
            "torch.utils._pytree",
            "torch.ops.aten.cat.default._schema",
        ),
    ),
    CROPS: (
        "appending to a cropped cache copies it",
        ("torch._C._ExcludeDispatchKeyGuard", "torch._C.DispatchKeySet", "torch._C.DispatchKey.ADInplaceOrView"),
    ),
    PREALLOCATED: ("they stay dense", ("torch._C._swap_tensor_impl", "torch.Tensor._is_view")),
    GROWTH: ("every page more compiles the graph anew", ("torch._dynamo.maybe_mark_dynamic",)),
    LIMIT: (
        "a model whose calls vary much may stay dense, and only torch's own log says so",
        ("torch._dynamo.config.recompile_limit", "torch._guards.CompileContext.current_compile_id"),
    ),
    GENERATE: (
        "it runs uncompiled; model.compile(backend='tqai') compiles it",
        (
            "torch._dynamo.eval_frame.OptimizedModule",
            "torch.nn.Module._call_impl",
            "torch.nn.Module._compiled_call_impl",
        ),
    ),
    INNER: (
        "that one runs uncompiled; compile it by its own name",
        (
            "torch._dynamo.eval_frame.OptimizeContext",
            "torch._dynamo.eval_frame._TorchDynamoContext",
            "torch._dynamo.eval_frame.OptimizedModule",
            "torch._dynamo.eval_frame.innermost_backend",
            "torch.nn.Module._call_impl",
            "torch.nn.Module._compiled_call_impl",
        ),
    ),
    OPTIONS: (
        "tqc.explain takes the default ones",
        (
            "torch._dynamo.eval_frame.OptimizedModule",
            "torch._dynamo.eval_frame._TorchDynamoContext",
            "torch._dynamo.eval_frame.innermost_backend",
        ),
    ),
    REGIONS: ("it runs eagerly", ("torch._inductor.compile_fx.compile_fx",)),
    DIRECT: (
        "each call takes some 20 us more, and no chain is made",
        (
            "torch._inductor.compile_fx.compile_fx_inner",
            "torch._guards.TracingContext",
            "torch._guards.tracing",
            "torch._guards.detect_fake_mode",
            "torch._functorch.config.enable_autograd_cache",
        ),
    ),
    PRODUCTS: (
        "they are calls of the BLAS library, which reads weights slower",
        ("torch._inductor.decomposition.select_decomp_table", "torch._functorch.config.enable_autograd_cache"),
    ),
    CHAINS: (
        "Python runs between the layers",
        (
            "torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors",
            "torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs",
            "torch._inductor.config.cpp_wrapper",
        ),
    ),
    STATE: ("each graph compiles its own", ("torch._inductor.config.get_config_copy",)),
    CUDA_GRAPHS: ("steps are not recorded", ("torch.UntypedStorage._cdata",)),
    FOLDED: ("an edited weight would not be seen, so the option fails", ("torch.Tensor._version",)),
    TRITON: ("a graph cannot hold them", ("torch.utils._python_dispatch._disable_current_modes",)),
    CPU: ("the reference runs in their place", ("torch.Tensor.__dlpack_c_exchange_api__",)),
    SAVED: (
        "save_cache and load_cache take tuples of tensors only",
        tuple(
            f"transformers.cache_utils.{name}"
            for name in ("Cache", "DynamicCache", "StaticCache", "DynamicLayer", "StaticLayer")
        ),
    ),
}

# What showed only in code that was compiled, by feature.
_met: dict[str, str] = {}


def _lacking(feature: str) -> list[str]:
    return [name for name in NEEDS[feature][1] if find(name, _ABSENT) is _ABSENT]


def missing() -> dict[str, str]:
    """The features that this torch or transformers cannot give: what is lost, and why. Imports Inductor."""
    found = dict(_met)
    for feature, (lost, _) in NEEDS.items():
        if feature == SAVED and importlib.util.find_spec("transformers") is None:
            continue
        if names := _lacking(feature):
            package = names[0].partition(".")[0]
            found[feature] = f"{lost}: this {package} ({_version(package)}) has no {', '.join(names)}"
    if thread_functions() == (0, 0):
        absent = " and ".join(_THREAD_FUNCTIONS)
        found[THREADS] = f"they run on one thread: the library of this torch ({torch.__version__}) exports no {absent}"
    return found


def _version(package: str) -> str:
    return str(getattr(importlib.import_module(package), "__version__", "of an unknown version"))


# --- Tensors ---------------------------------------------------------------------------------------------------------

# Of every kind of fake tensor; no public name. Used to tell tracing from running.
FakeTensor: Any = find("torch._subclasses.fake_tensor.FakeTensor", type("NoFakeTensor", (), {}))
# Tensors without memory for graphs that were not traced by torch. No public way.
FakeTensorMode: Any = find("torch._subclasses.fake_tensor.FakeTensorMode")
# What dynamo's graphs call for torch's own statistics; an executor skips it.
LOG_USAGE: Any = find("torch._C._log_api_usage_once")

# `tree_map_only` and the like; `torch.utils.pytree` is not there yet (2.15).
pytree: Any = find("torch.utils._pytree")

# A tensor subclass without `__torch_function__`; the public `DisableTorchFunctionSubclass` is a context in which a
# method of the subclass would call on, and dynamo knows subclasses that it can open by this very function.
disabled_torch_function: Any = find("torch._C._disabled_torch_function_impl", Tensor.__torch_function__)


def make_wrapper_subclass(cls: type, shape: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor with a shape and no memory of its own. No public way, though torch's notes on subclasses teach it."""
    return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)


@cache
def _view_keys() -> Any:
    return None if _lacking(CROPS) else torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def no_views() -> contextlib.AbstractContextManager[Any]:
    """In it, autograd makes no tensor the base of what is sliced from it. `torch.no_grad` does not do that; under
    `torch.inference_mode` it is so, but tensors made there cannot be written to outside."""
    keys = _view_keys()
    return contextlib.nullcontext() if keys is None else torch._C._ExcludeDispatchKeyGuard(keys)


def swap_tensors(a: Tensor, b: Tensor) -> None:
    """Exchange two tensor objects, their classes and attributes included.

    The public `torch.utils.swap_tensors` refuses tensors with weak references, and dynamo's guards hold such to every
    cache.

    Raises:
        RuntimeError: if torch holds one of them elsewhere, too, or cannot exchange tensors.
    """
    if _lacking(PREALLOCATED):
        raise RuntimeError("this torch cannot exchange tensors")
    torch._C._swap_tensor_impl(a, b)
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__


def is_view(tensor: Tensor) -> bool:
    """Whether autograd knows `tensor` as a view of another. No public way."""
    return tensor._is_view()


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share memory. The public `data_ptr()` of the storage fails on fake tensors."""
    return tensor.untyped_storage()._cdata


def writes(tensor: Tensor) -> int:
    """How often `tensor` was written to, so that an edit shows. No public way, though autograd's notes name it."""
    return tensor._version


def arguments_of(op: Any) -> Any:
    """Arguments of an operator's schema, each with `name` and `is_write`. No public way."""
    return op._schema.arguments


# Attribute of a tensor: which of its sizes vary. `mark_dynamic` sets it on the parts of a packed tensor as well.
DYNAMIC_SIZES = "_dynamo_weak_dynamic_indices"


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Tell dynamo that a size varies. The public `torch._dynamo.mark_dynamic` is an error where a model's code makes
    the size a constant; no hint is."""
    if mark := _marker():
        mark(tensor, dim)


@cache
def _marker() -> Any:
    return find("torch._dynamo.maybe_mark_dynamic")


def raise_recompile_limit(graphs: int) -> None:
    """Let dynamo make this many graphs of one function, if nobody has changed its own limit. The setting is public, but
    for the name of the module; `torch.compile(recompile_limit=...)`, from 2.13 on, is the user's."""
    config = find("torch._dynamo.config")
    if not _lacking(LIMIT) and config.recompile_limit == 8:
        config.recompile_limit = graphs


def frame_number() -> int | None:
    """A number of the function that dynamo compiles at the moment, the same at each recompilation. No public way."""
    compiling = None if _lacking(LIMIT) else find("torch._guards.CompileContext").current_compile_id()
    return compiling.frame_id if compiling else None


def on_recompile_limit(listener: Callable[[int | None, str, int, str, str], None]) -> None:
    """Call `listener` with the function's `frame_number`, the setting's name, its value, the function in words and the
    last reason when dynamo gives up on a function. There is no event for it, public or not, but a log record."""

    def listen(record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("torch._dynamo hit config.") and isinstance(record.args, tuple):
            limit, value, function, reason, *_ = record.args
            listener(frame_number(), str(limit), int(str(value)), str(function), str(reason))
        return True

    logging.getLogger("torch._dynamo.convert_frame").addFilter(listen)


# --- Graphs of dynamo: names in the `meta` of a node -----------------------------------------------------------------

# Fake tensor or symbolic int that a node gives. torch.export has `val`, but dynamo's own graphs are what backends get.
EXAMPLE_VALUE = "example_value"
# The modules that a node was traced in; torch.export documents the same name.
MODULE_STACK = "nn_module_stack"
# Attributes of an input tensor, `STATIC_INPUT` among them for one of `mark_static_address`. No public way.
TENSOR_DICT = "tensor_dict"
STATIC_INPUT = "_dynamo_static_input_type"


def detect_fake_mode(examples: Any) -> Any:
    """The mode of fake tensors: the tracing context's, else that of the examples; None without. No public way."""
    detect = find("torch._guards.detect_fake_mode")
    return detect(examples) if detect else None


@contextlib.contextmanager
def no_modes() -> Iterator[None]:
    """Real tensors while something is traced with fake ones. No public way."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


# --- Modules that dynamo compiled ------------------------------------------------------------------------------------


def patch_attributes(get: Callable[[Callable[..., Any], Any, str], Any]) -> None:
    """Let `get(original, module, name)` look up attributes of modules that `torch.compile` returns; the first call
    counts. `original` hands out methods of the wrapped module. No public way to have `generate` compiled."""
    cls = find("torch._dynamo.eval_frame.OptimizedModule")
    if cls is None or "_tqc_original" in cls.__dict__:
        return
    original = cls._tqc_original = cls.__getattr__
    cls.__getattr__ = lambda self, name: get(original, self, name)


def patch_compile(starting: Callable[[Any, Any], None], made: Callable[[torch.nn.Module, Any], None]) -> None:
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
            made(module, context)
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
    if _lacking(OPTIONS):
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


# --- Inductor --------------------------------------------------------------------------------------------------------

Compiled: TypeAlias = Callable[..., Any]


def compile_fx(gm: GraphModule, examples: list[Any], config_patches: dict[str, Any] | None = None) -> Compiled:
    """A graph of dynamo as `torch.compile(backend="inductor")` compiles it; torch's notes on backends teach this way
    to it."""
    return torch._dynamo.lookup_backend("inductor")(gm, examples, config_patches=config_patches)  # type: ignore


def inductor_decompositions() -> dict[Any, Callable[..., Any]] | None:
    """Inductor's table of decompositions under its present configuration, or None. `core_aten_decompositions` is
    public, but another one."""
    if _lacking(PRODUCTS):
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
        if _lacking(REGIONS):
            return module.forward, None
        if _lacking(DIRECT):  # without the decompositions: the key of AOTAutograd's cache does not hold them
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

    cpp_wrapper = cpp_wrapper and not _lacking(CHAINS)
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
    _met[CHAINS] = f"{NEEDS[CHAINS][0]}: Inductor of this torch ({torch.__version__}) is not understood, {why}"


_numbers = itertools.count()


def inductor_state() -> str:
    """A text that is equal only where Inductor would compile a graph to the same code: its configuration and what of
    torch's it reads. For keys of compiled code within one process; no public way. The part of torch's own key,
    `save_config_portable`, leaves out custom passes."""
    if _lacking(STATE):
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


# --- C interfaces ----------------------------------------------------------------------------------------------------

# Handles of tensors (`AtenTensorHandle` in capsules), as compiled regions take and give them, from Python's tensors and
# back; the latter takes the handles over. The C functions are public, but Python has no other way to a handle.
handles_of: Any = find("torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors")
tensors_of: Any = find("torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs")

# Capsule of the functions by which C++ reads tensors and makes them: DLPack's own public interface, torch >= 2.10.
dlpack_exchange: Any = getattr(Tensor, "__dlpack_c_exchange_api__", None)

# int32_t torch_get_num_threads(uint32_t*) and torch_parallel_for(begin, end, grain, function, context): torch's stable
# C interface, torch >= 2.10. Public; what is not is that they are looked up in the loaded library instead of linked.
_THREAD_FUNCTIONS = ("torch_get_num_threads", "torch_parallel_for")


def thread_functions() -> tuple[int, int]:
    """Addresses of torch's thread count and parallel loop; zeros if not found."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            library = ctypes.CDLL(str(folder / name))
            count, loop = (ctypes.cast(library[symbol], ctypes.c_void_p).value or 0 for symbol in _THREAD_FUNCTIONS)
        except (OSError, AttributeError):
            continue
        return count, loop
    return 0, 0


# --- transformers ----------------------------------------------------------------------------------------------------

# The kinds of layers that are saved, and what each counts beside its keys and values; older versions have fewer.
LAYER_COUNTERS: dict[str, tuple[str, ...]] = {
    "DynamicLayer": (),
    "DynamicSlidingWindowLayer": ("sliding_window", "cumulative_length", "record_past"),
    "StaticLayer": ("max_cache_len", "cumulative_length"),
    "StaticSlidingWindowLayer": ("max_cache_len", "cumulative_length", "cumulative_length_int"),
    "DummyLayer": (),
}


def cache_grows(cache: Any) -> bool:
    """Whether a cache makes a layer when one is missing: what its constructor was told, and no method tells."""
    return cache.layer_class_to_replicate is not None


def new_layer(kind: str, numbers: Mapping[str, int]) -> Any:
    """An empty layer for as many tokens as its counters say.

    Raises:
        AttributeError: if this transformers has no such kind.
    """
    sizes = {name: numbers[name] for name in ("sliding_window", "max_cache_len") if name in numbers}
    if kind == "StaticSlidingWindowLayer":
        sizes["sliding_window"] = numbers["max_cache_len"]
    return getattr(importlib.import_module("transformers.cache_utils"), kind)(**sizes)


@cache
def layer_counters(kind: str) -> tuple[str, ...]:
    """Those of `LAYER_COUNTERS` that a layer has in this transformers. 5.0 lacks `record_past`, counts of `StaticLayer`
    and `cumulative_length_int`. No method gives or takes them.

    Raises:
        AttributeError: if this transformers has no such kind.
    """
    layer = new_layer(kind, dict.fromkeys(LAYER_COUNTERS[kind], 1))
    return tuple(name for name in LAYER_COUNTERS[kind] if hasattr(layer, name))


def fill_layer(layer: Any, keys: Tensor, values: Tensor) -> None:
    """Give an empty layer its keys and values. The public `lazy_initialization` of a static one would first allocate
    dense ones of full length."""
    if hasattr(layer, "max_cache_len"):
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        # 5.0 has the size of the batch by another name, which its `Cache` has too.
        batch_size = "max_batch_size" if find("transformers.cache_utils.Cache.max_batch_size") else "batch_size"
        setattr(layer, batch_size, keys.shape[0])
        layer.num_heads, layer.k_head_dim, layer.v_head_dim = keys.shape[1], keys.shape[-1], values.shape[-1]
        if isinstance(getattr(layer, "cumulative_length", None), Tensor):
            layer.cumulative_length = layer.cumulative_length.to(keys.device)
    else:
        layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values


def attends_eagerly(config: Any) -> bool:
    """Whether a model adds its masks to the scores instead of giving them to `scaled_dot_product_attention`. What
    `set_attn_implementation` sets has no public name."""
    return config._attn_implementation == "eager"
