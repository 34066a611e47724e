"""What Triton's compiler makes of the kernels that the provider launches, on a machine without a GPU.

The provider's own host code runs with tensors on the device "meta", and each launch is compiled for the architecture
instead of being run.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from tqc.format import PAGE_TOKENS

ARCHITECTURES = {80: "sm_80", 89: "sm_89", 90: "sm_90", 100: "sm_100", 120: "sm_120"}
# Shared memory that one program can ask for, bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

_MATRIX = re.compile(r"^(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)(.*)")
_LABEL = re.compile(r"^(\.L_\w+):")
# What an instruction is for, by the start of its name.
KINDS = {
    "matrix": ("HMMA", "IMMA", "QMMA", "HGMMA", "IGMMA", "QGMMA", "UTC"),
    "load": ("LDG", "LDGSTS", "UBLKCP", "UTMALDG"),
    "shared": ("LDS", "LDSM", "STS", "STSM"),
    "local": ("LDL", "STL"),
    "permute": ("PRMT",),
    "float": ("FFMA", "FMUL", "FADD", "FSEL", "FSETP", "FMNMX", "HFMA2", "HMUL2", "HADD2", "HMNMX2", "F2F", "F2FP"),
    "special": ("MUFU",),
    "shuffle": ("SHFL",),
    "barrier": ("BAR", "SYNCS"),
}


class _Driver:
    """Stands in for the CUDA driver: names a target, runs nothing."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@dataclass
class Launch:
    """One kernel launch that was compiled instead of run."""

    name: str
    grid: tuple[int, ...]
    kernel: Any


@contextmanager
def compiling(arch: int) -> Iterator[list[Launch]]:
    """Compile every Triton launch in the block for `arch` (of ARCHITECTURES) and collect it, instead of running it."""
    launches: list[Launch] = []
    run: Callable = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        sizes = grid(dict(zip(self.arg_names, args, strict=False)) | kwargs) if callable(grid) else grid
        launches.append(Launch(self.__name__, tuple(int(size) for size in sizes), kernel))
        return kernel

    triton.runtime.driver.set_active(_Driver(arch))  # type: ignore[arg-type]
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = None


def resources(launch: Launch) -> dict[str, Any]:
    """Registers, memory and instructions of a compiled kernel, and of its innermost loop with matrix instructions."""
    sass, usage = _disassemble(launch.kernel.asm["cubin"])
    code = _instructions(sass)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loop = _matrix_loop(code)
    result: dict[str, Any] = {
        "kernel": launch.name,
        "num_warps": launch.kernel.metadata.num_warps,
        "num_stages": launch.kernel.metadata.num_stages,
        "registers": found["REG"],
        "local_bytes": found["STACK"] + found["LOCAL"],
        "local_instructions": _mix(code)["local"],
        "shared_bytes": launch.kernel.metadata.shared,
        "instructions": len(code),
        "matrix_instructions": _mix(code)["matrix"],
        "load_bits": _load_bits(code),
    }
    if loop:
        result["loop"] = {"instructions": len(loop), **_mix(loop), "load_bits": _load_bits(loop)}
        result["loop_bytes"] = loop_bytes(launch.kernel.asm["ttir"])
    return result


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        nvidia = triton.knobs.nvidia
        sass = subprocess.run([nvidia.nvdisasm.path, "-c", path], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [nvidia.cuobjdump.path, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
    return sass, usage


def _instructions(sass: str) -> list[tuple[str, str, str | None]]:
    """(name, operands, label in front of it) of each instruction."""
    code: list[tuple[str, str, str | None]] = []
    label = None
    for line in sass.splitlines():
        if found := _LABEL.match(line):
            label = found[1]
        elif found := _INSTRUCTION.match(line):
            code.append((found[1], found[2], label))
            label = None
    return code


def _matrix_loop(code: list[tuple[str, str, str | None]]) -> list[tuple[str, str, str | None]]:
    """The longest innermost loop that loads from memory and holds a matrix instruction; empty if there is none."""
    at = {label: index for index, (_, _, label) in enumerate(code) if label}
    loops = []
    for end, (name, operands, _) in enumerate(code):
        target = re.search(r"\.L_\w+", operands) if name.startswith("BRA") else None
        if target and at.get(target[0], end + 1) <= end:
            loops.append((at[target[0]], end + 1))
    holds = [loop for loop in loops if _mix(code[slice(*loop)])["matrix"] and _mix(code[slice(*loop)])["load"]]
    inner = [a for a in holds if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in holds)]
    return code[slice(*max(inner, key=lambda loop: loop[1] - loop[0]))] if inner else []


def _mix(code: list[tuple[str, str, str | None]]) -> dict[str, int]:
    counts = Counter(name.split(".")[0] for name, _, _ in code)
    mix = {kind: sum(n for name, n in counts.items() if name in names) for kind, names in KINDS.items()}
    mix["matrix"] = sum(n for name, n in counts.items() if _MATRIX.match(name))
    return mix


def _load_bits(code: list[tuple[str, str, str | None]]) -> dict[str, int]:
    """Number of loads from global memory by width."""
    widths: Counter[str] = Counter()
    for name, _, _ in code:
        parts = name.split(".")
        if parts[0] in ("LDG", "LDGSTS"):
            wide = next((part for part in parts if part in ("64", "128", "256", "U8", "S8", "U16", "S16")), "32")
            widths[wide.strip("US")] += 1
    return dict(sorted(widths.items(), key=lambda item: int(item[0])))


_DTYPE_BYTES = {"i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}


def loop_bytes(ttir: str) -> int:
    """Bytes that one turn of the loop over packed tokens loads: the one with matrix products and loads of integers."""
    for body in _loops(ttir):
        if "tt.dot" in body and re.search(r"tt\.load[^\n]*!tt\.ptr<i(8|32)>", body):
            total = 0
            for shape, dtype in re.findall(r"tt\.load[^\n]*: (?:tensor<([0-9x]+)x)?!tt\.ptr<(\w+)>", body):
                count = math.prod(int(size) for size in shape.split("x") if size)
                if dtype == "f32" and count >= PAGE_TOKENS:  # each token takes its page's largest scale
                    count //= PAGE_TOKENS
                total += count * _DTYPE_BYTES[dtype]
            return total
    return 0


def _loops(ttir: str) -> Iterator[str]:
    lines = ttir.splitlines()
    for begin, line in enumerate(lines):
        if "scf.for" in line or "scf.while" in line:
            depth = 0
            for end in range(begin, len(lines)):
                depth += lines[end].count("{") - lines[end].count("}")
                if depth <= 0 and end > begin:
                    yield "\n".join(lines[begin + 1 : end])
                    break
