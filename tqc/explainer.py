"""`tqc.explain`: compile a model as the backend would, run it, and say what was found."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from tqc import recompiles
from tqc.backend import tqai
from tqc.cache.io import cache_bytes
from tqc.cache.packed_tensor import PackedTensor
from tqc.inner_models import Calls, generate_of
from tqc.optimized_module import options_of
from tqc.report import Explanation, collect
from tqc.torch_private import missing, pytree

if TYPE_CHECKING:
    from tqc.diffusion.explanation import PipelineExplanation


def explain(
    model: Any, *args: Any, options: Mapping[str, Any] | None = None, graphs: bool = False, **inputs: Any
) -> Explanation | PipelineExplanation:
    """Compile `model` as the backend would, run it on `inputs`, and say what was found, what was not, and why.

    A model with `generate` makes a few tokens, so that its prefill and decode graphs are both seen; any other is called
    once. Nothing but attention and the cache is compiled, and the model stays as it was.

    Args:
        model: a module of torch; or one of mlx-lm, whose one input is tokens, [n] or [batch, n]; or a pipeline of
            diffusers that `compile_pipeline` compiled, which is called with `inputs` if there are any.
        options: of the backend; those that the model was compiled with if it was, else the defaults.
        graphs: whether the graphs shall be shown as text, before the passes and behind each that changed them.
    """
    if isinstance(getattr(model, "transformer", None), torch.nn.Module) and not isinstance(model, torch.nn.Module):
        from tqc.diffusion.explanation import explain_pipeline

        return explain_pipeline(model, *args, **inputs)
    if not isinstance(model, torch.nn.Module):
        return _explain_mlx(model, *args, options=options, graphs=graphs, **inputs)
    inner: Any = getattr(model, "_orig_mod", model)
    settings = {**(options if options is not None else options_of(model) or {}), "rest": "eager"}
    # A backend of its own, since dynamo would reuse what it compiled for equal options, and nothing would be seen.
    backend: Any = functools.partial(tqai, options=settings)
    backend.reset = recompiles.forget
    compiled: Any = torch.compile(inner, backend=backend)
    explanation, cache = Explanation([]), None
    generate = generate_of(inner)
    # Each call compiles anew, so that graphs of earlier ones must not count.
    fresh = torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16)
    with collect(texts=graphs) as plans, torch.no_grad(), fresh:
        if generate:
            inputs |= {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
            # What the user compiled inside compiles anew as well.
            own = [m for m in inner.modules() if options_of(m) is not None]
            calls = Calls.of(inner, compiled.dynamo_ctx, own)
            with calls.noting():
                result = generate(*args, **inputs)
            explanation.notes += _whom_generate_called(calls)
            cache = getattr(result, "past_key_values", None)
        else:
            compiled(*args, **inputs)
    explanation.graphs = [[site.to_dict() for site in plan.sites] for plan in plans]
    explanation.texts = [plan.texts for plan in plans] if graphs else []
    explanation.notes += [f"graph {number}: {plan.cuda_graph}" for number, plan in enumerate(plans) if plan.cuda_graph]
    explanation.notes += [f"{feature}: {why}" for feature, why in missing().items()] + recompiles.met()
    if cache is not None:
        halves = _halves(cache)
        explanation.tokens = sum(int(half.get_seq_length()) for half in halves)
        explanation.cache_bytes = cache_bytes(cache)
        explanation.dense_bytes = sum(map(_dense_bytes, halves))
        explanation.notes += _evicted(halves, explanation.tokens)
    explanation.note_actions(any(plan.unread for plan in plans))
    return explanation


def _explain_mlx(model: Any, *args: Any, **how: Any) -> Explanation:
    if not any(cls.__module__.startswith("mlx.nn") for cls in type(model).__mro__):
        raise TypeError(f"model must be a torch.nn.Module or an mlx.nn.Module, got {type(model).__name__}")
    from tqc.mlx_trace.explain import explain as explain_mlx

    return explain_mlx(model, *args, **how)


def _whom_generate_called(calls: Calls) -> list[str]:
    """What to say where `generate` calls another module than its own."""
    if "" in calls.called:
        return []
    if names := calls.compiled_called():
        return [f"generate calls {', '.join(names)}, which is compiled with the module around it"]
    names = calls.taking_caches()
    return [f"generate does not call the compiled module but {', '.join(names)}: compile that by its own name"]


def _halves(cache: Any) -> list[Any]:
    """The caches of an encoder-decoder's self and cross attention; any other cache itself."""
    halves = [getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    return [half for half in halves if half is not None] or [cache]


def _evicted(caches: list[Any], tokens: int) -> list[str]:
    """How many tokens were evicted, where some were."""
    layers = [layer for cache in caches for layer in getattr(cache, "layers", [])]
    packed = [keys for layer in layers if isinstance(keys := getattr(layer, "keys", None), PackedTensor)]
    counts = sorted({keys.evicted_tokens for keys in packed} - {0})
    return [f"of {tokens} tokens {' or '.join(map(str, counts))} were evicted, by each head its own"] if counts else []


def _dense_bytes(cache: Any) -> int:
    """Bytes of the same keys and values, dense."""
    layers = getattr(cache, "layers", [])
    tensors = pytree.tree_leaves([(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers])
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
