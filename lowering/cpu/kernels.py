"""The functions of the CPU provider, which are those of the extension module that `build` compiles at first use.

The environment variable TQC_CPU_LEVEL forces a level: scalar, neon, avx2 or avx512.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tqc.format import PackedFormat, scale_table
from tqc.format.quantizer import unfold
from tqc.lowering.cpu import build
from tqc.lowering.cpu.limits import DTYPES, MAX_HEAD_DIM
from tqc.torch_private import dlpack_exchange, handles_of, tensors_of, thread_functions


def level() -> str:
    """Name of the level that the kernels are compiled for."""
    return build.level()


def append(pages: Tensor, dense: Tensor, state: Tensor, new: Tensor, start: Tensor | None, spec: str) -> None:
    (_module or loaded()).append(pages, dense, state, new, start, spec)


def read(pages: Tensor, dense: Tensor, state: Tensor, length: int, spec: str) -> Tensor:
    return unfold((_module or loaded()).read(pages, dense, state, length, spec), PackedFormat.parse(spec))


def attend(*args: Any) -> tuple[Tensor, Tensor]:
    """As `attend` of `tqc.ops.planes`, whose arguments it takes by position."""
    return (_module or loaded()).attend(*args)


def make_chain(inputs: int, slots: int, steps: Iterable[Any], outputs: tuple[int, ...]) -> Any:
    """A run of compiled regions and attentions over numbered slots of tensors.

    Args:
        steps: objects whose fields are the keywords of `add_region` or `add_attention` of module.cpp, as `kind` says.
    """
    module = _module or loaded()
    chain = module.make_chain(inputs, slots, outputs)
    for step in steps:
        add = {"region": module.add_region, "attention": module.add_attention}[step.kind]
        add(chain, **vars(step))
    return chain


def run_chain(
    chain: Any,
    tensors: list[Tensor],
    specs: list[str],
    capacities: list[int],
    in_python: Callable[[int, list[Tensor]], Tensor],
) -> list[Tensor]:
    """Run a chain over its input tensors.

    Args:
        specs: the formats of keys and values of each attention.
        capacities: how many tokens the caches of each attention can hold; -1 where they grow.
        in_python: attends and writes, for an attention whose write is not an append; takes its number and those of
            query, key, value, positions, attn_mask and sinks that it has.
    """

    def with_handles(index: int, handles: list[Any]) -> Any:
        tensors = tensors_of(handles)
        return handles_of([in_python(index, tensors)])[0]

    handles = handles_of(tensors)
    results = (_module or loaded()).run_chain(chain, handles, specs, capacities, with_handles)
    return tensors_of(results)


def chain_seconds(chain: Any) -> tuple[float, float, float]:
    """Seconds that a chain spent in regions, in attention and in appending since it was last asked."""
    return (_module or loaded()).chain_seconds(chain)


_module: ModuleType | None = None


def loaded() -> ModuleType:
    """The extension module of this process's level, made the one that the functions call.

    Raises:
        BuildError: if it cannot be had; a failure is remembered, too.
    """
    global _module
    result = _load(build.level())
    if isinstance(result, build.BuildError):
        raise result
    _module = result
    return result


@cache
def _load(chosen: str) -> ModuleType | build.BuildError:
    """The extension module of a level, built and set up."""
    if dlpack_exchange is None:
        return build.BuildError(f"torch {torch.__version__} has no DLPack exchange interface; the CPU kernels need one")
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
            fmt.score_stretch,
            fmt.folded,
            -1 if fmt.keep is None else fmt.keep,
            fmt.block_tokens,
            fmt.block_bytes,
            fmt.places_offset if fmt.groups else 0,
            fmt.score_rows,
            fmt.groups.queries if fmt.groups else 0,
            tuple((tier.spec, pages, offset) for tier, pages, offset in fmt.tiers if fmt.groups),
        )

    try:
        module.setup(
            dlpack_exchange, on_unknown_spec, torch.empty_strided, DTYPES, scale_table().data_ptr(), thread_functions()
        )
    except (RuntimeError, ValueError) as error:
        return build.BuildError(f"the CPU kernels do not fit torch {torch.__version__}: {error}")
    return module
