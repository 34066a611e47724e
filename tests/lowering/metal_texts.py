"""Texts of the kernels as compilers get them: what MLX makes of them, and what the CUDA backend of MLX would make."""

from __future__ import annotations

import re

import mlx.core as mx

from tests.lowering.metal_shim import metal_text
from tqc.format import PackedFormat
from tqc.lowering.metal.attend_source import attend_kernel, rows_at_once
from tqc.lowering.metal.encode_source import centre_kernel, encode_kernel
from tqc.lowering.metal.language import CUDA_TYPES
from tqc.lowering.metal.read_source import read_kernel
from tqc.lowering.metal.softmax_source import merge_kernel

# Dtypes of what is not a number of the model's.
_DTYPES = {
    **dict.fromkeys(("pages", "k_pages", "v_pages"), mx.uint8),
    **dict.fromkeys(("k_state", "v_state", "state", "start", "options", "span"), mx.int32),
    **dict.fromkeys(("k_table", "v_table", "table", "factors", "sinks", "parts", "logs", "lse"), mx.float32),
    "mask": mx.bool_,
}
_SMALL = ("k_state", "v_state", "state", "start", "options", "span", "factors", "sinks")
_CUDA_NAMES = {mx.uint8: "uint8_t", mx.int32: "int32_t", mx.float32: "float", mx.bool_: "bool"}


def kernels(k: PackedFormat, v: PackedFormat, dtype: str, rows: int):
    """All kernels of a pair of formats, with a mask and without, in shares and whole."""
    at_once = rows_at_once(rows, max(k.head_dim, v.head_dim))
    return [
        attend_kernel(k, v, dtype, at_once, "none", True),
        attend_kernel(k, v, dtype, at_once, "bool", False),
        merge_kernel(v.head_dim, dtype),
        *(encode_kernel(fmt, dtype) for fmt in (k, v)),
        *(centre_kernel(fmt, dtype) for fmt in (k, v) if fmt.centred),
        *(read_kernel(fmt, dtype) for fmt in (k, v)),
    ]


def _dtype(kernel, name):
    if name == "out" and kernel.name.endswith("_share"):
        return mx.float32
    return _DTYPES.get(name, getattr(mx, kernel.dtype))


def as_metal(kernel) -> str:
    """With inputs of four axes, and of few elements where they may be so few."""
    inputs = [mx.zeros((3,) if name in _SMALL else (2, 2, 2, 8), _dtype(kernel, name)) for name in kernel.inputs]
    dtypes = [_dtype(kernel, name) for name in kernel.outputs]
    return metal_text(kernel, inputs, [(8,)] * len(dtypes), dtypes)


def as_cuda(kernel) -> str:
    """With the signature that MLX's CUDA backend writes, as its source (mlx/backend/cuda/custom_kernel.cpp) has it."""
    arguments = []
    for name in (*kernel.inputs, *kernel.outputs):
        kind = _CUDA_NAMES.get(_dtype(kernel, name), CUDA_TYPES[kernel.dtype])
        arguments.append(f"{'const ' if name in kernel.inputs else ''}{kind}* {name}")
        if name in kernel.inputs and f"{name}_shape" in kernel.cuda_body:
            arguments.append(f"const __grid_constant__ Shape {name}_shape")
    return f"""#include <cstdint>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
struct Shape {{
  int data[10];
  __device__ int operator[](int i) const {{ return data[i]; }}
}};
{kernel.cuda_header}
namespace mlx::core::cu {{
__global__ void {kernel.name}(
    {", ".join(arguments)}) {{
{kernel.cuda_body}
}}
}}
"""


_OPENCL = """\
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define NAN __builtin_nanf("")
#define INFINITY __builtin_inff()
typedef unsigned int uint32_t;
typedef unsigned short uint16_t;
typedef unsigned char uint8_t;
typedef unsigned int uint;
typedef int int32_t;
typedef long int64_t;
typedef half float16_t;
typedef half bfloat16_t;
typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef uint uint4 __attribute__((ext_vector_type(4)));
enum class mem_flags { mem_threadgroup };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
float simd_sum(float);
float simd_max(float);
float exp2(float);
float log2(float);
float log(float);
float sqrt(float);
float tanh(float);
float rint(float);
float fabs(float);
#define isfinite(x) __builtin_isfinite(x)
"""


def as_opencl(text: str) -> str:
    """A Metal text as C++ for OpenCL, which has the same address spaces, but no attributes and no bools in memory."""
    text = re.sub(r" \[\[.*?\]\](?=[,)])", "", text.replace("[[kernel]]", "__kernel"))
    return _OPENCL + text.replace("bool* mask", "uint8_t* mask")
