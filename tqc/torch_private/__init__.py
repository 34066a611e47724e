"""Every private API of torch and transformers that tqc uses, in one place.

A name that a version lacks costs the feature that needs it, never an import: `NEEDS` lists the names of each feature,
`missing` says which features are lost. Supported are torch from 2.11 and transformers from 5.0; the names were read in
torch 2.11, 2.13 and 2.15, and transformers 5.0, 5.23 and 5.24.
"""

from __future__ import annotations

from tqc.torch_private.graphs import (
    EXAMPLE_VALUE,
    MODULE_STACK,
    STATIC_INPUT,
    TENSOR_DICT,
    detect_fake_mode,
    frame_number,
    no_modes,
    on_recompile_limit,
    raise_recompile_limit,
)
from tqc.torch_private.inductor import (
    compile_fx,
    entry_of,
    inductor_compile,
    inductor_decompositions,
    inductor_state,
)
from tqc.torch_private.interfaces import (
    dlpack_exchange,
    handles_of,
    tensors_of,
    thread_functions,
)
from tqc.torch_private.lookup import (
    find,
)
from tqc.torch_private.modules import (
    backend_of,
    call_of,
    called_through,
    compiled_call,
    get_compiled,
    patch_attributes,
    patch_compile,
    set_compiled,
)
from tqc.torch_private.needs import (
    CHAINS,
    DIRECT,
    NEEDS,
    REGIONS,
    THREADS,
    missing,
)
from tqc.torch_private.tensors import (
    DYNAMIC_SIZES,
    LOG_USAGE,
    FakeTensor,
    FakeTensorMode,
    arguments_of,
    disabled_torch_function,
    is_view,
    is_view_op,
    make_wrapper_subclass,
    mark_dynamic,
    no_views,
    pytree,
    storage_key,
    swap_tensors,
    writes,
)
from tqc.torch_private.transformers import (
    LAYER_COUNTERS,
    attends_eagerly,
    cache_grows,
    fill_layer,
    layer_counters,
    new_layer,
)

__all__ = [
    "CHAINS",
    "DIRECT",
    "DYNAMIC_SIZES",
    "EXAMPLE_VALUE",
    "FakeTensor",
    "FakeTensorMode",
    "LAYER_COUNTERS",
    "LOG_USAGE",
    "MODULE_STACK",
    "NEEDS",
    "REGIONS",
    "STATIC_INPUT",
    "TENSOR_DICT",
    "THREADS",
    "arguments_of",
    "attends_eagerly",
    "backend_of",
    "cache_grows",
    "call_of",
    "called_through",
    "compile_fx",
    "compiled_call",
    "detect_fake_mode",
    "disabled_torch_function",
    "dlpack_exchange",
    "entry_of",
    "fill_layer",
    "find",
    "frame_number",
    "get_compiled",
    "handles_of",
    "inductor_compile",
    "inductor_decompositions",
    "inductor_state",
    "is_view",
    "is_view_op",
    "layer_counters",
    "make_wrapper_subclass",
    "mark_dynamic",
    "missing",
    "new_layer",
    "no_modes",
    "no_views",
    "on_recompile_limit",
    "patch_attributes",
    "patch_compile",
    "pytree",
    "raise_recompile_limit",
    "set_compiled",
    "storage_key",
    "swap_tensors",
    "tensors_of",
    "thread_functions",
    "writes",
]
