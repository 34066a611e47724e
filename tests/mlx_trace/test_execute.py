"""Graphs of torch on MLX: a model of transformers as dynamo traces it, and the functions of the table one by one."""

from __future__ import annotations

import operator
from typing import Any

import pytest

pytest.importorskip("mlx", reason="needs mlx")

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.fx import Graph, GraphModule  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from tqc import ops  # noqa: E402
from tqc.mlx_trace import functions  # noqa: E402
from tqc.mlx_trace.arrays import array_of, tensor_of  # noqa: E402
from tqc.mlx_trace.execute import Executor, Unsupported  # noqa: E402


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_llama_of_transformers_runs_on_mlx(attention: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attn_implementation=attention)).eval()
    graphs: list[tuple[GraphModule, list[Any]]] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        graphs.append((gm, inputs))
        return gm.forward

    tokens, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    if attention == "eager":
        mask = torch.zeros(2, 1, 7, 7).masked_fill(~mask, torch.finfo(torch.float32).min)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = torch.compile(model, backend=backend, fullgraph=True)(
            tokens, attention_mask=mask, use_cache=False
        ).logits
    ((gm, inputs),) = graphs
    executor = Executor(gm)
    arrays = [array_of(held) for held in inputs]
    for run in (executor, mx.compile(executor)):
        (logits,) = run(*arrays)
        assert torch.allclose(tensor_of(logits), expected, atol=1e-5)


def graph_of(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[GraphModule, list[torch.Tensor]]:
    """A graph of one call; tensors among the arguments are its inputs."""
    graph, inputs = Graph(), []

    def swap(held: Any) -> Any:
        if isinstance(held, torch.Tensor):
            inputs.append(held)
            return graph.placeholder(f"x{len(inputs)}")
        if isinstance(held, (tuple, list)):
            return type(held)(map(swap, held))
        return held

    args, kwargs = swap(args), {name: swap(held) for name, held in kwargs.items()}
    kind = "call_method" if isinstance(target, str) else "call_function"
    graph.output(graph.create_node(kind, target, args, kwargs))
    return GraphModule(torch.nn.Module(), graph), inputs


def x(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def ints(*shape: int, below: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, below, shape).astype(np.int32))


_QKV = (x(2, 4, 3, 8), x(2, 2, 5, 8), x(2, 2, 5, 6))
_MASK = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0]], dtype=torch.bool)


