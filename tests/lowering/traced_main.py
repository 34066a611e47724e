"""What torch makes of the provider's ops over CUDA tensors, on a machine without a GPU; prints JSON.

In a process of its own, since the tests' Triton is an interpreter. Tensors are fake; a driver that runs nothing stands
in for CUDA's, and what Inductor asks about the device is answered here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering
from torch._library.triton import get_triton_kernels_for_op
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))
from compiled import _Driver

from tqc.cache.packed_tensor import PackedTensor
from tqc.cache.storage import Storage
from tqc.execute.instructions import AttendWrite
from tqc.format import PackedFormat
from tqc.lowering.triton import PROVIDER, kernels, traced_ops, tuning
from tqc.lowering.triton.tables import append_tables, attend_tables

ARCH, HEADS, GROUP, CAPACITY, DTYPE = 90, 8, 4, 32768, torch.bfloat16
K_FMT, V_FMT = PackedFormat(128, 4, True), PackedFormat(128, 2, False)
SPECS = K_FMT.spec, V_FMT.spec
ops = getattr(torch.ops, traced_ops.NAMESPACE)

PROPERTIES = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, warp_size=32, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, shared_memory_per_block=49152,
    shared_memory_per_multiprocessor=233472, shared_memory_per_block_optin=232448, total_memory=80 << 30,
    L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip
INTERFACE = "torch._dynamo.device_interface.CudaInterface"
ANSWERS: dict[str, Any] = {
    "torch.cuda.is_available": lambda: True,
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.current_device": lambda: 0,
    "torch.cuda.get_device_capability": lambda *_: (9, 0),
    "torch.cuda.get_device_properties": lambda *_: PROPERTIES,
    "torch.cuda.get_rng_state": lambda *_: torch.empty(0, dtype=torch.uint8, device="cpu"),
    "torch.cuda.set_rng_state": lambda *_: None,
    "torch.cuda._exchange_device": lambda _: 0,
    "torch.cuda._maybe_exchange_device": lambda _: 0,
    f"{INTERFACE}.get_device_properties": staticmethod(lambda *_: PROPERTIES),
    f"{INTERFACE}.Worker.get_device_properties": staticmethod(lambda *_: PROPERTIES),
    # They try their patterns on real tensors.
    "torch._inductor.fx_passes.joint_graph.lazy_init": lambda *_: None,
    "torch._inductor.fx_passes.post_grad.lazy_init": lambda *_: None,
}


@contextlib.contextmanager
def hopper() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch(name, answer))
        yield


def arguments(mode: FakeTensorMode) -> list[torch.Tensor]:
    """Of `step`."""
    cpu = torch.device("cpu")
    tables = [*attend_tables(*SPECS, DTYPE, cpu), *append_tables(SPECS[0], DTYPE, cpu)]
    tables += append_tables(SPECS[1], DTYPE, cpu)
    with mode:
        query, key, value = (
            torch.empty(1, 1, heads, 128, dtype=DTYPE, device="cuda").transpose(1, 2)
            for heads in (HEADS * GROUP, HEADS, HEADS)
        )
        stores = []
        for fmt in (K_FMT, V_FMT):
            stores += [
                torch.empty(1, HEADS, CAPACITY // 32, fmt.page_bytes, dtype=torch.uint8, device="cuda"),
                torch.empty(1, HEADS, fmt.dense_rows, 128, dtype=DTYPE, device="cuda"),
                torch.empty(3, dtype=torch.int64, device="cuda"),
            ]
        start = torch.empty(1, dtype=torch.int64, device="cuda")
        on_gpu = [torch.empty(table.shape, dtype=table.dtype, device="cuda") for table in tables]
    return [query, key, value, start, *stores, *on_gpu]


def step(*args: torch.Tensor) -> torch.Tensor:
    """A decode step of one layer, with something behind it that Inductor makes itself."""
    query, key, value, start, *rest = args
    k, v, tables = rest[:3], rest[3:6], rest[6:]
    out, _ = ops.attend(query, *k, *v, key, value, None, None, start, 0.1, 0.0, False, *SPECS, list(tables[:4]))
    ops.append_pair(*k, key, *v, value, start, *SPECS, list(tables[4:]))
    return out * 2


class Step(torch.nn.Module):
    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return step(*args)


def own_cache(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`step` on a cache that the graph makes (writing to its inputs takes a CUDA build of torch, even for fakes)."""
    store = [part + 1 for part in args[4:10]]
    return step(*args[:4], *store, *args[10:]), *store


def graph_of(function: Callable[..., Any], count: int) -> torch.fx.GraphModule:
    """What dynamo would hand to a backend."""
    names = ", ".join(f"x{index}" for index in range(count))
    return torch.fx.symbolic_trace(eval(f"lambda {names}: function({names})", {"function": function}))


def launches(graph: torch.fx.Graph) -> list[dict[str, Any]]:
    from torch._higher_order_ops.triton_kernel_wrap import get_kernel

    return [
        {
            "kernel": get_kernel(node.kwargs["kernel_idx"]).fn.__name__,
            "writes": sorted(node.kwargs.get("tensors_to_clone", ())),
        }
        for node in graph.nodes
        if "triton_kernel_wrapper" in str(node.target)
    ]


