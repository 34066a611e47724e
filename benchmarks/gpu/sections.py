"""The sections of `run.py`: each is a generator of result rows, so that what was measured before an error is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import fp8
import torch
import torch.nn.functional as F
from measure import SETTINGS, SHAPES, Shape, Timer, captured, copy_bandwidth, formats, packed_bytes, packed_cache
from precompile import compile_all, jobs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from tqc.format import PAGE_TOKENS
from tqc.lowering.triton import kernels
from tqc.ops import planes as ops

Row = dict[str, Any]
# Largest deviations from the reference that count as correct, as a share of the largest value.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 1e-2}
BATCHES = (1, 8, 32)
LENGTHS = (4096, 16384, 32768, 131072)
DTYPE = torch.bfloat16


def checks(quick: bool) -> list[tuple[Shape, tuple[int, int], torch.dtype, int, int]]:
    """(shape, bits, dtype, query rows, tokens) of each check of `numerics`."""
    if quick:
        tiny = Shape("tiny", 4, 2, 64)
        return [(tiny, (4, 2), torch.float32, 1, 150), (tiny, (4, 2), torch.bfloat16, 1, 150)]
    settings = [(shape, bits) for shape in SHAPES[:1] for bits in (*SETTINGS, (8, 8), (5, 6), (2, 1))]
    settings += [(shape, (4, 2)) for shape in (*SHAPES[1:], Shape("odd", 8, 4, 96))]
    result = [(*setting, torch.bfloat16, rows, 700) for setting in settings for rows in (1, 3, 200)]
    return result + [(shape, (4, 2), torch.float32, rows, 700) for shape in SHAPES[::3] for rows in (1, 200)]


def points() -> list[tuple[Shape, int, int]]:
    """(shape, tokens, batch) of `decode`; what matters most comes first: a run that ends early has it."""
    every = [(shape, tokens, batch) for shape in SHAPES for tokens in LENGTHS for batch in BATCHES]
    return sorted(every, key=lambda p: (p[1] not in (4096, 32768), p[0] != SHAPES[0], p[0] != SHAPES[1]))


def compile_kernels(device: str, quick: bool, left: Callable[[], float]) -> Iterator[Row]:
    """Fill Triton's cache for the sections below, on all cores."""
    major, minor = torch.cuda.get_device_capability()
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    todo = jobs(["numerics", "decode", "append"], checks(quick), points()[:2] if quick else points(), sms)
    yield from compile_all(todo, 10 * major + minor, sms, left)


def numerics(device: str, quick: bool, left: Callable[[], float]) -> Iterator[Row]:
    """Every op against the reference, which runs on the CPU."""
    for shape, bits, dtype, rows, tokens in checks(quick):
        if left() < 5:
            raise TimeoutError("not every check was made")
        yield _check(shape.query_heads, shape.heads, shape.head_dim, *bits, dtype, rows, device, tokens)


