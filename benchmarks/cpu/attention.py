"""Decode attention over a packed cache on the CPU, against every other attention for the CPU and the memory's speed.

    python benchmarks/cpu/attention.py                      all cases, into benchmarks/results/attention.json
    python benchmarks/cpu/attention.py --quick              batch 1, up to 32,768 tokens
    python benchmarks/cpu/attention.py --resume --minutes 2 what is not in the file yet, and stop after two minutes
    python benchmarks/cpu/attention.py --prepare            only compile and set up
    python benchmarks/cpu/attention.py --levels             instruction sets against each other, into levels.json

A case is a batch, a shape of heads and a length, and is written as soon as it is measured. In a case the following
are called in turn, so that a change of the machine's speed meets all (the first line five times as often as the dense
ones, some of which take a hundred times as long; each call finds what the one before left in the processor's caches):

- `attend` of the cpu provider with keys and values of 4 and 2, 3 and 3, 4 and 4 bits;
- torch's scaled_dot_product_attention over a dense cache of the same length in bfloat16 and float32, as `enable_gqa`,
  with repeated heads, and with the query heads of a group given as rows of one head, which models do not do, but it is
  torch's fastest;
- torch's flex_attention, compiled, bfloat16;
- GroupQueryAttention of onnxruntime with caches of float32, float16, 8 and 4 bits, in its own environment and process
  (`peers/setup.py`), right after.

The floor is the packed bytes at the read bandwidth measured in the same case. Times are minima and medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).resolve().parents[2] / "build" / "peers" / "inductor-flex")
)

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tqc.format import PackedFormat
from tqc.lowering.cpu import PROVIDER, kernels

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
import envelope
import setup

NAME = "attention"
SHAPES = ((32, 8, 128), (9, 3, 64), (16, 16, 64), (8, 1, 256))
BITS = ((4, 2), (3, 3), (4, 4))
LENGTHS = (512, 2048, 8192, 32768, 131072)
BATCHES = (1, 8)
LEVELS = ("avx512", "avx2")
# A dense cache above this is left out; two are in memory at a time.
MAX_DENSE_BYTES = 5 << 30

Calls = dict[str, Callable[[], object]]


def repeat_times(calls: Calls, seconds: float, others: Calls | None = None) -> dict[str, list[float]]:
    """Seconds of each call, run in turn for about `seconds` in all, 3 to 200 times each.

    Args:
        others: slower calls, one turn of them to five of `calls`.
    """
    turns = [calls] if others is None else [calls] * 5 + [others]
    times: dict[str, list[float]] = {name: [] for turn in turns for name in turn}
    for turn in turns[-2:]:
        for call in turn.values():
            call()
    end = time.perf_counter() + seconds
    while (min(map(len, times.values())) < 3 or time.perf_counter() < end) and min(map(len, times.values())) < 200:
        for turn in turns:
            for name, call in turn.items():
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
    return times


def read_bandwidth() -> float:
    """Bytes per second at which all threads read memory that no cache holds."""
    block = torch.ones(1 << 25, dtype=torch.int64)
    return block.nbytes / min(repeat_times({"sum": block.sum}, 0.3)["sum"])


def packed_store(batch: int, heads: int, length: int, fmt: PackedFormat) -> tuple[Tensor, ...]:
    """A packed cache of random tokens; its pages repeat the first 64, which costs less to make and as much to read."""
    some = min(length, 64 * 32 + fmt.sink_tokens + fmt.residual_window)
    pages = torch.zeros(1, heads, -(-some // 32), fmt.page_bytes, dtype=torch.uint8)
    dense = torch.zeros(1, heads, fmt.dense_rows, fmt.head_dim, dtype=torch.bfloat16)
    state = torch.zeros(2, dtype=torch.int64)
    kernels.append(pages, dense, state, torch.randn(1, heads, some, fmt.head_dim).bfloat16(), None, str(fmt))
    packed = fmt.packed_tokens(length)
    if packed:
        filled = pages[:, :, : int(state[1]) // 32]
        order = torch.arange(packed // 32) % filled.shape[2]
        pages = filled[:, :, order]
    pages = pages.repeat(batch, 1, 1, 1)
    return pages, dense.repeat(batch, 1, 1, 1), torch.tensor([length, packed])


def dense_store(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Random rows [batch, heads, length + 1, dim]; beyond 1,024 they repeat, which costs less to make."""
    some = torch.randn(1, 1, min(length, 1024), dim).to(dtype)
    return some.repeat(batch, heads, -(-(length + 1) // some.shape[2]), 1)[:, :, : length + 1].contiguous()


def packed_calls(
    batch: int,
    shape: tuple[int, int, int],
    length: int,
    attend: Callable[..., object] = kernels.attend,
    pairs: Iterable[tuple[int, int]] = BITS,
) -> tuple[Calls, dict[str, int]]:
    """`attend` over a packed cache with each pair of bits, and the bytes that it reads."""
    query_heads, heads, dim = shape
    query = torch.randn(batch, query_heads, 1, dim).bfloat16()
    key, value = (torch.randn(batch, heads, 1, dim).bfloat16() for _ in range(2))
    calls: Calls = {}
    read = {}
    for bits in pairs:
        k_fmt, v_fmt = PackedFormat(dim, bits[0], True), PackedFormat(dim, bits[1], False)
        k, v = packed_store(batch, heads, length, k_fmt), packed_store(batch, heads, length, v_fmt)
        arguments = (query, *k, *v, key, value, None, None, None, dim**-0.5, 0.0, True, str(k_fmt), str(v_fmt))
        name = f"tqc K{bits[0]} V{bits[1]}"
        calls[name] = lambda arguments=arguments: attend(*arguments)
        read[name] = sum(tensor.nbytes for tensor in (k[0], k[1], v[0], v[1]))
    return calls, read


def dense_calls(batch: int, shape: tuple[int, int, int], length: int, dtype: torch.dtype) -> Calls:
    """torch's attention over a dense cache of `length` tokens and one more."""
    query_heads, heads, dim = shape
    group, name = query_heads // heads, {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    one = 2 * batch * heads * (length + 1) * dim * dtype.itemsize
    if one > MAX_DENSE_BYTES:
        return {}
    q = torch.randn(batch, query_heads, 1, dim).to(dtype)
    k, v = dense_store(batch, heads, length, dim, dtype), dense_store(batch, heads, length, dim, dtype)
    rows = q.view(batch, heads, group, dim)
    calls: Calls = {
        f"{name} gqa": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True),
        f"{name} grouped": lambda: scaled_dot_product_attention(rows, k, v),
    }
    if group > 1 and one * group <= MAX_DENSE_BYTES:
        wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        calls[f"{name} repeated"] = lambda: scaled_dot_product_attention(q, wide_k, wide_v)
    if dtype == torch.bfloat16:
        calls["flex bf16"] = lambda: compiled_flex(q, k, v, enable_gqa=group > 1)
    return calls


compiled_flex = torch.compile(flex_attention, dynamic=True)


def onnxruntime_times(batch: int, shape: tuple[int, int, int], length: int) -> dict[str, Any]:
    """{"minimum_us": {name: }, "median_us": {name: }, "reasons": {name: why it did not run}} of onnxruntime."""
    given = {"batch": batch, "shape": shape, "length": length, "threads": torch.get_num_threads()}
    script = Path(__file__).parent / "peers" / "run_onnxruntime.py"
    command = [str(setup.python("onnxruntime")), str(script), json.dumps({**given, "max_bytes": MAX_DENSE_BYTES})]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        return {"minimum_us": {}, "median_us": {}, "reasons": {"onnxruntime": reason}}
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def measure(batch: int, shape: tuple[int, int, int], length: int) -> dict[str, Any]:
    """The row of a case."""
    bandwidth = read_bandwidth()
    packed, read = packed_calls(batch, shape, length)
    times: dict[str, list[float]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        dense = dense_calls(batch, shape, length, dtype)
        for name, found in repeat_times(packed, 1.0, dense).items():
            times.setdefault(name, []).extend(found)
        del dense
    others = onnxruntime_times(batch, shape, length)
    row: dict[str, Any] = {
        "batch": batch,
        "query_heads": shape[0],
        "heads": shape[1],
        "head_dim": shape[2],
        "length": length,
        "date": datetime.date.today().isoformat(),
        "read_bandwidth_gb_s": round(bandwidth / 1e9, 2),
        "packed_bytes": read,
        "minimum_us": {name: round(1e6 * min(found), 1) for name, found in times.items()} | others["minimum_us"],
        "median_us": {name: round(1e6 * statistics.median(found), 1) for name, found in times.items()}
        | others["median_us"],
        "reasons": others["reasons"],
    }
    fastest = row["minimum_us"]
    row["heads_dim"] = f"{shape[0]}/{shape[1]} x {shape[2]}"
    for kind in ("bf16", "fp32", "flex", "onnxruntime"):
        if found := [time for name, time in fastest.items() if name.startswith(kind)]:
            row[f"{kind}_us"] = min(found)
    for name, size in read.items():
        key = name.removeprefix("tqc ").replace(" ", "").lower()
        row[f"{key}_us"] = fastest[name]
        row[f"{key}_of_floor"] = round(fastest[name] / (1e6 * size / bandwidth), 2)
        for kind in ("bf16", "fp32"):
            if f"{kind}_us" in row:
                row[f"{key}_over_{kind}"] = round(row[f"{kind}_us"] / fastest[name], 2)
    return row


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
    empty = repeat_times({"attend": lambda: kernels.attend(*arguments)}, 0.5)["attend"]
    one = repeat_times({"append": lambda: kernels.append(*store, new, start, str(fmt))}, 0.5)["append"]
    return {"attend": min(empty) * 1e6, "append": min(one) * 1e6}


def levels_row(shape: tuple[int, int, int], length: int) -> dict[str, Any]:
    """Least times of `attend` with the first of `LEVELS`, and of the second over it, both called in turn."""
    row: dict[str, Any] = {"heads_dim": f"{shape[0]}/{shape[1]} x {shape[2]}", "length": length}
    for k, v in (*BITS, (5, 5), (6, 6), (7, 7), (8, 8)):
        calls: Calls = {}
        for level in LEVELS:
            calls[level] = next(iter(packed_calls(1, shape, length, kernels._load(level).attend, [(k, v)])[0].values()))
        best, other = (1e6 * min(times) for times in repeat_times(calls, 0.5).values())
        row[f"k{k}v{v}_us"] = round(best, 1)
        row[f"k{k}v{v}_ratio"] = round(other / best, 2)
    return row


def key(row: dict[str, Any]) -> tuple[int, ...]:
    return row["batch"], row["query_heads"], row["heads"], row["head_dim"], row["length"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--levels", action="store_true")
    arguments = parser.parse_args()
    if arguments.resume:
        del sys.argv[1:]  # the file holds the rows of all calls
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if reason := PROVIDER.unavailable():
        sys.exit(f"the CPU provider does not run here: {reason}")
    torch.manual_seed(0)
    if arguments.levels:
        rows = [levels_row(shape, length) for shape in SHAPES for length in LENGTHS[1:4:2]]
        envelope.write("levels", rows, [f"Least times with {LEVELS[0]}, and how much longer {LEVELS[1]} takes."])
        return
    cases = [
        (batch, shape, length)
        for batch in (BATCHES[:1] if arguments.quick else BATCHES)
        for shape in SHAPES
        for length in (LENGTHS[:4] if arguments.quick else LENGTHS)
    ]
    if arguments.prepare:
        print("onnxruntime", setup.set_up("onnxruntime"))
        for batch, shape, length in cases:
            for call in dense_calls(batch, shape, length, torch.bfloat16).values():
                call()
        return
    file = envelope.RESULTS / f"{NAME}.json"
    rows = json.loads(file.read_text())["rows"] if arguments.resume and file.exists() else []
    call_us = overheads()
    note = (
        f"Kernels for {kernels.level()}; a call costs {call_us['attend']:.1f} us at least, appending a token "
        f"{call_us['append']:.1f} us. Times are the least of the repeats. bf16 and fp32 are the fastest of three "
        "ways to call torch's SDPA; onnxruntime is the fastest of its caches of float32, float16, 8 and 4 bits."
    )
    end = time.monotonic() + 60 * arguments.minutes
    for batch, shape, length in cases:
        if any(key(row) == (batch, *shape, length) for row in rows):
            continue
        if time.monotonic() > end:
            break
        rows.append(measure(batch, shape, length))
        print(rows[-1], flush=True)
        envelope.write(NAME, rows, [note])
    columns = (
        "batch",
        "heads_dim",
        "length",
        "k4v2_us",
        "bf16_us",
        "k4v2_over_bf16",
        "k4v2_over_fp32",
        "k4v2_of_floor",
    )
    table = Table(*columns, title=f"decode attention, {envelope.processor()}, {kernels.level()}")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
