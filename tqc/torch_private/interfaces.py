"""Torch's C interfaces."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tqc.torch_private.lookup import find

# Handles of tensors (`AtenTensorHandle` in capsules), as compiled regions take and give them, from Python's tensors and
# back; the latter takes the handles over. The C functions are public, but Python has no other way to a handle.
handles_of: Any = find("torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors")
tensors_of: Any = find("torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs")

# Capsule of the functions by which C++ reads tensors and makes them: DLPack's own public interface, torch >= 2.10.
dlpack_exchange: Any = getattr(Tensor, "__dlpack_c_exchange_api__", None)

# int32_t torch_get_num_threads(uint32_t*) and torch_parallel_for(begin, end, grain, function, context): torch's stable
# C interface, torch >= 2.10. Public; what is not is that they are looked up in the loaded library instead of linked.
THREAD_FUNCTIONS = ("torch_get_num_threads", "torch_parallel_for")


def thread_functions() -> tuple[int, int]:
    """Addresses of torch's thread count and parallel loop; zeros if not found."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            library = ctypes.CDLL(str(folder / name))
            count, loop = (ctypes.cast(library[symbol], ctypes.c_void_p).value or 0 for symbol in THREAD_FUNCTIONS)
        except (OSError, AttributeError):
            continue
        return count, loop
    return 0, 0
