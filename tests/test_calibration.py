"""Calibration: what it measures, and a run from a model to its widths and back through the compiler."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.models.common import FAMILIES
from tests.test_cli import call
from tqc.cache.packed_tensor import pack
from tqc.config import Config
from tqc.evaluate.calibration import _Side, calibrate
from tqc.evaluate.calibration import default_text as calibration_text
from tqc.evaluate.evaluation import default_text as evaluation_text
from tqc.widths import Widths


def tokenizer(text: str, return_tensors: str) -> Any:
    return SimpleNamespace(input_ids=torch.tensor([[ord(letter) % 128 for letter in text]]))


TEXT = "".join(chr(97 + (7 * i * i + i // 5) % 26) for i in range(600))


def test_the_texts_differ() -> None:
    text = calibration_text()
    assert len(text) > 4000 and not any(line in evaluation_text() for line in text.splitlines() if len(line) > 40)


def test_changes_are_those_of_a_packed_cache() -> None:
    """However the tokens come."""
    x = torch.randn(1, 2, 300, 16, generator=torch.Generator().manual_seed(0))
    fmt = Config(bits_k=3).formats(16, 16)[0]
    packed = pack(x, fmt)
    side = _Side(fmt, fmt.head(packed.packed_storage.dense).clone())
    for begin, end in ((0, 130), (130, 190), (190, 300)):
        side.waiting.append(x[:, :, begin:end])
        side.pack(end, (3,))
    count = fmt.packed_tokens(300)
    assert side.changes[3].shape == (2, count, 16)
    torch.testing.assert_close(side.changes[3], ((packed + 0) - x)[0, :, 4 : 4 + count])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_errors_foretell_what_packing_one_side_does(name: str, tmp_path: Path) -> None:
    """A layer whose values are made to count for nothing needs no bits; wider codes err less."""
    model = FAMILIES[name].build()
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    seen: list[tuple[int, int]] = []
    widths = calibrate(
        model, tokenizer, 3.0, (2, 4, 8), TEXT, 400, "tiny", lambda done, total: seen.append((done, total))
    )
    assert seen[0] == (0, 400) and seen[-1] == (400, 400)
    assert not widths.key_errors[0].any() and not widths.value_errors[0].any()
    last = len(widths.shapes) - 1
    for errors in (widths.key_errors[last], widths.value_errors[last]):
        assert (errors[:, 0] > errors[:, 1]).all() and (errors[:, 1] > errors[:, 2]).all() and errors[:, 2].min() > 0
    assert widths.of_rows()[0] == (2, 2) and widths.bits <= 3.0
    assert widths.about["layers"] == str(len(model.model.layers)) and widths.about["tokens"] == "400"
    assert all(parameter.requires_grad for parameter in model.parameters())

    widths.save(tmp_path / "file")
    torch._dynamo.reset()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        packed = torch.compile(
            model, backend="tqai", options={"widths": str(tmp_path / "file"), "budget_bits": 4, "rest": "eager"}
        )
        packed(tokenizer(TEXT[:200], "pt").input_ids, past_key_values=cache)
    rows = dict(zip(widths.shapes[:, 0].tolist(), widths.solved(4).of_rows(), strict=True))
    assert {n: (cache.layers[n].keys.fmt.bits, cache.layers[n].values.fmt.bits) for n in rows} == rows
    torch._dynamo.reset()


def test_the_estimate_is_of_the_size_of_the_divergence() -> None:
    """The KL of packing one side of one layer, decoded with the dense model from a cache that holds it decoded."""
    model = FAMILIES["llama"].build()
    widths = calibrate(model, tokenizer, 4, (4,), TEXT, 400)
    ids, fmt = tokenizer(TEXT[:400], "pt").input_ids, Config(bits_k=4, bits_v=4).formats(16, 16)
    for kind, errors in (("keys", widths.key_errors), ("values", widths.value_errors)):
        total = 0.0
        for begin in range(256, 400, 16):
            with torch.no_grad():
                cache, other = (DynamicCache(config=model.config) for _ in range(2))
                for held in (cache, other):
                    model(ids[:, :begin], past_key_values=held)
                states = getattr(other.layers[1], kind)
                setattr(other.layers[1], kind, pack(states, fmt[kind == "values"]) + 0)
                p, q = (
                    model(ids[:, begin : begin + 16], past_key_values=held).logits[0].log_softmax(-1)
                    for held in (cache, other)
                )
            total += float((p.exp() * (p - q)).sum())
        assert 0.4 < float(errors[1].sum()) / (total / 144) < 2.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget_bits": 1.0}, "budget_bits must be at least 2, the least of the widths; got 1.0"),
        ({"widths": (0, 2)}, r"widths must be 1 to 8; got \[0, 2\]"),
        ({"widths": ()}, r"widths must be 1 to 8; got \[\]"),
        ({"text": "short"}, "at least 257 tokens are needed; the text has 5"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(FAMILIES["llama"].build(), tokenizer, **options)


def test_the_command(tiny_model_folder: Path, monkeypatch, capsys, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "file.safetensors"
    text.write_text("the cache is a tensor that a graph writes and later reads into attention . " * 30)
    args = ["-m", str(tiny_model_folder), "--text", str(text), "--tokens", "300", "-o", str(out)]
    code, shown, err = call(monkeypatch, capsys, "calibrate", *args, "--budget-bits", "3", "--json")
    assert code == 0, err
    found = json.loads(shown)
    assert found["bits"] <= 3 and found["model"] == tiny_model_folder.name and len(found["layers"]) == 2
    assert [(layer["bits_k"], layer["bits_v"]) for layer in found["layers"]] == Widths.load(out).of_rows()
    widths = ["--widths", str(out), "-m", str(tiny_model_folder)]
    code, shown, err = call(monkeypatch, capsys, "explain", "the cache", *widths, "--budget-bits", "4", "--json")
    assert code == 0, err
    assert {site["keys"].split(":")[2] for site in json.loads(shown)["graphs"][0]} == {"b4"}
    eval_args = ["eval", "off", *widths, "--text", str(text), "--tokens", "300", "--numbers", "0", "--json"]
    code, shown, err = call(monkeypatch, capsys, *eval_args)
    assert code == 0, err
    assert [row["name"] for row in json.loads(shown)["evaluations"][0]["rows"]][1:] == [
        "off",
        f"{found['bits']:.4g}-bits:w96:s4",
    ]
