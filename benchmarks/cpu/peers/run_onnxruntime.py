"""onnxruntime's GroupQueryAttention on the CPU for one token: float32, float16, 8- and 4-bit caches.

The argument is a JSON object of "batch", "shape" (query heads, heads, head_dim), "length", "threads" and "max_bytes";
the answer, on the standard output, {"minimum_us", "median_us", "reasons"}, each by the name of a cache. Keys and values
that were there before and after share one buffer, so nothing is copied.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import numpy as np
import onnxruntime
from measure import job
from onnx import TensorProto, helper

# Name, bits and kind of scales of a cache, and numpy's and ONNX's type of it and of queries.
CACHES: dict[str, tuple[int, str, Any, int, Any, int]] = {
    "fp32": (32, "NONE", np.float32, TensorProto.FLOAT, np.float32, TensorProto.FLOAT),
    "fp16": (16, "NONE", np.float16, TensorProto.FLOAT16, np.float16, TensorProto.FLOAT16),
    "int8 per tensor": (8, "PER_TENSOR", np.int8, TensorProto.INT8, np.float32, TensorProto.FLOAT),
    "int8 per channel": (8, "PER_CHANNEL", np.int8, TensorProto.INT8, np.float32, TensorProto.FLOAT),
    "int4 per channel": (4, "PER_CHANNEL", np.uint8, TensorProto.UINT8, np.float32, TensorProto.FLOAT),
}


def session(query_heads: int, heads: int, dim: int, cache: str, threads: int) -> onnxruntime.InferenceSession:
    """One GroupQueryAttention node."""
    bits, scales, _, cache_type, _, query_type = CACHES[cache]
    stored = ["batch", heads, "slots", dim // 2 if bits == 4 else dim]
    inputs = {
        "query": (query_type, ["batch", 1, query_heads * dim]),
        "key": (query_type, ["batch", 1, heads * dim]),
        "value": (query_type, ["batch", 1, heads * dim]),
        "past_key": (cache_type, stored),
        "past_value": (cache_type, stored),
        "last": (TensorProto.INT32, ["batch"]),
        "total": (TensorProto.INT32, [1]),
    }
    attributes: dict[str, Any] = {"num_heads": query_heads, "kv_num_heads": heads}
    names = list(inputs)
    if scales != "NONE":
        attributes |= {"k_quant_type": scales, "v_quant_type": scales, "kv_cache_bit_width": bits}
        inputs |= {name: (TensorProto.FLOAT, None) for name in ("k_scale", "v_scale")}
        names += ["", "", "", "", "", "k_scale", "v_scale"]
    outputs = {"out": (query_type, None), "present_key": (cache_type, stored), "present_value": (cache_type, stored)}
    node = helper.make_node("GroupQueryAttention", names, list(outputs), domain="com.microsoft", **attributes)
    values = [[helper.make_tensor_value_info(name, *spec) for name, spec in f.items()] for f in (inputs, outputs)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "attention", *values), opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def times(given: dict[str, Any], cache: str) -> list[float]:
    """Seconds of each run."""
    batch, length = given["batch"], given["length"]
    query_heads, heads, dim = given["shape"]
    bits, scales, cache_type, _, query_type, _ = CACHES[cache]
    shape = (batch, heads, length + 1, dim // 2 if bits == 4 else dim)
    if 2 * np.prod(shape) * np.dtype(cache_type).itemsize > given["max_bytes"]:
        raise MemoryError("the cache is left out for its size")
    runner = session(query_heads, heads, dim, cache, given["threads"])
    binding = runner.io_binding()
    random = np.random.default_rng(0)
    for name, count in (("query", query_heads), ("key", heads), ("value", heads)):
        tensor = random.standard_normal((batch, 1, count * dim)).astype(query_type)
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(tensor))
    for name, tensor in (("last", np.full(batch, length, np.int32)), ("total", np.array([length + 1], np.int32))):
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(tensor))
    if scales != "NONE":
        scale = np.full((1,) if scales == "PER_TENSOR" else (1, heads, 1, dim), 0.02, np.float32)
        for name in ("k_scale", "v_scale"):
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(scale))
    for name in ("key", "value"):
        # Rows repeat, which costs less to make and as much to read.
        rows = random.standard_normal((1, 1, min(1024, shape[2]), shape[3]))
        rows = (rows * (1 if scales == "NONE" else 40)).astype(cache_type)
        stored = np.tile(rows, (batch, heads, -(-shape[2] // rows.shape[2]), 1))[:, :, : shape[2]]
        value = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(stored))
        binding.bind_ortvalue_input(f"past_{name}", value)
        binding.bind_ortvalue_output(f"present_{name}", value)
    binding.bind_output("out")
    runner.run_with_iobinding(binding)
    found, end = [], time.perf_counter() + 0.3
    while (len(found) < 3 or time.perf_counter() < end) and len(found) < 200:
        begin = time.perf_counter()
        runner.run_with_iobinding(binding)
        found.append(time.perf_counter() - begin)
    return found


def main() -> None:
    given = job()
    answer: dict[str, dict[str, Any]] = {"minimum_us": {}, "median_us": {}, "reasons": {}}
    for cache in CACHES:
        name = f"onnxruntime {cache}"
        try:
            found = times(given, cache)
        except Exception as error:
            answer["reasons"][name] = str(error)[:200]
            continue
        answer["minimum_us"][name] = round(1e6 * min(found), 1)
        answer["median_us"][name] = round(1e6 * statistics.median(found), 1)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
