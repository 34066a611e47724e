"""Decode attention over a packed cache on the CPU, against torch's dense attention and the memory's speed.

    python benchmarks/cpu/attention.py --out benchmarks/cpu/attention.json

Every case measures, in alternation: `attend` of the cpu provider; torch's scaled_dot_product_attention over a dense
cache of the same length in bfloat16 and float32, each the best of `enable_gqa`, repeated heads, and the query heads of
a group given as rows of one head (models do not call it so, but it is torch's fastest); and the floor, the packed bytes
at the read bandwidth measured in the same run. Times are minima and medians over the repeats. On a machine that is busy
with other work, `--threads 1 --cpu-time` counts the processor time of one thread instead of the clock's.
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from tqc.format import PackedFormat
from tqc.lowering import cpu

SHAPES = ((32, 8, 128), (9, 3, 64), (16, 16, 64), (8, 1, 256))
BITS = ((4, 2), (3, 3), (4, 4))
LENGTHS = (512, 2048, 8192, 32768, 131072)
BATCHES = (1, 8)
MAX_DENSE_BYTES = 3 << 30

clock = time.perf_counter


def repeat_times(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, run in alternation for about `seconds` in all, 3 to 200 times each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while (len(next(iter(times.values()))) < 3 or time.perf_counter() < end) and len(next(iter(times.values()))) < 200:
        for name, call in calls.items():
            begin = clock()
            call()
            times[name].append(clock() - begin)
    return times


def read_bandwidth() -> float:
    """Bytes per second at which all threads read memory that no cache holds."""
    block = torch.ones(1 << 26, dtype=torch.int64)
    return block.nbytes / min(repeat_times({"sum": block.sum}, 2.0)["sum"])


def packed_store(batch: int, heads: int, length: int, fmt: PackedFormat) -> tuple[torch.Tensor, ...]:
    """A packed cache of random tokens; its pages repeat the first 64, which costs less to make and as much to read."""
    some = min(length, 64 * 32 + fmt.sink_tokens + fmt.residual_window)
    pages = torch.zeros(1, heads, -(-some // 32), fmt.page_bytes, dtype=torch.uint8)
    dense = torch.zeros(1, heads, fmt.dense_rows, fmt.head_dim, dtype=torch.bfloat16)
    state = torch.zeros(2, dtype=torch.int64)
    cpu.append(pages, dense, state, torch.randn(1, heads, some, fmt.head_dim).bfloat16(), None, str(fmt))
    packed = fmt.packed_tokens(length)
    if packed:
        filled = pages[:, :, : int(state[1]) // 32]
        order = torch.arange(packed // 32) % filled.shape[2]
        pages = filled[:, :, order]
    pages = pages.repeat(batch, 1, 1, 1)
    return pages, dense.repeat(batch, 1, 1, 1), torch.tensor([length, packed])


def measure(batch: int, shape: tuple[int, int, int], bits: tuple[int, int], length: int, bandwidth: float) -> dict:
    query_heads, heads, dim = shape
    k_fmt, v_fmt = PackedFormat(dim, bits[0], True), PackedFormat(dim, bits[1], False)
    k, v = packed_store(batch, heads, length, k_fmt), packed_store(batch, heads, length, v_fmt)
    query = torch.randn(batch, query_heads, 1, dim).bfloat16()
    key, value = (torch.randn(batch, heads, 1, dim).bfloat16() for _ in range(2))
    arguments = (query, *k, *v, key, value, None, None, None, dim**-0.5, 0.0, True, str(k_fmt), str(v_fmt))
    calls: dict[str, Callable[[], object]] = {"packed": lambda: cpu.attend(*arguments)}
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        if 2 * batch * query_heads * (length + 1) * dim * dtype.itemsize > MAX_DENSE_BYTES:
            continue
        q, dense_k, dense_v = (
            torch.randn(batch, n, rows, dim).to(dtype)
            for n, rows in ((query_heads, 1), (heads, length + 1), (heads, length + 1))
        )
        calls[f"{name} gqa"] = lambda q=q, k=dense_k, v=dense_v: scaled_dot_product_attention(q, k, v, enable_gqa=True)
        group = query_heads // heads
        rows = q.view(batch, heads, group, dim)
        calls[f"{name} grouped"] = lambda q=rows, k=dense_k, v=dense_v: scaled_dot_product_attention(q, k, v)
        wide_k, wide_v = dense_k.repeat_interleave(group, 1), dense_v.repeat_interleave(group, 1)
        calls[f"{name} repeated"] = lambda q=q, k=wide_k, v=wide_v: scaled_dot_product_attention(q, k, v)
    times = repeat_times(calls, 1.5)
    packed_bytes = sum(t.nbytes for t in (k[0], v[0])) + sum(t.nbytes for t in (k[1], v[1]))
    result = {
        "batch": batch,
        "query_heads": query_heads,
        "heads": heads,
        "head_dim": dim,
        "k_bits": bits[0],
        "v_bits": bits[1],
        "length": length,
        "packed_bytes": packed_bytes,
        "floor_us": packed_bytes / bandwidth * 1e6,
        "minimum_us": {name: min(t) * 1e6 for name, t in times.items()},
        "median_us": {name: statistics.median(t) * 1e6 for name, t in times.items()},
    }
    best = {kind: [t for name, t in result["minimum_us"].items() if name.startswith(kind)] for kind in ("bf16", "fp32")}
    packed = result["minimum_us"]["packed"]
    result["over_bf16"] = min(best["bf16"]) / packed if best["bf16"] else None
    result["over_fp32"] = min(best["fp32"]) / packed if best["fp32"] else None
    result["of_floor"] = packed / result["floor_us"]
    return result


def overheads() -> dict[str, float]:
    """Microseconds of one call that does next to no work: append of one token, attend over none."""
    fmt = PackedFormat(64, 4, True)
    store = (
        torch.zeros(1, 3, 64, fmt.page_bytes, dtype=torch.uint8),
        torch.zeros(1, 3, fmt.dense_rows, 64, dtype=torch.bfloat16),
        torch.zeros(2, dtype=torch.int64),
    )
    new, start = torch.randn(1, 3, 1, 64).bfloat16(), torch.tensor([10])
    arguments = (new, *store, *store, new, new, None, None, None, 0.125, 0.0, True, str(fmt), str(fmt))
    empty = repeat_times({"attend": lambda: cpu.attend(*arguments)}, 0.5)["attend"]
    one = repeat_times({"append": lambda: cpu.append(*store, new, start, str(fmt))}, 0.5)["append"]
    return {"attend": min(empty) * 1e6, "append": min(one) * 1e6}


def processor() -> str:
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def main(out: Path | None = None, quick: bool = False, threads: int | None = None, cpu_time: bool = False) -> None:
    """Measure all cases, or with --quick batch 1 and 4/2 bits up to 32768 tokens, and write them to OUT as JSON."""
    global clock
    console = Console(width=120)
    if threads:
        torch.set_num_threads(threads)
    if cpu_time:
        if torch.get_num_threads() != 1:
            raise typer.BadParameter("--cpu-time needs --threads 1")
        clock = time.thread_time
    if reason := cpu.supported():
        console.print(f"the CPU provider does not run here: {reason}")
        raise typer.Exit(1)
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    report = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "clock": "processor time" if cpu_time else "wall",
        "level": cpu.level(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "read_bandwidth_gb_s": bandwidth / 1e9,
        "call_overhead_us": overheads(),
        "cases": [],
    }
    table = Table(title=f"decode attention, {report['processor']}, {report['threads']} threads, {cpu.level()}")
    for column in ("batch", "heads", "dim", "bits", "tokens", "packed us", "bf16 us", "× bf16", "× fp32", "× floor"):
        table.add_column(column, justify="right")
    for batch in BATCHES[:1] if quick else BATCHES:
        for shape in SHAPES:
            for bits in BITS[:1] if quick else BITS:
                for length in LENGTHS[:4] if quick else LENGTHS:
                    case = measure(batch, shape, bits, length, bandwidth)
                    report["cases"].append(case)
                    dense = [t for name, t in case["minimum_us"].items() if name.startswith("bf16")]
                    table.add_row(
                        str(batch),
                        f"{shape[0]}/{shape[1]}",
                        str(shape[2]),
                        f"{bits[0]}/{bits[1]}",
                        str(length),
                        f"{case['minimum_us']['packed']:.0f}",
                        f"{min(dense):.0f}" if dense else "",
                        f"{case['over_bf16']:.1f}" if case["over_bf16"] else "",
                        f"{case['over_fp32']:.1f}" if case["over_fp32"] else "",
                        f"{case['of_floor']:.2f}",
                    )
    console.print(table)
    console.print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s; a call costs {report['call_overhead_us']} us at least")
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
