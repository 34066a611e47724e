"""Models as ONNX files: onnxruntime gives the logits and the packed caches that torch does, and bad input is told."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import DynamicCache

import tqc
from tests.models.common import FAMILIES, prompt
from tqc.config import Config
from tqc.evaluate.decode import Decoder, decode_in_step
from tqc.evaluate.onnx import onnx_decoder
from tqc.export.cache_file import load, save
from tqc.export.capture import ExportError
from tqc.export.check import compare
from tqc.export.generator import OnnxGenerator
from tqc.export.metadata import METADATA, ModelFileError
from tqc.export.onnx import export_onnx
from tqc.export.sampling import Sampling

# Small enough that windows of 60 tokens are packed too.
OPTIONS = {"residual_window": 32}
PROMPT, STEPS = 80, 64


def build(name: str) -> Any:
    more = {"num_hidden_layers": 4} if name == "llama" else {}  # the last ones are copies
    return FAMILIES[name].build("eager" if name == "gemma2" else "sdpa", **more)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(build("llama"), tmp_path_factory.mktemp("onnx") / "llama", max_cache_len=160, **OPTIONS)


def assert_same(model: Any, folder: Path, options: dict[str, Any] | None, edges: int = 0) -> None:
    """`edges`: how many bytes may differ because a number lies on the edge between two codes, which shows in logits."""
    ids, mask = prompt(2, PROMPT + STEPS), torch.ones(2, PROMPT + STEPS, dtype=torch.int64)
    mask[0, :5] = 0
    torch._dynamo.reset()
    found = compare(model, folder, options, ids, PROMPT, mask)
    assert found.prefill <= 2e-4 and found.same_tokens == found.steps == 1 + STEPS, found
    assert found.codes <= edges and found.decode <= (5e-3 if found.codes else 2e-4), found
    assert bool(found.code_bytes) == (options is not None), found


def test_llama_as_torch_has_it(llama: Path) -> None:
    assert len(OnnxGenerator(llama).metadata["packed"]) == 8
    assert_same(build("llama"), llama, OPTIONS)


@pytest.mark.extended
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "mistral"])
def test_families_as_torch_has_them(name: str, tmp_path: Path) -> None:
    folder = export_onnx(build(name), tmp_path / name, max_cache_len=160, **OPTIONS)
    assert len(OnnxGenerator(folder).metadata["packed"]) == 2 * FAMILIES[name].packed
    assert_same(build(name), folder, OPTIONS, edges=2 if name == "mistral" else 0)


def test_like_layers_are_converted_once(llama: Path) -> None:
    nodes = onnx.load(llama / "model.onnx", load_external_data=False).graph.node
    kinds = [node.op_type.split("_")[0] for node in nodes if node.domain == "tqc"]
    assert kinds.count("attend") == 4 and not {"enter", "leave", "repeat"} & set(kinds)
    copies = [node.name for node in nodes if node.name.endswith("_0_1")]
    assert len(copies) > 20 and len({node.name for node in nodes}) == len(nodes)


@pytest.mark.extended
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_dense_by_the_same_road(name: str, tmp_path: Path) -> None:
    """Whole caches, and windows that cut themselves."""
    folder = export_onnx(build(name), tmp_path / name, max_cache_len=160, compress=False)
    assert not OnnxGenerator(folder).metadata["packed"]
    assert_same(build(name), folder, None)


def test_the_file_is_valid_and_says_what_it_is(llama: Path) -> None:
    onnx.checker.check_model(str(llama / "model.onnx"), full_check=True)
    model = onnx.load(llama / "model.onnx", load_external_data=False)
    found = json.loads({prop.key: prop.value for prop in model.metadata_props}[METADATA])
    assert found["format_version"] == 2 and found["max_cache_len"] == 160
    assert {function.domain for function in model.functions} == {"tqc"}
    names = [value.name for value in model.graph.input]
    assert names[:3] == ["input_ids", "attention_mask", "logits_to_keep"]
    assert {"past.state", "past.0.key.plane2", "past.1.value.window"} <= set(names)
    assert {name.replace("past.", "present.") for name in names[3:]} < {value.name for value in model.graph.output}


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
def test_optimizations_do_not_matter(llama: Path, level: str) -> None:
    generator = OnnxGenerator(llama)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    wanted = generator.generate(list(range(5, 60)), 4)
    generator.session = ort.InferenceSession(llama / "model.onnx", options)
    assert generator.generate(list(range(5, 60)), 4) == wanted


def test_generates_in_batches_and_at_random(llama: Path) -> None:
    generator = OnnxGenerator(llama)
    short, long = list(range(5, 13)), list(range(30, 44))
    both = generator.generate([short, long], 20)  # few enough that nothing is packed, and padding moves no token
    assert both == [generator.generate(short, 20), generator.generate(long, 20)]
    drawn = [generator.generate(short, 20, Sampling(2.0, top_k=20, top_p=0.9, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    end = both[0][10]
    assert generator.generate(short, 20, eos_token_id=end) == both[0][: both[0].index(end)]


def test_a_step_copies_no_cache(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """onnxruntime tells of a cache that it copies because past and present do not share memory."""
    generator = OnnxGenerator(llama)
    options = ort.SessionOptions()
    options.log_severity_level = 2
    generator.session = ort.InferenceSession(llama / "model.onnx", options)
    generator.reset(1)
    generator.step(np.arange(5, 90)[None])
    assert generator.cache["state"].tolist() == [85, 64, 0] and generator.cache["0.key.plane2"].any()
    assert "copying past_cache" not in capfd.readouterr().err
    generator._binding.bind_output("present.0.key.plane2")
    generator.step(np.array([[5]]))
    assert "copying past_cache" in capfd.readouterr().err


def test_a_cache_goes_into_a_file_and_back(llama: Path, tmp_path: Path) -> None:
    """One format: torch goes on from what onnxruntime stored, and so does onnxruntime."""
    generator, file = OnnxGenerator(llama), tmp_path / "cache.safetensors"
    ids = prompt(1, 110)
    generator.step(ids[:, :109].numpy())
    save(generator, file)
    torch._dynamo.reset()
    call = torch.compile(build("llama"), backend="tqai", options={**OPTIONS, "rest": "eager", "provider": "reference"})
    with torch.no_grad():
        wanted = call(ids[:, 109:], past_key_values=tqc.load_cache(file), use_cache=True).logits
    made = generator.step(ids[:, 109:].numpy())
    assert np.abs(made - wanted.numpy()).max() <= 2e-4
    other = OnnxGenerator(llama)
    load(other, file)
    assert np.array_equal(other.step(ids[:, 109:].numpy()), made)

    cache = tqc.load_cache(file)
    cache.layers[1].keys = cache.layers[1].keys.dequantize()
    tqc.save_cache(cache, file)
    with pytest.raises(ModelFileError, match="has nothing packed for 1.key, and the model takes tq2:"):
        load(other, file)


@pytest.mark.extended
def test_evaluation_finds_what_torch_finds() -> None:
    model = build("llama")
    formats = Config.from_options(OPTIONS).formats(16, 16)
    call = torch.compile(model, backend="tqai", options={**OPTIONS, "rest": "eager", "provider": "reference"})
    decoders = [
        Decoder("dense", model, lambda: DynamicCache(config=model.config)),
        Decoder("torch", call, lambda: DynamicCache(config=model.config), formats),
        onnx_decoder("onnx", model, OPTIONS, formats, 220),
    ]
    with torch.no_grad():
        scores = decode_in_step(decoders[0], decoders[1:], prompt(1, 200), 64, lambda line: None, {})
    found = {name: score.summary()["kl_mean"] for name, score in scores.items()}
    assert found["torch"] > 0 and abs(found["onnx"] / found["torch"] - 1) < 0.02, found
    ours = decoders[2]
    assert [layer.keys.shape[2] for layer in ours.held(ours.cache).layers] == [200, 200]
    forked = copy.deepcopy(ours.cache)
    made = [cache.step(np.array([[5]])) for cache in (ours.cache, forked)]
    assert np.array_equal(*made) and ours.cache.length == forked.length == 201


def test_too_much_for_the_cache(llama: Path) -> None:
    generator = OnnxGenerator(llama)
    with pytest.raises(ValueError, match="the prompt has 161 tokens, more than max_cache_len, 160"):
        generator.generate([5] * 161)
    assert len(generator.generate([5] * 150, 100)) == 11
    with pytest.raises(ValueError, match="the prompt is empty"):
        generator.generate([])


def test_needs_no_torch(llama: Path) -> None:
    code = (
        "import sys, tqc\n"
        f"print(tqc.OnnxGenerator({str(llama)!r}).generate([5, 6, 7], 3))\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == 3


def test_a_newer_file_is_refused(llama: Path, tmp_path: Path) -> None:
    model = onnx.load(llama / "model.onnx")
    found = json.loads(model.metadata_props[-1].value)
    for change, message in (
        ({"format_version": 3}, "is of packed format version 3, and this package reads up to 2"),
        ({"format_version": "x"}, "has malformed metadata"),
    ):
        model.metadata_props[-1].value = json.dumps({**found, **change})
        onnx.save(model, tmp_path / "model.onnx")
        with pytest.raises(ModelFileError, match=message):
            OnnxGenerator(tmp_path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ModelFileError, match="was not written by tqc.export_onnx"):
        OnnxGenerator(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(ModelFileError, match="does not load"):
        OnnxGenerator(tmp_path)
    with pytest.raises(ModelFileError, match="no such file"):
        OnnxGenerator(tmp_path / "nowhere")


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    model = build("llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for path, options, message in (
        ("full", {}, "is a folder that is not empty"),
        ("full/file", {}, "exists and is no folder"),
        ("no/out", {}, "there is no folder"),
        ("out", {"opset": 23}, "opset must be at least 24"),
        ("out", {"max_cache_len": 0}, "max_cache_len must be a positive number"),
        ("out", {"compress": False, "bits_k": 2}, "compress=False leaves all caches dense, so it takes no bits_k"),
        ("out", {"bits_k": 9}, "bits_k must be 1 to 8"),
        ("out", {"bitsk": 4}, "unknown option 'bitsk'"),
        ("out", {"strict": True, "skip_layers": (1,)}, "strict: 1 of 4 caches of .* stay dense .*named in skip_layers"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            export_onnx(model, tmp_path / path, **options)
        assert "\n" not in str(caught.value)
    model.compile(backend="eager")
    with pytest.raises(ExportError, match="model is compiled already"):
        export_onnx(model, tmp_path / "out")
    with pytest.raises(ExportError, match="model must be one of transformers that generates, got Linear"):
        export_onnx(torch.nn.Linear(2, 2), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
