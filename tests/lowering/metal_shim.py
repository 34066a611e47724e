"""Runs the Metal text that MLX makes of a kernel, on the CPU: compiled with g++ behind `metal_shim.h`."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

HERE = Path(__file__).parent
# Without -O: compiling takes more time than running.
FLAGS = ["-std=c++17", "-fPIC", "-shared", "-w", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tqc_metal_"))
    import atexit

    atexit.register(shutil.rmtree, folder, True)
    return folder


def metal_text(kernel, inputs, output_shapes, output_dtypes) -> str:
    """The whole text that MLX hands to Metal's compiler for these arrays."""
    texts = []

    def see(recorded):
        if recorded.get("name") == "CustomKernel":
            texts.append(recorded["arguments"][1])

    names = {"name": kernel.name, "input_names": kernel.inputs, "output_names": kernel.outputs}
    call = mx.fast.metal_kernel(**names, source=kernel.body, header=kernel.metal_header)

    def program(*arrays):
        threads = 32 * kernel.simdgroups
        how = {"grid": (threads, 1, 1), "threadgroup": (threads, 1, 1)}
        return call(inputs=list(arrays), output_shapes=output_shapes, output_dtypes=output_dtypes, **how)

    mx.export_function(see, program, *inputs)
    (text,) = texts
    return text


def signature(text):
    """Name of the kernel in a text, and (type, name) of its parameters."""
    name, parameters = re.search(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", text, re.S).groups()
    return name, [re.fullmatch(r"\s*(.*?)(\w+) \[\[.*\]\]", part).groups() for part in parameters.split(",\n")]


def _source(text):
    name, parameters = signature(text)
    text = text.replace("#define SHARED threadgroup", '#define SHARED static __attribute__((section("tqc_shared")))')
    text = re.sub(r"\[\[.*?\]\]", "", text)
    at, casts = 0, []
    for kind, parameter in parameters:
        if kind.strip().endswith("*"):
            casts.append(f"({kind})arguments[{at}]")
            at += 1
        else:
            casts.append({"uint": f"{parameter}_", "uint3": f"{parameter}_"}[kind.strip()])
    return f"""#include "{HERE / "metal_shim.h"}"
{text}
static void** arguments;
static uint3 threadgroup_position_in_grid_, threadgroups_per_grid_;
static void one(int at) {{
  const uint thread_index_in_simdgroup_ = at % 32, simdgroup_index_in_threadgroup_ = at / 32;
  {name}({", ".join(casts)});
}}
extern "C" const char* run(void** given, int x, int y, int z, int threads, int backwards) {{
  arguments = given;
  threadgroups_per_grid_ = {{uint(x), uint(y), uint(z)}};
  for (int i = 0; i < x * y * z; i++) {{
    threadgroup_position_in_grid_ = {{uint(i % x), uint(i / x % y), uint(i / x / y)}};
    if (const char* fault = shim::run_group(threads, backwards, one)) return fault;
  }}
  return nullptr;
}}
"""


@cache
def _library(text):
    number = len(list(_folder().glob("*.cpp")))
    source, library = _folder() / f"{number}.cpp", _folder() / f"{number}.so"
    source.write_text(_source(text))
    done = subprocess.run(["g++", *FLAGS, source, "-o", library], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    run = ctypes.CDLL(str(library)).run
    run.restype = ctypes.c_char_p
    return run


def to_numpy(x):
    """Row-contiguous, as MLX makes a kernel's inputs."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x, order="C")


def from_numpy(x, dtype):
    return mx.array(x).view(dtype) if dtype == mx.bfloat16 else mx.array(x)


class Shim:
    """Stands for what `mx.fast.metal_kernel` makes of a kernel."""

    def __init__(self, kernel):
        self.kernel, self.texts = kernel, {}

    def __call__(self, inputs, grid, threadgroup, output_shapes, output_dtypes):
        # What the text depends on, apart from address spaces, which g++ does not know.
        key = tuple(array.dtype for array in inputs)
        if key not in self.texts:
            self.texts[key] = metal_text(self.kernel, inputs, output_shapes, output_dtypes)
        text = self.texts[key]
        _, parameters = signature(text)
        assert all(size % group == 0 for size, group in zip(grid, threadgroup, strict=True))
        arrays = {name: to_numpy(array) for name, array in zip(self.kernel.inputs, inputs, strict=True)}
        arrays |= {f"{name}_shape": np.array(arrays[name].shape, np.int32) for name in self.kernel.inputs}
        results = []
        for backwards in (0, 1):
            for name, shape, dtype in zip(self.kernel.outputs, output_shapes, output_dtypes, strict=True):
                arrays[name] = (
                    np.full(shape, 255, np.uint8) if dtype == mx.uint8 else to_numpy(mx.full(shape, mx.nan, dtype))
                )
            pointers = [arrays[name].ctypes.data for kind, name in parameters if kind.strip().endswith("*")]
            groups = [size // group for size, group in zip(grid, threadgroup, strict=True)]
            fault = _library(text)((ctypes.c_void_p * len(pointers))(*pointers), *groups, threadgroup[0], backwards)
            assert fault is None, fault.decode()
            results.append([arrays[name] for name in self.kernel.outputs])
        for forth, back in zip(*results, strict=True):
            assert forth.tobytes() == back.tobytes(), "results depend on the order of threads: a barrier is missing"
        return [from_numpy(array, dtype) for array, dtype in zip(results[0], output_dtypes, strict=True)]
