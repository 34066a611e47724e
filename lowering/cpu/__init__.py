"""The CPU provider: C++ kernels for x86-64 with AVX-512 or AVX2, for 64-bit ARM with dot products, and plain vector
code for any other CPU.

The kernels are compiled at first use (see `build`). The environment variable TQC_CPU_LEVEL forces a level: scalar,
neon, avx2 or avx512.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tqc.format import PackedFormat, scale_table
from tqc.format.quantizer import unfold
from tqc.lowering.cpu import build

__all__ = ["FOLDED", "NAME", "accepts", "append", "attend", "level", "read", "supported"]

NAME = "cpu"
FOLDED = True
MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supported() -> str | None:
    try:
        _kernels()
    except build.BuildError as error:
        return str(error)
    return None


def accepts(k_fmt: PackedFormat, v_fmt: PackedFormat, dtype: torch.dtype, device_type: str) -> str | None:
    if device_type != "cpu":
        return f"runs on cpu, not on {device_type}"
    if dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, not {dtype}"
    for fmt in (k_fmt, v_fmt):
        if fmt.head_dim > MAX_HEAD_DIM:
            return f"takes a head_dim of at most {MAX_HEAD_DIM}, not {fmt.head_dim}"
    return None


def level() -> str:
    """Name of the level that the kernels are compiled for."""
    return build.level()


def append(pages: Tensor, dense: Tensor, state: Tensor, new: Tensor, start: Tensor | None, spec: str) -> None:
    (_module or _kernels()).append(pages, dense, state, new, start, spec)


def read(pages: Tensor, dense: Tensor, state: Tensor, length: int, spec: str) -> Tensor:
    return unfold((_module or _kernels()).read(pages, dense, state, length, spec), PackedFormat.parse(spec))


def attend(
    query: Tensor,
    k_pages: Tensor,
    k_dense: Tensor,
    k_state: Tensor,
    v_pages: Tensor,
    v_dense: Tensor,
    v_state: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    start: Tensor | None,
    scale: float,
    softcap: float,
    is_causal: bool,
    k_spec: str,
    v_spec: str,
) -> tuple[Tensor, Tensor]:
    return (_module or _kernels()).attend(
        query,
        k_pages,
        k_dense,
        k_state,
        v_pages,
        v_dense,
        v_state,
        key,
        value,
        attn_mask,
        sinks,
        start,
        scale,
        softcap,
        is_causal,
        k_spec,
        v_spec,
    )


def make_chain(inputs: int, slots: int, instructions: tuple[Any, ...], outputs: tuple[int, ...]) -> Any:
    """A run of compiled regions and attentions over numbered slots of tensors; see `make_chain` of module.cpp."""
    return (_module or _kernels()).make_chain(inputs, slots, instructions, outputs)


def run_chain(
    chain: Any, tensors: list[Tensor], specs: list[str], in_python: Callable[[int, list[Tensor]], Tensor]
) -> list[Tensor]:
    """Run a chain over its input tensors.

    Args:
        specs: the formats of keys and values of each attention.
        in_python: attends and writes, for an attention whose write is not an append; takes its number and those of
            query, key, value, positions, attn_mask and sinks that it has.
    """

    def with_handles(index: int, handles: list[Any]) -> Any:
        tensors = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(handles)
        return torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([in_python(index, tensors)])[0]

    handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)
    results = (_module or _kernels()).run_chain(chain, handles, specs, with_handles)
    return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(results)


def chain_seconds(chain: Any) -> tuple[float, float, float]:
    """Seconds that a chain spent in regions, in attention and in appending since it was last asked."""
    return (_module or _kernels()).chain_seconds(chain)


_module: ModuleType | None = None


def _kernels() -> ModuleType:
    """The extension module of this process's level, made the one that the ops call."""
    global _module
    _module = _loaded(build.level())
    return _module


@cache
def _loaded(chosen: str) -> ModuleType:
    """The extension module of a level, built and set up; a failure is remembered too."""
    result = _try_load(chosen)
    if isinstance(result, build.BuildError):
        raise result
    return result


@cache
def _try_load(chosen: str) -> ModuleType | build.BuildError:
    if not hasattr(Tensor, "__dlpack_c_exchange_api__"):
        return build.BuildError("this torch has no DLPack exchange interface; the CPU kernels need one")
    try:
        module = build.load(chosen)
    except build.BuildError as error:
        return error

    def on_unknown_spec(spec: str) -> int:
        fmt = PackedFormat.parse(spec)
        if fmt.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"the CPU kernels take a head_dim of at most {MAX_HEAD_DIM}, got {fmt.head_dim}")
        levels, boundaries, rotation = fmt.levels(), fmt.boundaries(), fmt.rotation_matrix()
        power_of_two = fmt.head_dim >= 16 and fmt.head_dim & (fmt.head_dim - 1) == 0
        return module.make_format(
            fmt.head_dim,
            fmt.bits,
            fmt.centred,
            fmt.sink_tokens,
            fmt.residual_window,
            fmt.page_bytes,
            fmt.centre_offset,
            fmt.planes,
            levels.data_ptr(),
            boundaries.data_ptr(),
            rotation.data_ptr(),
            fmt.rotation == "hadamard" and power_of_two,
            fmt.score_variance,
            fmt.folded,
        )

    module.setup(
        Tensor.__dlpack_c_exchange_api__,
        on_unknown_spec,
        torch.empty_strided,
        _DTYPES,
        scale_table().data_ptr(),
        _pool(),
    )
    return module


def _pool() -> tuple[int, int, int]:
    """Addresses of torch's thread count, its parallel-region test and its OpenMP runtime's fork; zeros if not found."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            library = ctypes.CDLL(str(folder / name))
            names = ("_ZN2at15get_num_threadsEv", "_ZN2at18in_parallel_regionEv", "GOMP_parallel")
            return tuple(ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value for symbol in names)  # type: ignore[return-value]
        except (OSError, AttributeError):
            continue
    return 0, 0, 0
