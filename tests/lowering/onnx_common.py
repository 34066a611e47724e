"""Functions of the ONNX domain run alone, and packed caches that only they write."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import FunctionProto, helper
from torch import Tensor

from tqc.format import PackedFormat
from tqc.lowering.onnx.attend import attend_function, read_function
from tqc.lowering.onnx.builder import DOMAIN, DOMAIN_VERSION, OPSET
from tqc.lowering.onnx.encode import table_arrays
from tqc.lowering.onnx.extend import extend_function, state_function
from tqc.lowering.onnx.layout import from_planes
from tqc.ops import Planes

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
CAPACITY = 320

attend_of = functools.cache(attend_function)
read_of = functools.cache(read_function)
extend_of = functools.cache(extend_function)
state_of = functools.cache(state_function)
_sessions: dict[Any, ort.InferenceSession] = {}


def model_of(function: FunctionProto, feeds: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A model that calls `function` with inputs of any sizes; checked in full, shapes inferred."""
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    inputs = [
        helper.make_tensor_value_info(name, kinds[name], [f"{name}_{axis}" for axis in range(array.ndim)])
        for name, array in feeds.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(f"{name}_out") for name in function.output]
    node = helper.make_node(function.name, list(function.input), [out.name for out in outputs], domain=DOMAIN)
    graph = helper.make_graph([node], function.name, inputs, outputs)
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    model = helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=11)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    for out in model.graph.output:
        kind = out.type.tensor_type
        assert kind.elem_type, f"the type of {out.name} is not inferred"
        if not kind.HasField("shape"):
            axes = [f"{out.name}_{axis}" for axis in range(4)]
            out.CopyFrom(helper.make_tensor_value_info(out.name, kind.elem_type, axes))
    onnx.checker.check_model(model, full_check=True)
    return model


def run(function: FunctionProto, feeds: dict[str, np.ndarray], level: str = "ORT_ENABLE_ALL") -> dict[str, np.ndarray]:
    """Results of a function by name."""
    key = (function.name, level, *(array.dtype.str for array in feeds.values()))
    if key not in _sessions:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        _sessions[key] = ort.InferenceSession(model_of(function, feeds).SerializeToString(), options)
    return dict(zip(function.output, _sessions[key].run(None, feeds), strict=True))


def tables(prefix: str, fmt: PackedFormat) -> dict[str, np.ndarray]:
    names = (f"{prefix}_{name}" for name in ("rotation", "levels", "factors", "lookup"))
    return dict(zip(names, table_arrays(fmt).values(), strict=True))


class OnnxCache:
    """Keys or values in the tensors of the ONNX layout, beside the reference's."""

    def __init__(self, fmt: PackedFormat, batch: int, heads: int, dtype: torch.dtype = torch.float32) -> None:
        self.fmt, self.state = fmt, np.zeros(3, np.int64)
        self.reference = Planes.empty(batch, heads, fmt, dtype, "cpu", 0)
        none = np.zeros((batch, heads, 0, fmt.page_bytes), np.uint8)
        self.parts = from_planes(none, self.reference.dense.numpy(), fmt, CAPACITY)

    def feeds(self, prefix: str = "") -> dict[str, np.ndarray]:
        return {f"{prefix}{name}": array for name, array in self.parts.items()}

    def extend(self, new: Tensor, query: Tensor | None, level: str = "ORT_ENABLE_ALL") -> None:
        from tqc.ops import extend

        self.reference = extend(self.reference, new, query=query)
        name = f"extend_{'_'.join(self.fmt.spec.split(':'))}_{query is not None}"
        feeds = {"new": new.numpy(), "state": self.state, "after": new.numpy()}
        feeds |= {"query": query.numpy()} if query is not None else {}
        made = run(extend_of(name, self.fmt, query is not None), feeds | tables("table", self.fmt) | self.parts, level)
        self.parts = {name.removesuffix("_present"): array for name, array in made.items()}
        advance = state_of(f"advance_{'_'.join(self.fmt.spec.split(':'))}", self.fmt)
        self.state = run(advance, {"new": new.numpy(), "state": self.state}, level)["state_present"]
