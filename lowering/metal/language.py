"""What the kernels are written in: Metal without templates, which is CUDA without its address spaces, by a few macros.

A body is the text between the braces of a kernel; MLX writes the signature around it, in either language (see
`mx.fast.metal_kernel`). It gives each input the arguments NAME_shape if the text says so anywhere. An input of fewer
than 8 elements is in another address space, so no function takes a pointer to one that may be so small.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# Names of the dtypes, as MLX has them in either language.
METAL_TYPES = {"float32": "float", "float16": "float16_t", "bfloat16": "bfloat16_t"}
CUDA_TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}

# Of threadgroup memory.
_SIZES = {"float": 4, "int": 4, "int64_t": 8, "uint8_t": 1}

_METAL = """\
#define FUNCTION static inline
#define SHARED threadgroup
#define UNROLL _Pragma("clang loop unroll(full)")
#define simd_barrier() simdgroup_barrier(mem_flags::mem_threadgroup)
#define group_barrier() threadgroup_barrier(mem_flags::mem_threadgroup)
"""

_CUDA = """\
#define FUNCTION static __device__ __forceinline__
#define SHARED __shared__
#define UNROLL _Pragma("unroll")
#define simd_barrier() __syncwarp()
#define group_barrier() __syncthreads()
#define thread_index_in_simdgroup (threadIdx.x % 32)
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif
FUNCTION float simd_sum(float x) {
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffff, x, i);
  return x;
}
FUNCTION float simd_max(float x) {
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, i));
  return x;
}
"""

_COMMON = """\
FUNCTION int least(int a, int b) { return a < b ? a : b; }
FUNCTION int largest(int a, int b) { return a > b ? a : b; }
FUNCTION float larger(float a, float b) { return a > b ? a : b; }
// exp(x - origin), and 0 where both are -inf.
FUNCTION float weight(float x, float origin) {
  return exp2((x - (origin == -INFINITY ? 0.0f : origin)) * 1.44269504f);
}
"""


@dataclass(frozen=True)
class Kernel:
    """One kernel in either language.

    Attributes:
        name: that MLX gives to it.
        inputs, outputs: names of the arrays.
        dtype: of `number`, the type of what is not packed: float32, float16 or bfloat16.
        constants: integers that the text names.
        functions: text in front of the kernel.
        body: text between its braces.
        simdgroups: how many simdgroups, of 32 threads, are a threadgroup.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dtype: str
    constants: tuple[tuple[str, int], ...]
    functions: str
    body: str
    simdgroups: int

    @property
    def metal_header(self) -> str:
        return _METAL + self._definitions(METAL_TYPES)

    @property
    def cuda_header(self) -> str:
        return _CUDA + _without_spaces(self._definitions(CUDA_TYPES))

    @property
    def threadgroup_bytes(self) -> int:
        """Threadgroup memory of one threadgroup."""
        names = dict(self.constants)
        declared = re.findall(r"SHARED (\w+) \w+\[([\w <*]+)\];", self.body)
        # Sizes are products and powers of two of constants.
        return sum(_SIZES[kind] * eval(size, {"__builtins__": {}}, names) for kind, size in declared)

    @property
    def cuda_body(self) -> str:
        return _without_spaces(self.body)

    def _definitions(self, types: dict[str, str]) -> str:
        constants = ", ".join(f"{name} = {value}" for name, value in self.constants)
        return f"typedef {types[self.dtype]} number;\nenum {{ {constants} }};\n{_COMMON}{self.functions}"


def _without_spaces(text: str) -> str:
    """The text without address spaces, which stand before types."""
    return re.sub(r"\b(device|threadgroup|thread) (?=(const )?(u?int|float|number))", "", text)
