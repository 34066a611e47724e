"""The kernels of MLX on an Apple GPU (or an NVIDIA GPU of MLX's): their tests, then times. Some five minutes.

    python benchmarks/apple.py m3max                writes benchmarks/results/apple_m3max.json

One decode step of attention is timed, batch 1, on dense float16 (MLX's own kernel), on mlx-lm's quantized cache
(`kv_bits=4`) and on packed pages, each call reading what the one before it gave; encoding and reading by the page too.
`peak` is memory beyond what was held before the call.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import quantized_scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import envelope
from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.lowering.metal import launch

TESTS = "tests/lowering/test_metal_kernels.py"
CONTEXTS = (1024, 4096, 8192, 32768)
WIDTHS = ((4, 4), (4, 2), (3, 3), (8, 8))
HEADS, GROUP, HEAD_DIM = 8, 4, 128
REPEATS, CALLS = 7, 20
Call = Callable[[mx.array], mx.array]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the machine, for the file of results")
    name = parser.parse_args().name
    if not launch.available():
        sys.exit("benchmarks/apple.py needs a device of MLX that runs kernels (Apple silicon, or CUDA); there is none")
    rows = [tests(), *measured(CONTEXTS)]
    for row in rows:
        print(row)
    kind = str(mx.device_info().get("device_name", "unknown"))
    path = envelope.write(f"apple_{name}", rows, notes=[f"device of MLX: {kind}"], packages=("mlx", "mlx-lm"))
    print(f"wrote {path.name}")


def tests() -> dict[str, Any]:
    """Outcome of the kernels' tests on the device, the extended ones included."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "device", "--tb=line", TESTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    lines = done.stdout.strip().splitlines()
    failures = [line for line in lines if re.match(r"(FAILED|ERROR|E )", line)]
    return {"what": "tests", "passed": done.returncode == 0, "summary": lines[-1:], "failures": failures[:20]}


def measured(contexts: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = []
    for context in contexts:
        keys, values = (mx.random.normal((1, HEADS, context, HEAD_DIM)).astype(mx.float16) for _ in range(2))
        calls: dict[str, tuple[Call, int]] = {
            "dense": (dense(keys, values), keys.nbytes + values.nbytes),
            "mlx-lm kv_bits=4": quantized(keys, values),
        }
        for k_bits, v_bits in WIDTHS:
            calls[f"tqc K{k_bits}/V{v_bits}"] = packed(keys, values, k_bits, v_bits)
        for what, (call, held) in calls.items():
            query = mx.random.normal((1, HEADS * GROUP, 1, HEAD_DIM)).astype(mx.float16)
            seconds, peak = timed(call, query)
            rows.append({"what": what, "context": context, "us": 1e6 * seconds, "peak": peak, "cache_bytes": held})
        rows += pages(keys)
    return rows


def dense(keys: mx.array, values: mx.array) -> Call:
    return lambda query: mx.fast.scaled_dot_product_attention(query, keys, values, scale=HEAD_DIM**-0.5)


def quantized(keys: mx.array, values: mx.array) -> tuple[Call, int]:
    k, v = (mx.quantize(x, group_size=64, bits=4) for x in (keys, values))

    def call(query: mx.array) -> mx.array:
        # It multiplies its query by the scale in place.
        how = {"scale": 1.0, "mask": None, "group_size": 64, "bits": 4}
        return quantized_scaled_dot_product_attention(query * HEAD_DIM**-0.5, k, v, **how)

    return call, sum(part.nbytes for part in (*k, *v))


def packed(keys: mx.array, values: mx.array, k_bits: int, v_bits: int) -> tuple[Call, int]:
    formats = PackedFormat(HEAD_DIM, k_bits, True), PackedFormat(HEAD_DIM, v_bits, False)
    stores = [filled(tokens, fmt) for tokens, fmt in zip((keys, values), formats, strict=True)]
    rest = (None, None, None, None, None, HEAD_DIM**-0.5, 0.0, False, *map(str, formats))
    call = lambda query: launch.attend(query, *stores[0], *stores[1], *rest)[0]  # noqa: E731
    return call, sum(array.nbytes for store in stores for array in store)


def filled(tokens: mx.array, fmt: PackedFormat) -> tuple[mx.array, mx.array, mx.array]:
    batch, heads, count, head_dim = tokens.shape
    pages = mx.zeros((batch, heads, fmt.pages_for(count), fmt.page_bytes), dtype=mx.uint8)
    dense = mx.ones((batch, heads, fmt.rows_for(count), head_dim), dtype=tokens.dtype)
    pages, dense, state = launch.append(pages, dense, (0, 0, 0), tokens, str(fmt))
    return pages, dense, mx.array(state)


def pages(keys: mx.array) -> list[dict[str, Any]]:
    """Times of encoding and of reading, for a page of one head."""
    fmt = PackedFormat(HEAD_DIM, 4, True)
    store = filled(keys, fmt)
    count = keys.shape[2] // PAGE_TOKENS * PAGE_TOKENS
    head = store[1][:, :, fmt.token_rows :]
    calls: dict[str, Call] = {
        "encode": lambda _: launch.pack(keys[:, :, :count], head, str(fmt)),
        "read": lambda _: launch.read(*store, 0, count, str(fmt)),
    }
    each = HEADS * count // PAGE_TOKENS
    return [
        {"what": f"{what} a page", "context": keys.shape[2], "us": 1e6 * timed(call, keys, chained=False)[0] / each}
        for what, call in calls.items()
    ]


def timed(call: Call, query: mx.array, chained: bool = True) -> tuple[float, int]:
    """Median seconds of a call, and bytes of memory that it takes besides what is held."""
    mx.eval(call(query))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(call(query))
    peak = mx.get_peak_memory() - before
    times = []
    for _ in range(REPEATS):
        results, x = [], query
        begin = time.perf_counter()
        for _ in range(CALLS):
            result = call(x)
            x = result if chained else x
            results.append(result)
        mx.eval(results)
        times.append((time.perf_counter() - begin) / CALLS)
    return statistics.median(times), peak


if __name__ == "__main__":
    main()
