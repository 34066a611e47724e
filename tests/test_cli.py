"""The command line: one clear line for bad input, JSON that parses, and runs on a tiny model from start to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tqc import models
from tqc.cli import app as cli
from tqc.cli import generate as cli_generate
from tqc.cli import show as cli_show


def call(monkeypatch, capsys, *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `tqc args...`."""
    monkeypatch.setattr(sys, "argv", ["tqc", *args])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return caught.value.code, out, err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["run"], ["prompt"]),
        (["rum"], ["rum", "run"]),
        (["run", "x", "--bits"], ["--bits"]),
        (["run", "x", "--bits-k", "9"], ["--bits-k", "9", "1 to 8"]),
        (["run", "x", "--bits-k", "16"], ["--bits-k", "--bits-v", "16"]),
        (["run", "x", "--bits-v", "three"], ["--bits-v", "three", "whole number"]),
        (["run", "x", "--preset", "smal"], ["--preset", "smal", "small"]),
        (["run", "x", "--residual-window", "33"], ["--residual-window", "33", "multiple of 32"]),
        (["run", "x", "--sink-tokens=-1"], ["--sink-tokens", "-1", "at least 0"]),
        (["run", "x", "--max-tokens", "0"], ["--max-tokens", "0", "at least 1"]),
        (["run", "x", "--dtype", "int4"], ["--dtype", "int4", "bfloat16"]),
        (["run", "x", "--dense", "--bits-k", "3"], ["--dense", "--bits-k"]),
        (["run", "x", "--widths", "./widths.file"], ["--widths './widths.file'", "No such file"]),
        (["run", "x", "--widths", "LATIN"], ["--widths", "latin.txt", "holds no widths"]),
        (["run", "x", "--widths", "LATIN", "--bits-k", "3"], ["--bits-k", "--widths", "cannot both"]),
        (["explain", "--budget-bits", "3"], ["--budget-bits", "--widths", "3"]),
        (["run", "x", "--strategy", "tiered", "--tiers", "1x4"], ["--tiers", "1x4+2x2/4"]),
        (["run", "x", "--strategy", "evict", "--scorer-kwargs", "queries"], ["--scorer-kwargs", "name=value"]),
        (["run", "x", "--strategy", "evict", "--scorer-kwargs", "dekay=4"], ["dekay", "decay"]),
        (["eval", "--monitor", "fidelty"], ["--monitor", "fidelity"]),
        (["run", "x", "--config", "./missing"], ["--config", "./missing", "No such file"]),
        (["run", "x", "--config", "LATIN"], ["--config", "tqc search"]),
        (["search", "-o", "./missing/file"], ["--out", "./missing/file", "no such folder"]),
        (["calibrate"], ["--out"]),
        (["calibrate", "-o", "./missing/file"], ["--out", "./missing/file", "no such folder"]),
        (["calibrate", "-o", "file", "--widths", "4..2"], ["--widths", "4..2", "1 to 8"]),
        (["calibrate", "-o", "file", "--budget-bits", "1.5"], ["--budget-bits", "1.5", "2"]),
        (["eval", "k9x"], ["k9x", "preset", "k4v2"]),
        (["eval", "k9v2"], ["bits_k", "9", "1 to 8"]),
        (["eval", "--text", "./missing"], ["--text", "./missing", "No such file"]),
        (["eval", "--tokens", "-5"], ["--tokens", "-5", "at least 1"]),
        (["eval", "--text", "LATIN"], ["--text", "latin.txt", "not UTF-8", "byte 3"]),
        (["eval", "--plot", "./missing/plot.png"], ["--plot", "./missing/plot.png", "no such folder"]),
        (["run", " "], ["PROMPT", "empty"]),
        (["run", "caf\udce9"], ["PROMPT", "not UTF-8", "caf\\xe9"]),
        (["compare", "caf\udce9"], ["PROMPT", "not UTF-8", "caf\\xe9"]),
        (["explain", "caf\udce9"], ["PROMPT", "not UTF-8", "caf\\xe9"]),
        (["run", "x", "--model", "./missing"], ["./missing", "no such file or folder"]),
        (["compare", "x", "--model", "./missing"], ["./missing", "no such file or folder"]),
        (["explain", "--model", "./missing"], ["./missing", "no such file or folder"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    args: list[str], words: list[str], monkeypatch, capsys, tmp_path
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    args = [str(tmp_path / "latin.txt") if arg == "LATIN" else arg for arg in args]
    code, out, err = call(monkeypatch, capsys, *args)
    assert (code, out) == (2, "")
    assert err.startswith("tqc: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_help_needs_neither_torch_nor_a_second() -> None:
    script = "\n".join(
        [
            "import sys, tqc.cli.app",
            "sys.argv = ['tqc', '--help']",
            "try: tqc.cli.app.main()",
            "finally: assert 'torch' not in sys.modules",
        ]
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compare" in done.stdout
    assert time.perf_counter() - start < 5


def test_a_prompt_that_is_not_utf8_from_a_shell() -> None:
    script = "import sys, tqc.cli.app; sys.argv[0] = 'tqc'; tqc.cli.app.main()"
    done = subprocess.run([sys.executable, "-c", script, "run", b"caf\xe9"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, done.stderr
    assert "PROMPT is not UTF-8" in done.stderr


def test_text_that_a_locale_cannot_show_is_printed_as_far_as_it_can() -> None:
    script = "import sys, tqc.cli.app as cli; cli.app = lambda **_: print('caf\\xe9'); cli.main()"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "caf?\n"), done.stderr


def test_info_shows_presets_and_providers(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setenv("TQC_CACHE_DIR", str(tmp_path))
    code, out, _ = call(monkeypatch, capsys, "info", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["providers"]["reference"] is None
    assert facts["presets"]["off"]["bits_k"] == 16
    assert facts["cache_dir"] == str(tmp_path)
    code, out, _ = call(monkeypatch, capsys, "info")
    assert code == 0 and "residual_window" in out and "reference" in out


def test_forced_tokens_are_taken_and_their_logits_are_those_of_the_model(tiny_model_folder: Path) -> None:
    model, tokenizer = models.load(str(tiny_model_folder))
    inputs = models.encode(tokenizer, "the cache is a tensor")
    free = cli_generate.generate(model, tokenizer, inputs, 3)
    forced_tokens = [(token + 1) % model.config.vocab_size for token in free.tokens]
    forced = cli_generate.generate(model, tokenizer, inputs, 3, forced=forced_tokens)
    assert forced.tokens == forced_tokens
    full = torch.cat([inputs["input_ids"], torch.tensor([forced_tokens])], dim=1)
    with torch.no_grad():
        expected = model(full).logits[0, -4:-1]
    torch.testing.assert_close(forced.logits, expected)


def test_an_eager_prefill_changes_nothing(tiny_model_folder: Path) -> None:
    model, tokenizer = models.load(str(tiny_model_folder))
    for prompt in ("the", "the cache is a tensor"):
        inputs = models.encode(tokenizer, prompt)
        plain = cli_generate.generate(model, tokenizer, inputs, 3)
        prefilled = cli_generate.generate(model, tokenizer, inputs, 3, cache=cli_generate.eager_prefill(model, inputs))
        assert prefilled.tokens == plain.tokens
        assert prefilled.cache_bytes == plain.cache_bytes == 2 * 2 * (inputs["input_ids"].shape[1] + 2) * 2 * 16 * 4
        torch.testing.assert_close(prefilled.logits, plain.logits)


def test_kl_is_that_of_the_definition() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    expected = float((p * (p / q).log()).sum())
    rows = torch.stack([p.log() + 3.0, p.log()]), torch.stack([q.log(), p.log() - 1.0])
    assert cli_generate.mean_kl(*rows) == pytest.approx(expected / 2)


def test_common_prefix_stops_at_the_first_difference() -> None:
    assert cli_generate.common_prefix([1, 2, 3, 4], [1, 2, 5, 4]) == 2
    assert cli_generate.common_prefix([1, 2], [1, 2, 3]) == 2
    assert cli_generate.common_prefix([], [1]) == 0


def test_byte_counts_are_readable() -> None:
    assert [cli_show.readable_bytes(count) for count in (12, 1200, 4_950_000, 3 * 10**9)] == [
        "12 B",
        "1.20 kB",
        "4.95 MB",
        "3.00 GB",
    ]


@pytest.mark.slow
def test_run_prints_text_on_stdout_and_figures_on_stderr(tiny_model_folder: Path, monkeypatch, capsys) -> None:
    args = ["run", "the cache is", "-m", str(tiny_model_folder), "--max-tokens", "5", "--monitor", "fidelity"]
    code, out, err = call(monkeypatch, capsys, *args)
    assert code == 0 and len(out.split()) == 5
    assert "first token after" in err and "cache" in err and "fidelity() at head 0" in err
    code, out, _ = call(monkeypatch, capsys, *args, "--json")
    result = json.loads(out)
    assert code == 0 and result["new_tokens"] == 5 and result["prompt_tokens"] == 3
    assert "nothing wrong" in result["monitor"]


@pytest.mark.extended
def test_search_writes_options_that_other_commands_take(tiny_model_folder: Path, tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "best.json"
    args = ["search", "-m", str(tiny_model_folder), "-o", str(file), "--budget-bits", "9", "--tokens", "300"]
    code, out, _ = call(monkeypatch, capsys, *args, "--trials", "4", "--json")
    found = json.loads(out)
    assert code == 0 and found == json.loads(file.read_text()) and found["bits_4096"] <= 9 and found["ms"] > 0
    args = ["run", "the cache is", "-m", str(tiny_model_folder), "--max-tokens", "3", "--config", str(file)]
    assert call(monkeypatch, capsys, *args)[0] == 0


@pytest.mark.slow
def test_compare_reports_a_smaller_cache_and_a_small_divergence(tiny_model_folder: Path, monkeypatch, capsys) -> None:
    args = ["compare", "the cache is", "-m", str(tiny_model_folder), "--max-tokens", "150", "--json"]
    code, out, _ = call(monkeypatch, capsys, *args, "--preset", "quality", "--residual-window", "32")
    result = json.loads(out)
    assert code == 0
    assert result["dense"]["cache_bytes"] == 2 * 2 * 152 * 2 * 16 * 4
    assert result["cache_ratio"] > 1.5
    assert result["bits_per_element"] == pytest.approx(32 / result["cache_ratio"])
    assert 0 < result["kl_nats"] < 0.01
    assert result["compared_tokens"] == 150 >= result["same_next_tokens"] > 75


@pytest.mark.slow
def test_explain_finds_the_caches_of_the_tiny_model(tiny_model_folder: Path, monkeypatch, capsys) -> None:
    code, out, _ = call(monkeypatch, capsys, "explain", "the cache", "-m", str(tiny_model_folder), "--json")
    assert code == 0 and json.loads(out)["graphs"] and not json.loads(out)["texts"]
    code, out, _ = call(monkeypatch, capsys, "explain", "the cache", "-m", str(tiny_model_folder))
    assert code == 0 and "attention" in out


@pytest.mark.slow
def test_explain_shows_whole_lines_of_graphs(tiny_model_folder: Path, monkeypatch, capsys) -> None:
    """However narrow the terminal is."""
    monkeypatch.setenv("COLUMNS", "60")

    def explain(*more: str) -> tuple[int, str, str]:
        torch._dynamo.reset()  # it makes sizes symbolic that it has seen change
        return call(monkeypatch, capsys, "explain", "the cache", "-m", str(tiny_model_folder), "--graphs", *more)

    code, out, _ = explain("--json")
    explained = json.loads(out)
    assert code == 0
    assert [list(texts) for texts in explained["texts"][:2]] == [["traced", "pack_cache"], ["traced", "fuse_attention"]]
    lines = [line for texts in explained["texts"] for text in texts.values() for line in text.splitlines()]
    assert any("tqai.attend(" in line and len(line) > 200 for line in lines)

    code, out, _ = explain()
    assert code == 0 and not set(lines) - set(out.splitlines())
    assert "graph 1, fuse_attention:" in out.splitlines()


@pytest.fixture
def spelling_folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer that knows digits and names."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tqc.evaluate.needles import NAMES

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.add_tokens([*"0123456789", *NAMES])
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    folder = tmp_path / "spelling"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_eval_scores_each_setting_on_each_model(spelling_folder, tiny_model_folder, monkeypatch, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cache is a tensor that a graph writes and later reads into attention . " * 60)
    args = ["eval", "off", "k2v2", "--text", str(text), "--tokens", "300", "-m", str(spelling_folder)]
    code, out, err = call(monkeypatch, capsys, *args, "-m", str(spelling_folder), "--numbers", "1", "--json")
    assert code == 0, err
    first, second = json.loads(out)["evaluations"]
    assert first == second and first["model"] == str(spelling_folder) and first["numbers"] == 1
    rows = {row["name"]: row for row in first["rows"]}
    assert 0 <= rows["off"]["kl_mean"] < rows["k2v2"]["kl_mean"]
    loss = {name: abs(row["numbers_nll"] - rows["dense"]["numbers_nll"]) for name, row in rows.items()}
    assert 0 <= loss["off"] < loss["k2v2"]

    code, out, err = call(monkeypatch, capsys, *args, "--numbers", "50")
    assert (code, out) == (2, "") and "numbers must be 1 to 32" in err and str(spelling_folder) in err
    code, out, err = call(monkeypatch, capsys, *args, "-m", "./missing")
    assert (code, out) == (2, "") and "./missing" in err
    code, out, err = call(monkeypatch, capsys, *args[:-1], str(tiny_model_folder))
    assert (code, out) == (2, "") and "tokenizer has the same tokens" in err
