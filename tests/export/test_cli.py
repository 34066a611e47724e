"""`tqc export`, and `tqc run` and `tqc info` of what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

from tests.test_cli import call


def test_export_run_and_info(tiny_model_folder: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    given = ("-m", str(tiny_model_folder), "-o", out, "--max-cache-len", "200", "--bits-v", "2")
    code, text, _ = call(monkeypatch, capsys, "export", *given, "--check", "--json")
    assert code == 0
    found = json.loads(text)
    assert found["decode"] < 2e-4 and found["same_tokens"] == found["steps"] == 33 and found["codes"] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"model.onnx", "config.json", "tokenizer.json"}

    code, text, _ = call(monkeypatch, capsys, "run", "-m", out, "what is gravity ?", "--max-tokens", "5", "--json")
    assert code == 0 and json.loads(text)["new_tokens"] == 5
    assert call(monkeypatch, capsys, "run", "-m", out, "what is gravity ?", "--max-tokens", "5")[:2] == (
        0,
        json.loads(text)["text"] + "\n",
    )

    code, text, _ = call(monkeypatch, capsys, "info", out, "--json")
    facts = json.loads(text)
    assert facts["format_version"] == 2 and facts["max_cache_len"] == 200
    assert facts["packed"][1]["spec"].startswith("tq2:d16:b2:plain")
    assert facts["inputs"]["past.0.key.plane2"][0] == "tensor(uint8)"
    assert "past.0.key.plane2" in call(monkeypatch, capsys, "info", out)[1]

    for arguments, message in (
        (("export", *given), "is a folder that is not empty"),
        (("run", "-m", out, "x", "--bits-k", "2"), "was exported with its options, so it takes no --bits-k"),
        (("run", "-m", out, "x", "--backend", "mlx"), "onnxruntime runs, so it takes no --backend mlx"),
        (("run", "-m", out, " "), "PROMPT is empty"),
        (("run", "-m", out, "is " * 300), "more than max_cache_len, 200"),
        (("info", str(tmp_path)), "no such file"),
        (("export", "-o", out, "--dense", "--bits-k", "2"), "--dense compresses nothing, so it takes no --bits-k"),
    ):
        code, _, error = call(monkeypatch, capsys, *arguments)
        assert code == 2 and message in error and error.count("\n") == 1, error


def test_help_names_the_command(monkeypatch, capsys) -> None:
    assert "--max-cache-len" in call(monkeypatch, capsys, "export", "--help")[1]
