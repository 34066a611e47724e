"""A model of mlx-lm for code that decodes with tensors of torch, as `tqc eval` and the command line do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import torch
from mlx_lm.models.cache import make_prompt_cache
from torch import Tensor

from tqc.mlx_trace.arrays import dtype_of, tensor_of
from tqc.mlx_trace.compile import compile_mlx, copied, plain_model
from tqc.mlx_trace.files import to_torch


def load(folder: Path | str, dtype: torch.dtype | None) -> tuple[AsTorch, Any]:
    """A model and its tokenizer of transformers, of a folder or a hub id; None leaves its dtype as it is."""
    import mlx_lm

    config: Any = mlx_lm.load(str(folder), lazy=True, return_config=True)[2]
    model, tokenizer = mlx_lm.load(str(folder), model_config=rotary(config))[:2]
    if dtype is not None:
        model.set_dtype(dtype_of(dtype))
    return AsTorch(model), tokenizer._tokenizer


def rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers has written about rotary positions since its version 5, under the names that all models of
    mlx-lm read: most of them would take their own default in place of `rope_parameters` without a word."""
    given = config.get("rope_parameters") or {}
    local = given.get("sliding_attention", {})
    given = given.get("full_attention", given)
    made = {"rope_theta": given.get("rope_theta"), "rope_local_base_freq": local.get("rope_theta")}
    if given.get("rope_type", "default") != "default":
        made["rope_scaling"] = given
    return {name: held for name, held in made.items() if held is not None and config.get(name) is None}


class AsTorch:
    """Callable with token ids and a list of mlx-lm's caches.

    Attributes:
        model: of mlx-lm.
    """

    device = torch.device("cpu")

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def dtype(self) -> torch.dtype:
        """Of what it computes, quantized weights apart."""
        logits = self.model(mx.zeros((1, 1), mx.int32))
        return tensor_of(logits[..., :0]).dtype

    def forward(
        self, input_ids: Tensor, past_key_values: list[Any], use_cache: bool = True, logits_to_keep: int = 0
    ) -> Any:
        """An object with `logits`, [batch, n, vocabulary], or of the last `logits_to_keep` tokens alone."""
        tokens, caches = mx.array(input_ids.numpy()), past_key_values
        before = tokens.shape[1] - logits_to_keep if logits_to_keep else 0
        if before > 0:
            self.model(tokens[:, :before], cache=caches)
            mx.eval([cache.state for cache in caches])  # and no logits
        logits = self.model(tokens[:, max(0, before) :], cache=caches)
        mx.eval(logits, [cache.state for cache in caches])
        return SimpleNamespace(logits=tensor_of(logits))

    __call__ = forward

    def new_cache(self) -> list[Any]:
        return make_prompt_cache(self.model)

    def compiled(self, options: Mapping[str, Any]) -> AsTorch:
        """The same weights, compiled; this one stays as it is."""
        copy = copied(plain_model(self.model))
        return AsTorch(compile_mlx(copy, strict=True, **options))

    @staticmethod
    def held(caches: list[Any]) -> Any:
        """What caches hold, as a cache of transformers."""
        return to_torch(caches)