def unfolded() -> dict[str, Any]:
    """Kernels in the graph that AOTAutograd makes, and which of their tensors torch takes to be written."""
    from torch._functorch.aot_autograd import aot_module_simplified

    found: dict[str, Any] = {}

    def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        found["launches"] = launches(gm.graph)
        output = next(node for node in gm.graph.nodes if node.op == "output")
        found["outputs"] = [str(node.args[1]) for node in output.args[0] if "getitem" in str(node.target)]
        return gm.forward

    mode = FakeTensorMode()
    args = arguments(mode)
    with tracing(TracingContext(mode)), torch.no_grad():
        aot_module_simplified(graph_of(lambda *a: (step(*a),), len(args)), args, fw_compiler=compiler)
    with mode, torch.no_grad():
        found["make_fx"] = op_names(make_fx(step)(*args))
        found["export"] = op_names(torch.export.export(Step(), tuple(args)).graph_module)

    def dynamo(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        found["dynamo"] = op_names(gm)
        return lambda *given: (given[0],)

    with mode, torch.no_grad(), hopper():
        torch.compile(step, backend=dynamo, fullgraph=True)(*args)
    return found


def op_names(gm: torch.fx.GraphModule) -> list[str]:
    names = (str(node.target).removesuffix(".default") for node in gm.graph.nodes)
    return [name for name in names if traced_ops.NAMESPACE in name]


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def runtime_step() -> dict[str, Any]:
    """What the runtime's call for one layer asks of torch and launches, once its tables are there."""
    mode = FakeTensorMode()
    query, key, value, start, *rest = arguments(mode)
    launched: list[str] = []

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        launched.append(self.__name__)

    tables = {SPECS[0]: tuple(rest[10:14]), SPECS[1]: tuple(rest[14:])}
    with (
        mode,
        hopper(),
        mock.patch("tqc.lowering.triton.attend.attend_tables", lambda *_: tuple(rest[6:10])),
        mock.patch("tqc.lowering.triton.append.append_tables", lambda spec, *_: tables[spec]),
        mock.patch.object(JITFunction, "run", run),
    ):
        k, v = (PackedTensor(Storage(*rest[at : at + 3], fmt, 0, 0), 4096) for at, fmt in ((0, K_FMT), (3, V_FMT)))
        step = AttendWrite(replace(PROVIDER, load=lambda: kernels), 0.1, 0.0)
        with _Operations() as operations:
            step(query, key, value, k, v, start, None, None)
        known = [cache.packed_storage._length for cache in (k, v)]
    return {"operations": operations.names, "launches": launched, "lengths known": known}


class _Enough(Exception):
    pass


def inductor() -> dict[str, Any]:
    """Inductor's code for a decode step, its kernels compiled."""
    written: list[str] = []

    def save(code: str) -> None:
        written.append(code)
        raise _Enough  # loading it takes a GPU

    mode = FakeTensorMode()
    args = arguments(mode)
    with hopper(), mock.patch.object(GraphLowering, "save_output_code", staticmethod(save)), torch.no_grad():
        with tracing(TracingContext(mode)), contextlib.suppress(Exception):
            compile_fx(graph_of(own_cache, len(args)), args)
        code = written[0]
        return {
            "calls": [line.strip().split("(")[0] for line in code.splitlines() if ".run(" in line],
            "compiled": [
                compile_kernel(code, name) for name in ("attend_kernel_0", "merge_kernel_1", "append_kernel_2")
            ],
        }


def compile_kernel(code: str, name: str) -> dict[str, Any]:
    """The text of one kernel in Inductor's code, compiled by itself."""
    begin = code.index("'''", code.index(f"{name} = async_compile.triton(")) + 3
    text = eval(f"'''{code[begin : code.index(chr(39) * 3 + ', device_str', begin)]}'''")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name.strip('_')}.py")
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        heuristics = getattr(module, name.rsplit("_", 1)[0])
        meta, function = heuristics.triton_meta, heuristics.fn
        source = ASTSource(function, meta["signature"], meta["constants"], meta["configs"][0])
        kernel = triton.compile(source, target=GPUTarget("cuda", ARCH, 32))
    return {"kernel": name, "ptx": "entry" in kernel.asm["ptx"]}


def main() -> None:
    triton.runtime.driver.set_active(_Driver(ARCH))
    tuning.multiprocessors = lambda device: 132
    tuning.architecture = lambda device: "sm_90"
    names = ("append", "append_pair", "read", "attend", "attend_paged")
    kernels = {
        name: [k.__name__ for k in get_triton_kernels_for_op(f"{traced_ops.NAMESPACE}::{name}")] for name in names
    }
    print(
        json.dumps(
            {"unfolded": unfolded(), "kernels of ops": kernels, "runtime": runtime_step(), "inductor": inductor()}
        )
    )


if __name__ == "__main__":
    main()
