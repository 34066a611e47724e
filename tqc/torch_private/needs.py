"""What each feature needs of the private names of torch and transformers, and what is lost without them."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from tqc.torch_private.interfaces import THREAD_FUNCTIONS, thread_functions
from tqc.torch_private.lookup import ABSENT, find

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


def lacking(feature: str) -> list[str]:
    """Names that the feature needs and this version does not have."""
    return [name for name in NEEDS[feature][1] if find(name, ABSENT) is ABSENT]


def note(feature: str, why: str) -> None:
    """Let `missing` tell that a feature is lost for a reason that shows late."""
    _met[feature] = f"{NEEDS[feature][0]}: {why}"


def missing() -> dict[str, str]:
    """The features that this torch or transformers cannot give: what is lost, and why. Imports Inductor."""
    found = dict(_met)
    for feature, (lost, _) in NEEDS.items():
        if feature == SAVED and importlib.util.find_spec("transformers") is None:
            continue
        if names := lacking(feature):
            package = names[0].partition(".")[0]
            found[feature] = f"{lost}: this {package} ({_version(package)}) has no {', '.join(names)}"
    if thread_functions() == (0, 0):
        absent = " and ".join(THREAD_FUNCTIONS)
        found[THREADS] = f"they run on one thread: the library of this torch ({torch.__version__}) exports no {absent}"
    return found


def _version(package: str) -> str:
    return str(getattr(importlib.import_module(package), "__version__", "of an unknown version"))
