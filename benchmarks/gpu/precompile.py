"""Compile what the other sections will launch, on all cores at once: Triton finds it in its cache then.

As for the compile table, host code runs with tensors on the device "meta"; no GPU is used.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import fp8
import torch
from compiled import compiling
from measure import SETTINGS, SHAPES, Shape, formats
from torch import Tensor

from tqc.format import PAGE_TOKENS, PackedFormat
from tqc.lowering.triton import kernels, tuning

Job = tuple[str, tuple[Any, ...]]


def parts(batch: int, heads: int, tokens: int, fmt: PackedFormat, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(batch, heads, tokens // PAGE_TOKENS + 1, fmt.page_bytes, dtype=torch.uint8, device="meta"),
        torch.empty(batch, heads, fmt.dense_rows, fmt.head_dim, dtype=dtype, device="meta"),
        torch.empty(3, dtype=torch.int64, device="meta"),
    )


def attend(shape: Shape, batch: int, tokens: int, bits: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    k_fmt, v_fmt = formats(shape.head_dim, *bits)
    query = torch.empty(batch, shape.query_heads, rows, shape.head_dim, dtype=dtype, device="meta")
    new = torch.empty(batch, shape.heads, rows, shape.head_dim, dtype=dtype, device="meta")
    k, v = (parts(batch, shape.heads, tokens, fmt, dtype) for fmt in (k_fmt, v_fmt))
    rest = (new, new, None, None, None, shape.head_dim**-0.5, 0.0, True, k_fmt.spec, v_fmt.spec)
    kernels.attend(query, *k, *v, *rest)


def append(shape: Shape, batch: int, tokens: int, bits: tuple[int, int], count: int, dtype: torch.dtype) -> None:
    k_fmt, v_fmt = formats(shape.head_dim, *bits)
    new = torch.empty(batch, count, shape.heads, shape.head_dim, dtype=dtype, device="meta").transpose(1, 2)
    k, v = (parts(batch, shape.heads, tokens, fmt, dtype) for fmt in (k_fmt, v_fmt))
    kernels.append_pair(*k, new, *v, new, None, k_fmt.spec, v_fmt.spec)


def read(shape: Shape, batch: int, tokens: int, bits: tuple[int, int], dtype: torch.dtype) -> None:
    for fmt in formats(shape.head_dim, *bits):
        kernels.read(*parts(batch, shape.heads, tokens, fmt, dtype), tokens, fmt.spec)


def baseline(shape: Shape, batch: int, tokens: int, configuration: tuple[int, int, int, int], sms: int) -> None:
    query = torch.empty(batch, shape.query_heads, 1, shape.head_dim, dtype=torch.bfloat16, device="meta")
    dense = torch.empty(batch, shape.heads, tokens, shape.head_dim, dtype=torch.float8_e4m3fn, device="meta")
    fp8.attend(query, dense, dense, 0.5, 0.5, 0.1, configuration, sms)


def jobs(sections: list[str], numerics: list[tuple], points: list[tuple[Shape, int, int]], sms: int) -> list[Job]:
    """What the sections launch; `numerics` and `points` are those sections' own lists."""
    result: list[Job] = []
    if "numerics" in sections:
        for shape, bits, dtype, rows, tokens in numerics:
            result += [("append", (shape, 2, tokens, bits, count, dtype)) for count in (tokens - 41, 1)]
            result += [("read", (shape, 2, tokens, bits, dtype)), ("attend", (shape, 2, tokens, bits, rows, dtype))]
    if "decode" in sections:
        for shape, tokens, batch in points:
            result += [("attend", (shape, batch, tokens, bits, 1, torch.bfloat16)) for bits in SETTINGS]
        for shape in SHAPES:
            result += [("baseline", (shape, 1, 32768, chosen, sms)) for chosen in fp8.configurations]
    if "append" in sections:
        result += [("append", (SHAPES[0], 1, 8192, bits, 1, torch.bfloat16)) for bits in SETTINGS]
    return list(dict.fromkeys(result))


def compile_job(job: Job, arch: int, sms: int) -> int:
    """Compile one job's launches for compute capability `arch` (90 for 9.0); how many there were."""
    name, arguments = job
    tuning.multiprocessors = lambda device: sms  # type: ignore[assignment]
    tuning.architecture = lambda device: f"sm_{arch}"  # type: ignore[assignment]
    with compiling(arch) as launches:
        {"attend": attend, "append": append, "read": read, "baseline": baseline}[name](*arguments)
    return len(launches)


def compile_all(todo: list[Job], arch: int, sms: int, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Compile all jobs in processes; one row at the end, and one for each job that failed."""
    begin, done = time.monotonic(), 0
    workers = max(1, (os.cpu_count() or 2) - 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(compile_job, job, arch, sms): job for job in todo}
        try:
            for future in as_completed(futures, timeout=max(1.0, left())):
                if error := future.exception():
                    yield {"job": repr(futures[future]), "error": f"{type(error).__name__}: {error}"[-500:]}
                done += 1
        except TimeoutError:
            pool.shutdown(wait=False, cancel_futures=True)
    yield {"jobs": len(todo), "compiled": done, "seconds": time.monotonic() - begin, "processes": workers}
