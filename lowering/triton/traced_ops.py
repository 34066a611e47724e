"""The provider's functions as ops that torch can look into: `torch.ops.tqai_triton_1.attend` and so on.

For graphs that `torch.compile`, `make_fx` or `torch.export` makes of CUDA tensors, which hold the ops. Where they are
compiled, the ops unfold to the kernels, so that Inductor plans memory and writes launches around them. Eager code calls
the plain functions, which cost less (an op goes through the dispatcher and `torch.library`'s wrappers to the same
launch).

Arguments are those of the functions of the same names, without defaults, and with `tables`: constants that a kernel
reads are inputs here, since tensors made while tracing would be fake. `attend_tables`, `append_tables` (those of keys,
then those of values) and `read_tables` give them.

The namespace's number goes up whenever a schema or what an op writes changes: torch's caches know an op by its name.
"""

from __future__ import annotations

from types import FunctionType

from torch.library import triton_op

from tqc.lowering.triton.kernels import append, append_pair, attend, attend_paged, read

NAMESPACE = "tqai_triton_1"
_CACHE = ("pages", "dense", "state")
# By function, the arguments that it writes.
_OPS = {
    append: _CACHE,
    append_pair: tuple(f"{side}_{part}" for side in "kv" for part in _CACHE),
    read: (),
    attend: (),
    attend_paged: (),
}

for _function, _writes in _OPS.items():
    # The schema is made from the annotations: an op has no defaults, and its tables are never None.
    _op = FunctionType(_function.__code__, _function.__globals__)
    _op.__annotations__ = {**_function.__annotations__, "tables": "list[Tensor]"}
    triton_op(f"{NAMESPACE}::{_function.__name__}", _op, mutates_args=_writes)
