"""Runs the embedded model's GGUF file in llama.cpp."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import numpy as np
from measure import job, measure

given = job()
file = Path(given["gguf"])
if given["weights"] == "f32":  # the same weights as the file's, dequantized, as torch reads them
    source, file = file, Path(given["folder"]) / f"{file.name.split('.')[0]}.F32.gguf"
    if not file.exists():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
        if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), parameters):
            raise RuntimeError(f"llama.cpp could not dequantize {source}")

if not given["prepare"]:
    kind = getattr(llama_cpp, f"GGML_TYPE_{given['cache'].upper()}")
    longest = max(given["contexts"]) + given["steps"] + 64
    llama = llama_cpp.Llama(
        str(file),
        n_ctx=-(-longest // 256) * 256,
        n_threads=given["threads"],
        n_threads_batch=given["threads"],
        type_k=kind,
        type_v=kind,
        flash_attn=True,
        verbose=False,
    )

    def step(*tokens: int) -> int:
        llama.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (llama.n_vocab(),)).argmax())

    def prefill(ids: list[int]) -> int:
        llama.reset()
        return step(*ids)

    measure(given, prefill, step, {"llama-cpp-python": llama_cpp.__version__})
