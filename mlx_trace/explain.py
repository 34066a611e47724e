"""`tqc.explain` for a model of mlx-lm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from tqc.config import Config
from tqc.mlx_trace.compile import Programs, plain_model
from tqc.mlx_trace.files import bytes_of
from tqc.mlx_trace.packed_cache import PackedSingle
from tqc.report import Explanation, collect

DECODED = 4


def explain(
    model: nn.Module, tokens: Any, options: Mapping[str, Any] | None = None, graphs: bool = False
) -> Explanation:
    """Run a prompt and a few tokens behind it through captured programs; the model stays as it was.

    Args:
        tokens: [n] or [batch, n], what `mx.array` takes.
        options: those that the model was compiled with if it was, else the defaults.
        graphs: as in `tqc.explain`.
    """
    tokens = mx.array(tokens)
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or not tokens.size or not mx.issubdtype(tokens.dtype, mx.integer):
        raise ValueError(f"tokens must be integers of shape [n] or [batch, n], got {tokens.dtype} {tokens.shape}")
    compiled = getattr(type(model), "tqc_programs", None)
    config = compiled.config if compiled and options is None else Config.from_options(options)
    plain = plain_model(model)
    programs, caches = Programs(plain, config, strict=False), make_prompt_cache(plain)
    with collect(texts=graphs) as plans:
        for part in (tokens, *[tokens[:, -1:]] * DECODED):
            mx.eval(programs(plain, part, caches))
    held = [cache for cache in caches if hasattr(cache, "offset")]
    explanation = Explanation(
        [[site.to_dict() for site in plan.sites] for plan in plans],
        bytes_of(caches),
        sum(map(_dense_bytes, held)),
        max((cache.offset for cache in held), default=None),
        [f"not captured: {why}" for why in programs.refused.values()],
        [plan.texts for plan in plans] if graphs else [],
    )
    explanation.note_actions(any(plan.unread for plan in plans))
    return explanation


def _dense_bytes(cache: Any) -> int:
    """Bytes of the same tokens, dense."""
    if not isinstance(cache, PackedSingle):
        return cache.nbytes
    parts = [part.dense for part in (cache.keys, cache.values)]
    return sum(part.nbytes // part.shape[2] * cache.placement.held for part in parts)