@pytest.mark.parametrize(
    "target, args, kwargs",
    [
        (F.scaled_dot_product_attention, (x(1, 2, 3, 8), x(1, 2, 5, 8), x(1, 2, 5, 8)), {"is_causal": True}),
        (F.scaled_dot_product_attention, _QKV, {"attn_mask": _MASK, "scale": 0.5, "enable_gqa": True}),
        (F.scaled_dot_product_attention, _QKV, {"attn_mask": x(3, 5), "enable_gqa": True}),
        (ops.attention, (*_QKV, _MASK, x(4), 0.5), {}),
        (ops.attention, (*_QKV, _MASK, None, 0.5, 2.0), {}),
        (ops.attention, (*_QKV, x(2, 4, 3, 5), None, 0.5, 2.0), {}),
        (ops.attention, (*_QKV, x(2, 1, 3, 5), None, 0.5, 2.0), {}),
        (functions.rope, (x(2, 3, 5, 8), 8, False, 100.0, 0.5, torch.tensor(7)), {}),
        (functions.rope, (x(2, 3, 5, 8), 6, True, 100.0, 1.0, torch.tensor([7, 2])), {}),
        (functions.rope, (x(2, 3, 5, 8), 8, False, None, 1.0, 3, x(4).abs() + 0.1), {}),
        (functions.causal_mask, (7, torch.tensor(2), 3), {"window": 2}),
        (functions.causal_mask, (7, torch.tensor([2, 4]), 3), {}),
        (functions.ring_write, (x(1, 2, 6, 4), x(1, 2, 1, 4), torch.tensor(5)), {}),
        (functions.window_append, (x(1, 2, 6, 4), x(1, 2, 1, 4)), {}),
        (functions.slice_update, (x(4, 5), x(2, 5), (slice(1, 3), slice(None))), {}),
        (functions.slice_update, (x(4, 5), x(4, 2), (slice(None), slice(0, 4, 2)), "sum"), {}),
        (functions.slice_update, (x(4, 5), x(4, 2), (slice(None), slice(0, 2)), "prod"), {}),
        (functions.dynamic_slice, (x(4, 5), torch.tensor([2]), [1], (4, 3)), {}),
        (functions.dynamic_slice_update, (x(4, 5), x(4, 2), torch.tensor([3]), [1]), {}),
        (functions.gather, (x(4, 5, 6), [ints(2, 3)], [1], (4, 1, 6)), {}),
        (functions.gather, (x(4, 5, 6), [ints(2, 1), ints(1, 3)], [0, 2], (1, 5, 1)), {}),
        (functions.scatter, (x(4, 5), [torch.tensor([0, 2])], x(2, 1, 5), [0], "none"), {}),
        (functions.scatter, (x(4, 5), [torch.tensor([0, 0])], x(2, 1, 5), [0], "sum"), {}),
        (functions.scan, (x(3, 4), "sum", 1, True, False), {}),
        (functions.scan, (x(3, 4), "prod", 0), {}),
        (functions.sort, (x(3, 4), 1), {}),
        (functions.convolution, (x(2, 7, 4), x(4, 3, 1), [1], [[2], [0]], [1], [1], 4, False), {}),
        (functions.gather_mm, (x(3, 1, 4), x(2, 4, 5), ints(3), ints(3, below=2)), {}),
        (F.embedding, (ints(2, 3), x(4, 5)), {}),
        (F.gelu, (x(3, 4),), {"approximate": "tanh"}),
        (F.layer_norm, (x(3, 4), (4,), x(4), None, 1e-3), {}),
        (F.rms_norm, (x(3, 4), (4,), x(4), 1e-3), {}),
        (F.rms_norm, (x(3, 4), (4,)), {"eps": 1e-3}),
        (F.linear, (x(2, 3, 4), x(5, 4), x(5)), {}),
        (F.pad, (x(2, 3), (1, 2, 0, 3), "constant", 0.5), {}),
        (torch.split, (x(2, 7), [3, 4], 1), {}),
        (torch.split, (x(2, 7), 3, 1), {}),
        (torch.take_along_dim, (x(2, 3), ints(2, 2).long(), 1), {}),
        (torch.where, (_MASK, x(3, 5), -1.0), {}),
        (torch.arange, (1, 9, 2), {"dtype": torch.int32}),
        (torch.full, ((2, 3), 2.0), {"dtype": torch.float16}),
        (torch.amax, (x(2, 3),), {"dim": (1,), "keepdim": True}),
        ("index_copy", (x(1, 2, 6, 4), 2, torch.tensor([4, 1]), x(1, 2, 2, 4)), {}),
        ("expand", (x(2, 1, 3), 4, -1, 2, -1), {}),
        ("view", (x(2, 6), 3, 4), {}),
        ("to", (x(2, 6), torch.float16), {}),
    ],
)
def test_a_function_means_on_mlx_what_it_means_in_torch(target: Any, args: Any, kwargs: Any) -> None:
    gm, inputs = graph_of(target, args, kwargs)
    expected, made = gm(*inputs), Executor(gm)(*map(array_of, inputs))
    for a, b in zip(
        *([held] if isinstance(held, (torch.Tensor, mx.array)) else held for held in (expected, made)), strict=True
    ):
        got = tensor_of(b)
        assert got.shape == a.shape and (got.dtype == a.dtype or not a.is_floating_point())
        assert torch.allclose(got.double(), a.double(), atol=2e-5)


def test_writing_in_place_gives_the_new_array_from_there_on() -> None:
    cache, new = x(1, 2, 6, 4), x(1, 2, 2, 4)

    graph = Graph()
    held, first, rows = map(graph.placeholder, ("held", "first", "rows"))
    every, stop = slice(None), graph.call_function(operator.add, (first, 2))
    graph.call_function(operator.setitem, (held, (every, every, slice(first, stop)), rows))
    graph.output(graph.call_function(operator.mul, (held, 2)))
    gm = GraphModule(torch.nn.Module(), graph)
    made = Executor(gm)(array_of(cache), mx.array(3), array_of(new))
    expected = cache.clone()
    expected[:, :, 3:5] = new
    assert torch.allclose(tensor_of(made), expected * 2)


def test_what_mlx_has_not_is_named_before_anything_runs() -> None:
    gm, _ = graph_of(torch.linalg.qr, (x(2, 2),), {})
    with pytest.raises(Unsupported, match="MLX has nothing for .*linalg_qr"):
        Executor(gm)
    with pytest.raises(TypeError, match="the graph takes 1 arrays, got 0"):
        Executor(graph_of(torch.tanh, (x(2),), {})[0])()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.uint8, torch.int64, torch.bool])
def test_arrays_hold_the_same_elements(dtype: torch.dtype) -> None:
    tensor = (x(3, 4) * 3).abs().to(dtype)
    assert torch.equal(tensor_of(array_of(tensor)), tensor)
