"""Models over more than one process or device: tensor parallel as transformers has it, and offloaded weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.common import OPTIONS
from tests.models.common import assert_close
from tqc import report
from tqc.cache.packed_tensor import PackedTensor
from tqc.passes.plan import FUSE, PACK

PROCESSES = 2


@pytest.fixture(scope="module")
def by_case(tiny_model_folder):
    """What `tensor_parallel_main.py` finds; torchrun chooses a free port by itself."""
    script = Path(__file__).with_name("tensor_parallel_main.py")
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}", script, tiny_model_folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    done = subprocess.run([sys.executable, *run], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.mark.parametrize("case", ["grows", "preallocated"])
def test_each_process_packs_its_own_heads(by_case, case):
    found = by_case[case]
    assert found["error"] < 5e-3, "logits are those of one process"
    assert found["held"] == [[["PackedTensor", 2 // PROCESSES]] * 2] * PROCESSES
    assert found["actions"] == [[FUSE] * 2] * PROCESSES


@pytest.mark.parametrize("place, in_place", [("cpu", True), pytest.param("disk", False, marks=pytest.mark.extended)])
def test_offloaded_weights(tiny_model_folder, tmp_path, place, in_place):
    """As `device_map="auto"` leaves a model that does not fit: hooks bring a layer's weights when it runs."""
    accelerate = pytest.importorskip("accelerate")
    torch._dynamo.reset()
    tokens = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    prompt = torch.arange(80).remainder(model.config.vocab_size)[None]
    dense = model.generate(prompt, **tokens)
    if place == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    compiled = model if in_place else torch.compile(model, backend="tqai", options=OPTIONS)
    if in_place:
        model.compile(backend="tqai", options=OPTIONS)
    with report.collect() as plans:
        result = compiled.generate(prompt, **tokens)
    assert_close(torch.stack(result.logits), torch.stack(dense.logits), 5e-3, "logits")
    assert all(isinstance(layer.keys, PackedTensor) for layer in result.past_key_values.layers)
    # Hooks break the graph around each layer: the compiler does not see a step's attention, which decodes the cache.
    assert PACK in {site.action for plan in plans for site in plan.sites}
