"""Timing on a GPU, the shapes that are measured, and packed caches of any length made quickly."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.ops import planes


@dataclass(frozen=True)
class Shape:
    """Attention of one model: query heads, key/value heads, head_dim."""

    model: str
    query_heads: int
    heads: int
    head_dim: int


SHAPES = (
    Shape("Llama-3.1-8B", 32, 8, 128),
    Shape("Qwen2.5-7B", 28, 4, 128),
    Shape("Gemma-2-9B", 16, 8, 256),
    Shape("SmolLM2-135M", 9, 3, 64),
)
# Bits of keys and values.
SETTINGS = ((4, 2), (4, 4), (3, 3))
FLUSH_BYTES = 256 << 20  # more than the second-level cache of any GPU so far


def formats(head_dim: int, k_bits: int, v_bits: int) -> tuple[PackedFormat, PackedFormat]:
    return PackedFormat(head_dim, k_bits, centred=True), PackedFormat(head_dim, v_bits, centred=False)


def environment(device: str) -> dict[str, Any]:
    """Hardware, driver, versions and date of this run."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    import triton

    found["triton"] = triton.__version__
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
        fields = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,persistence_mode"
        asked = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True
        )
        found["nvidia_smi"] = dict(zip(fields.split(","), asked.stdout.strip().split(", "), strict=False))
    return found


def captured(function: Callable[[], Any]) -> Callable[[], None]:
    """`function` as a CUDA graph: the time of its kernels without that of Python. It is run some times before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


class Timer:
    """Median time of a function on the GPU, by events, with the second-level cache emptied before each call."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, function: Callable[[], Any], seconds: float = 0.1, at_least: int = 10, most: int = 100) -> float:
        """Milliseconds."""
        for _ in range(3):
            function()
        first = self._once(function)
        count = int(min(most, max(at_least, 1e3 * seconds / max(first, 1e-3))))
        return statistics.median(self._once(function) for _ in range(count))

    def _once(self, function: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def copy_bandwidth(timer: Timer) -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda: target.copy_(source)) * 1e3


def packed_cache(
    batch: int, heads: int, length: int, fmt: PackedFormat, dtype: torch.dtype, device: str, spare: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A packed tensor of `length` random tokens: some are encoded, then their pages repeated.

    Args:
        spare: tokens that can still be appended.
    """
    sample = min(length, fmt.sink_tokens + fmt.residual_window + 8 * PAGE_TOKENS)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, heads, sample, fmt.head_dim, generator=generator).to(dtype)
    pages = torch.zeros(1, heads, max(2, fmt.packed_tokens(sample) // PAGE_TOKENS), fmt.page_bytes, dtype=torch.uint8)
    dense = fmt.empty_dense(1, heads, fmt.dense_rows, dtype, "cpu")
    state = torch.zeros(3, dtype=torch.int64)
    planes.append(pages, dense, state, tokens, None, fmt.spec)
    packed = fmt.packed_tokens(length)
    index = torch.arange(fmt.packed_tokens(length + spare) // PAGE_TOKENS + 1) % max(1, int(state[1]) // PAGE_TOKENS)
    pages = pages.to(device)[:, :, index.to(device)].repeat(batch, 1, 1, 1)
    state = torch.tensor([length, packed, 0], device=device)
    return pages, dense.to(device).repeat(batch, 1, 1, 1), state


def packed_bytes(batch: int, heads: int, length: int, fmt: PackedFormat, dtype: torch.dtype) -> int:
    """Bytes of one packed tensor that attention has to read: pages in use and dense rows in use."""
    packed = fmt.packed_tokens(length)
    rows = fmt.head_rows + length - packed
    return batch * heads * (packed // PAGE_TOKENS * fmt.page_bytes + rows * fmt.head_dim * dtype.itemsize)
