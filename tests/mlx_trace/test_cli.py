"""`tqc run | compare | explain | eval --backend mlx` on a tiny model of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="needs mlx and mlx-lm")

from tests.conftest import CORPUS  # noqa: E402
from tests.test_cli import call  # noqa: E402
from tqc import models  # noqa: E402
from tqc.evaluate.evaluation import evaluate  # noqa: E402
from tqc.mlx_trace.as_torch import rotary  # noqa: E402


def test_the_commands(monkeypatch, capsys, tiny_model_folder: Path) -> None:
    prompt = " ".join([CORPUS] * 8)
    model = ("-m", str(tiny_model_folder), "--backend", "mlx", "--json")
    fine = ("--bits-k", "8", "--bits-v", "8", "--residual-window", "32")
    code, out, err = call(monkeypatch, capsys, "run", prompt, *model, *fine, "--max-tokens", "5")
    made = json.loads(out)
    assert code == 0 and made["prompt_tokens"] == 152 and 1 <= made["new_tokens"] <= 5, err
    code, out, _ = call(monkeypatch, capsys, "run", prompt, *model, "--dense", "--max-tokens", "5")
    assert code == 0 and json.loads(out)["text"] == made["text"]
    code, out, _ = call(monkeypatch, capsys, "compare", prompt, *model, *fine, "--max-tokens", "5")
    made = json.loads(out)
    assert code == 0 and made["kl_nats"] < 1e-3 and made["same_next_tokens"] == made["compared_tokens"]
    assert made["compressed_cache_bytes"] < made["dense"]["cache_bytes"]
    code, out, _ = call(monkeypatch, capsys, "explain", prompt, *model)
    assert code == 0 and {site["action"] for graph in json.loads(out)["graphs"] for site in graph} == {"fuse"}


def test_bad_input_is_one_line(monkeypatch, capsys, tiny_model_folder: Path) -> None:
    model = ("-m", str(tiny_model_folder))
    for given, words in (
        (("--backend", "onnx"), "must be torch or mlx; got 'onnx'"),
        (("--backend", "mlx", "--strategy", "evict"), "strategy is an option of the torch backend alone"),
        (("--backend", "mlx", "-m", "./missing"), "no such file or folder"),
    ):
        code, out, err = call(monkeypatch, capsys, "run", "what", *model, *given)
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1


def test_rotary_positions_are_those_of_the_model(tmp_path: Path, tiny_model_folder: Path) -> None:
    """transformers writes them under a name that most models of mlx-lm do not read."""
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 77.0
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    loaded = models.load_mlx(str(tmp_path / "model"))[0]
    assert loaded.model.layers[0].self_attn.rope.base == 77.0
    for given, names in (
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, {"rope_theta": 5.0}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "rope_theta": 6.0}, {}),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 7.0}}},
            {"rope_theta": 5.0, "rope_local_base_freq": 7.0},
        ),
        ({}, {}),
    ):
        assert rotary(given) == names


def test_the_quality_is_that_of_the_torch_path(tiny_model_folder: Path) -> None:
    text = " ".join([CORPUS] * 6)
    how = {"settings": ["k2v2:w32"], "text": text, "tokens": 110, "score_from": 40, "numbers": 0}
    loaded = (models.load(str(tiny_model_folder)), models.load_mlx(str(tiny_model_folder)))
    torch_rows, mlx_rows = (evaluate(*given, **how).rows for given in loaded)
    for expected, row in zip(torch_rows, mlx_rows, strict=True):
        assert row.perplexity == pytest.approx(expected.perplexity, rel=1e-3)
        assert row.kl_mean == pytest.approx(expected.kl_mean, rel=0.1, abs=1e-7)
        assert row.packed_layers == expected.packed_layers
