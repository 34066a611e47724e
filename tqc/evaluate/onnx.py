"""A decoder that runs the exported model, to be measured beside the others."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tqc.evaluate.decode import Decoder
from tqc.export.cache_file import as_cache
from tqc.export.generator import OnnxGenerator
from tqc.export.onnx import export_onnx
from tqc.format import PackedFormat


def onnx_decoder(
    name: str, model: Any, options: dict[str, Any], formats: tuple[PackedFormat, ...], tokens: int
) -> Decoder:
    """Export `model` and decode with what came out, texts of up to `tokens` tokens.

    Raises:
        ExportError: if it cannot be exported, or if a cache would stay dense.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        first = OnnxGenerator(export_onnx(model, Path(folder) / "model", max_cache_len=tokens, strict=True, **options))

    def run(ids: Tensor, past_key_values: OnnxGenerator, use_cache: bool, logits_to_keep: int = 0) -> Any:
        keep = range(ids.shape[1])[-logits_to_keep:]
        return SimpleNamespace(logits=torch.from_numpy(past_key_values.step(ids.numpy(), keep=keep)))

    def new_cache() -> OnnxGenerator:
        made = first.fork()
        made.reset(1)
        return made

    return Decoder(name, run, new_cache, formats, held=as_cache)
