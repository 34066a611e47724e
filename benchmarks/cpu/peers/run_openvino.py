"""Runs the embedded model's GGUF file in OpenVINO, converted by OpenVINO GenAI, its weights as they are in the file."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino
from measure import job, measure
from openvino import opset13

given = job()
folder = Path(given["folder"]) / "openvino-model"
if not (folder / "openvino_model.bin").exists():
    import openvino_genai

    folder.mkdir(exist_ok=True)
    shutil.copy(given["gguf"], folder)
    openvino_genai.LLMPipeline(folder / Path(given["gguf"]).name, "CPU", enable_save_ov_model=True)

if not given["prepare"]:
    core = openvino.Core()
    graph = core.read_model(folder / "openvino_model.xml")
    # Logits of the last token only, as OpenVINO's own pipeline and all others here compute them.
    head = graph.get_results()[0].input_value(0).get_node()
    last = opset13.gather(head.input_value(0), opset13.constant([-1]), opset13.constant(1))
    head.input(0).replace_source_output(last.output(0))
    graph.validate_nodes_and_infer_types()
    precision = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": given["cache"]}
    compiled = core.compile_model(graph, "CPU", {**precision, "INFERENCE_NUM_THREADS": given["threads"]})
    request = compiled.create_infer_request()
    length = 0

    def step(*tokens: int) -> int:
        global length
        positions = np.arange(length, length + len(tokens))[None]
        length += len(tokens)
        logits = request.infer(
            {
                "input_ids": np.array([tokens], dtype=np.int64),
                "attention_mask": np.ones((1, length), dtype=np.int64),
                "position_ids": positions,
                "beam_idx": np.zeros(1, dtype=np.int32),
            },
            share_outputs=True,
        )[0]
        return int(logits[0, -1].argmax())

    def prefill(ids: list[int]) -> int:
        global length
        request.reset_state()
        length = 0
        return step(*ids)

    measure(given, prefill, step, {"openvino": version("openvino"), "openvino-genai": version("openvino-genai")})