def _check(
    query_heads: int, heads: int, head_dim: int, k_bits: int, v_bits: int, dtype: torch.dtype, rows: int, device: str,
    length: int,
) -> Row:  # fmt: skip
    k_fmt, v_fmt = formats(head_dim, k_bits, v_bits)
    generator = torch.Generator().manual_seed(rows)
    expected, actual = [], []
    for fmt in (k_fmt, v_fmt):
        dense = fmt.empty_dense(2, heads, fmt.dense_rows, dtype, "cpu")
        balance = torch.empty(2, heads, 1, head_dim).uniform_(0.5, 2.0, generator=generator)
        fmt.head(dense)[:, :, 1:] = balance
        parts = (
            torch.zeros(2, heads, length // PAGE_TOKENS + 1, fmt.page_bytes, dtype=torch.uint8),
            dense,
            torch.zeros(3, dtype=torch.int64),
        )
        expected.append(parts)
        actual.append(tuple(part.to(device, copy=True) for part in parts))
    errors = {}
    for count in (length - 41, 1, 40):
        key, value = (torch.randn(2, count, heads, head_dim, generator=generator).to(dtype) for _ in range(2))
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        for fmt, parts, new in ((k_fmt, expected[0], key), (v_fmt, expected[1], value)):
            ops.append(*parts, new, None, fmt.spec)
        kernels.append_pair(*actual[0], key.to(device), *actual[1], value.to(device), None, k_fmt.spec, v_fmt.spec)
    for name, fmt, ours, theirs in (("keys", k_fmt, actual[0], expected[0]), ("values", v_fmt, actual[1], expected[1])):
        # What was packed here, decoded by the reference: another code may be chosen on a boundary between levels.
        packed = ops.read(*(part.cpu() for part in ours), length, fmt.spec).float()
        reference = ops.read(*theirs, length, fmt.spec).float()
        errors[f"append {name}"] = ((packed - reference).norm() / reference.norm()).item()
        ours[0].copy_(theirs[0])
        ours[1].copy_(theirs[1])
        errors[f"read {name}"] = _deviation(kernels.read(*ours, length, fmt.spec), reference)
    query = torch.randn(2, rows, query_heads, head_dim, generator=generator).to(dtype).transpose(1, 2)
    new = [torch.randn(2, heads, rows, head_dim, generator=generator).to(dtype) for _ in range(2)]
    rest = (None, None, None, head_dim**-0.5, 0.0, True, k_fmt.spec, v_fmt.spec)
    wanted, wanted_lse = ops.attend(query, *expected[0], *expected[1], *new, *rest)
    got, got_lse = kernels.attend(query.to(device), *actual[0], *actual[1], *(part.to(device) for part in new), *rest)
    errors["attend"], errors["attend lse"] = _deviation(got, wanted), _deviation(got_lse, wanted_lse)
    limit = TOLERANCE[dtype]
    return {
        "query_heads": query_heads, "heads": heads, "head_dim": head_dim, "k_bits": k_bits, "v_bits": v_bits,
        "dtype": str(dtype), "rows": rows, "errors": errors, "limit": limit,
        "passed": all(error <= limit for error in errors.values()),
    }  # fmt: skip


def _deviation(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.float().cpu(), expected.float()
    if not torch.isfinite(actual).all():
        return float("inf")
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def decode(device: str, quick: bool, left: Callable[[], float]) -> Iterator[Row]:
    """Attention of one new token per sequence: packed, FlashAttention in bfloat16, flex_attention, FP8, and the floor.

    All are replayed as CUDA graphs. What does not fit into the memory or the time is left out, and the row says so.
    """
    timer = Timer()
    bandwidth = copy_bandwidth(timer)
    yield {"copy_bytes_per_second": bandwidth}
    for shape, length, batch in points()[:2] if quick else points():
        if left() < 10:
            yield {"skipped": f"{shape.model}, {length} tokens, batch {batch}: no time left"}
            continue
        row = {"model": shape.model, "length": length, "batch": batch}
        try:
            yield row | _decode_point(
                shape, length, batch, timer, bandwidth, flex=shape is SHAPES[0] and length == 32768
            )
        except torch.cuda.OutOfMemoryError as error:
            yield row | {"error": f"out of memory: {str(error).splitlines()[0]}"}
        torch.cuda.empty_cache()


def _decode_point(shape: Shape, length: int, batch: int, timer: Timer, bandwidth: float, flex: bool) -> Row:
    heads, dim, scale = shape.heads, shape.head_dim, shape.head_dim**-0.5
    query = torch.randn(batch, shape.query_heads, 1, dim, dtype=DTYPE, device="cuda")
    key, value = (torch.randn(batch, heads, 1, dim, dtype=DTYPE, device="cuda") for _ in range(2))
    row: Row = {"ms": {}, "floor_ms": {}, "share_of_floor": {}, "cache_bytes": {}, "errors": {}}

    def measure(name: str, function: Callable[[], Any], floor: int) -> None:
        row["cache_bytes"][name], row["floor_ms"][name] = floor, floor / bandwidth * 1e3
        try:
            row["ms"][name] = timer(captured(function), seconds=0.05)
            row["share_of_floor"][name] = row["floor_ms"][name] / row["ms"][name]
        except Exception as error:  # a contender that fails must not hide the others
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
            row["errors"][name] = f"{type(error).__name__}: {error}"[:300]

    for k_bits, v_bits in SETTINGS:
        k_fmt, v_fmt = formats(dim, k_bits, v_bits)
        k, v = (packed_cache(batch, heads, length, fmt, DTYPE, "cuda") for fmt in (k_fmt, v_fmt))
        rest = (key, value, None, None, None, scale, 0.0, True, k_fmt.spec, v_fmt.spec)
        floor = sum(packed_bytes(batch, heads, length, fmt, DTYPE) for fmt in (k_fmt, v_fmt))
        measure(f"K{k_bits}/V{v_bits}", partial(kernels.attend, query, *k, *v, *rest), floor)
        del k, v

    dense = batch * heads * length * dim * 2 * 2
    if dense > 0.8 * torch.cuda.mem_get_info()[0]:
        row["errors"]["dense"] = "does not fit into the memory"
        return row
    keys, values = (torch.randn(batch, heads, length, dim, dtype=DTYPE, device="cuda") for _ in range(2))
    stacked = query.view(batch, heads, shape.query_heads // heads, dim)
    measure("FlashAttention bf16", partial(_flash, query, keys, values, scale, True), dense)
    # The query heads of a group as rows: the same result for one token, and each key is read once.
    measure("FlashAttention bf16, heads as rows", partial(_flash, stacked, keys, values, scale, False), dense)
    if flex:
        measure("flex_attention bf16", partial(_flex, query, keys, values, scale), dense)
    (k8, k_scale), (v8, v_scale) = fp8.quantize(keys), fp8.quantize(values)
    del keys, values
    best = _fastest_fp8(query, k8, v8, k_scale, v_scale, scale, timer)
    row["fp8_configuration"] = best
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    measure("FP8", partial(fp8.attend, query, k8, v8, k_scale, v_scale, scale, best, sms), dense // 2)
    rivals = {name: ms for name, ms in row["ms"].items() if name.startswith(("Flash", "flex"))}
    if rivals:
        row["speedup_over_best_bf16"] = {
            name: min(rivals.values()) / ms for name, ms in row["ms"].items() if name.startswith(("K", "FP8"))
        }
    return row


def _flash(query: Tensor, keys: Tensor, values: Tensor, scale: float, grouped: bool) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=grouped)


@torch.compile(dynamic=False)
def _flex(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    return flex_attention(query, keys, values, scale=scale, enable_gqa=True)


_fp8_best: dict[tuple[int, int, int], Any] = {}


def _fastest_fp8(query: Tensor, k8: Tensor, v8: Tensor, k_scale: float, v_scale: float, scale: float, timer: Timer):
    """The fastest configuration for this head_dim, group and amount of work, tried once for each."""
    batch, heads, length, dim = k8.shape
    kind = (dim, query.shape[1] // heads, (batch * length).bit_length())
    if kind not in _fp8_best:
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        times = {}
        for configuration in fp8.configurations:
            try:
                times[configuration] = timer(
                    partial(fp8.attend, query, k8, v8, k_scale, v_scale, scale, configuration, sms), 0.01, 5, 10
                )
            except Exception:  # more shared memory than there is
                continue
        _fp8_best[kind] = min(times, key=times.__getitem__)
    return _fp8_best[kind]


def append(device: str, quick: bool, left: Callable[[], float]) -> Iterator[Row]:
    """Quantize and append of one token in the 32 layers of an 8B model, averaged over 64 tokens (two pages)."""
    timer = Timer()
    bandwidth = copy_bandwidth(timer)
    shape, layers, tokens = SHAPES[0], 2 if quick else 32, 64
    weights = 16.06e9  # bytes of Llama-3.1-8B in bfloat16, read once a token
    for batch in BATCHES:
        for k_bits, v_bits in SETTINGS:
            k_fmt, v_fmt = formats(shape.head_dim, k_bits, v_bits)
            length = 4096
            caches = [
                [packed_cache(batch, shape.heads, length, fmt, DTYPE, "cuda", 1000) for fmt in (k_fmt, v_fmt)]
                for _ in range(layers)
            ]
            key, value = (
                torch.randn(batch, 1, shape.heads, shape.head_dim, dtype=DTYPE, device="cuda").transpose(1, 2)
                for _ in range(2)
            )

            def step(caches=caches, key=key, value=value, specs=(k_fmt.spec, v_fmt.spec)) -> None:
                for k, v in caches:
                    kernels.append_pair(*k, key, *v, value, None, *specs)

            replay = captured(step)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            times = []
            for _ in range(5):
                begin.record()
                for _ in range(tokens):
                    replay()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / tokens)
            packed = sum(packed_bytes(batch, shape.heads, length, fmt, DTYPE) for fmt in (k_fmt, v_fmt)) * layers
            ms, floor = sorted(times)[len(times) // 2], (weights + packed) / bandwidth * 1e3
            assert int(caches[0][0][2][0]) == length + 3 + 5 * tokens
            yield {
                "model": shape.model, "batch": batch, "layers": layers, "setting": f"K{k_bits}/V{v_bits}",
                "ms_per_token": ms, "step_floor_ms": floor, "share_of_step_floor": ms / floor,
            }  # fmt: skip


def generate(device: str, quick: bool, left: Callable[[], float]) -> Iterator[Row]:
    """8B-shaped random weights at 32K tokens, batch 8: Inductor with a dense cache against the packed one.

    Both with a growing cache, and with a preallocated one whose steps are recorded as CUDA graphs.
    """
    for name in ("packed", "dense", "packed, reduce-overhead", "dense, reduce-overhead"):
        if left() < 60:
            yield {"cache": name, "skipped": "no time left"}
            continue
        try:
            yield _generate(name, 2 if quick else 32, 512 if quick else 32768, 1 if quick else 8, 8 if quick else 64)
        except Exception as error:
            yield {"cache": name, "error": f"{type(error).__name__}: {error}"[:500]}
        torch._dynamo.reset()
        torch.cuda.empty_cache()


def _generate(cache: str, layers: int, length: int, batch: int, steps: int) -> Row:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=2 * length + 1024, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    contents, _, mode = cache.partition(", ")
    backend = "tqai" if contents == "packed" else "inductor"
    model.compile(backend=backend, **({"mode": mode} if mode else {}))
    ids = torch.randint(0, config.vocab_size, (batch, length), device="cuda")
    past: Any = DynamicCache(config=config)
    if mode:
        past = StaticCache(config=config, max_cache_len=length + steps + 16)
        past.early_initialization(batch, config.num_key_value_heads, config.head_dim, DTYPE, torch.device("cuda"))
    chunk = 4096 // batch  # a chunk's activations stay small beside the caches
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        begin = time.perf_counter()
        for at in range(0, length, chunk):
            out = model(input_ids=ids[:, at : at + chunk], past_key_values=past, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        prefill_s = time.perf_counter() - begin
        token = out.logits[:, -1:].argmax(-1)
        times = []
        for _ in range(steps + 8):
            begin = time.perf_counter()
            torch.compiler.cudagraph_mark_step_begin()
            out = model(input_ids=token, past_key_values=past, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    median = sorted(times[8:])[steps // 2]
    return {
        "cache": cache, "layers": layers, "length": length, "batch": batch, "prefill_with_compile_s": prefill_s,
        "ms_per_step": 1e3 * median, "tokens_per_second": batch / median,
        "peak_bytes": torch.cuda.max_memory_allocated(), "weights_bytes": sum(p.nbytes for p in model.parameters()),
    }  # fmt: skip


SECTIONS: dict[str, Callable[[str, bool, Callable[[], float]], Iterator[Row]]] = {
    "compile": compile_kernels,
    "numerics": numerics,
    "decode": decode,
    "append": append,
    "generate": generate,
}
