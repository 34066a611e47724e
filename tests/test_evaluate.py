"""Evaluation: decoding in chunks equals decoding token by token; what is measured and shown."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tqc.cache.packed_tensor import extend, pack
from tqc.config import Config
from tqc.evaluate.decode import (
    Decoder,
    LayerShape,
    Scores,
    all_in_bits,
    chunks,
    decode_in_step,
    measured_bits,
)
from tqc.evaluate.evaluation import Evaluation, Row, default_text, evaluate, parse_setting
from tqc.evaluate.peers import PEERS, Peer
from tqc.evaluate.plot import plot
from tqc.format import PAGE_TOKENS, PackedFormat

OPTIONS = {"provider": "reference", "rest": "eager", "residual_window": 32, "bits_k": 3, "bits_v": 3}


class Letters:
    """A tokenizer: one token a character."""

    def __call__(self, text: str, return_tensors: str | None = None, add_special_tokens: bool = True) -> Any:
        ids = [ord(letter) % 96 for letter in text]
        return SimpleNamespace(input_ids=torch.tensor([ids]) if return_tensors else ids)

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token + (0 if 32 <= token else 96)) for token in ids)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=1024,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(6.0)
    return model


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def ours(model: Any, **options: Any) -> Decoder:
    options = {**OPTIONS, **options}
    compiled = torch.compile(model, backend="tqai", options=options)
    return Decoder("ours", compiled, DynamicCache, Config.from_options(options).formats(16, 16))


def tokens_of(count: int) -> torch.Tensor:
    return torch.randint(0, 96, (1, count), generator=torch.Generator().manual_seed(2))


# Chunks

_formats = st.builds(
    lambda sinks, window: PackedFormat(16, 3, True, sinks, 32 * window), st.integers(0, 40), st.integers(1, 5)
)


@given(st.integers(1, 700), st.lists(_formats, max_size=3), st.integers(1, 40))
def test_chunks_cover_the_text_and_see_one_packed_length(tokens, formats, largest):
    parts = list(chunks(tokens, formats, largest))
    assert [position for begin, end in parts for position in range(begin, end)] == list(range(tokens))
    for begin, end in parts:
        assert begin == 0 or end - begin <= largest
        for fmt in formats:
            assert len({fmt.packed_tokens(position) for position in range(begin, end)}) == 1


def test_a_chunk_starts_where_the_next_page_is_packed():
    fmt = PackedFormat(16, 3, True, 4, 96)
    assert list(chunks(180, [fmt])) == [(0, 101), (101, 133), (133, 165), (165, 180)]
    assert list(chunks(150, [])) == [(0, 128), (128, 150)]
    assert list(chunks(180, [fmt], begin=120)) == [(120, 133), (133, 165), (165, 180)]


@pytest.mark.parametrize("sink_tokens", [0, 4])
def test_chunks_agree_with_one_token_at_a_time(model, sink_tokens):
    ids, found = tokens_of(170), {}
    with torch.no_grad():
        for largest in (1, 8, 32):
            dense = Decoder("dense", model, DynamicCache)
            decoder = ours(model, sink_tokens=sink_tokens)
            scores = decode_in_step(dense, [decoder], ids, 20, print, {}, largest)["ours"]
            found[largest] = {part: torch.cat(getattr(scores, part)) for part in ("kl", "nll", "same")}
    assert found[1]["kl"].shape == (150,) and found[1]["nll"].shape == (149,)
    assert found[1]["kl"][:10].max() < 1e-5 < found[1]["kl"][60:].median()
    for largest in (8, 32):
        for part in ("kl", "nll"):
            torch.testing.assert_close(found[largest][part], found[1][part], atol=2e-5, rtol=1e-3)
        assert (found[largest]["same"] == found[1]["same"]).float().mean() > 0.99


def test_scores_against_the_definition(model):
    """One token a call behind the first page, without any of the machinery."""
    ids = tokens_of(120)
    with torch.no_grad():
        decoder, dense = ours(model), Decoder("dense", model, DynamicCache)
        scores = decode_in_step(dense, [decoder], ids, 60, print, {})
        compiled, cache = torch.compile(model, backend="tqai", options=OPTIONS), DynamicCache()
        # Keys are balanced by the queries of the call that packs the first page: that one has to be the same.
        first = [(begin, end) for begin, end in chunks(120, decoder.formats, PAGE_TOKENS) if begin < 37]
        calls = [*first, *((t, t + 1) for t in range(first[-1][1], 120))]
        steps = [compiled(ids[:, begin:end], past_key_values=cache).logits for begin, end in calls]
        q = torch.cat(steps, dim=1)[0].double().log_softmax(-1)
        p = model(ids).logits[0].double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)[60:]
    summary = scores["ours"].summary()
    assert summary["kl_mean"] == pytest.approx(kl.mean().item(), rel=1e-3)
    assert summary["kl_median"] == pytest.approx(kl.float().median().item(), rel=1e-2)
    nll = -q[60:119].gather(1, ids[0, 61:, None]).mean()
    assert summary["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-4)
    assert summary["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1))[60:].double().mean().item())
    assert scores["dense"].summary()["kl_mean"] == 0 and scores["dense"].summary()["top1_agreement"] == 1


def test_scores_by_hand():
    scores = Scores()
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([[0.25, 0.75], [0.8, 0.2]]).log()
    scores.add(p, q, torch.tensor([1]))
    expected = [0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()]
    expected.append(0.9 * torch.tensor(9 / 8).log() + 0.1 * torch.tensor(0.5).log())
    torch.testing.assert_close(scores.kl[0], torch.stack(expected))
    assert scores.summary()["perplexity"] == pytest.approx(4 / 3)
    assert scores.same[0].tolist() == [False, True]


# Bits


@pytest.mark.parametrize("setting", ["default", "k2v4:w32:s0"])
def test_all_in_bits_are_those_of_a_real_cache(setting):
    config = Config.from_options(parse_setting(setting)[1])
    held = 0
    for fmt in config.formats(32, 16):
        tensor = pack(torch.randn(1, 2, 1, fmt.head_dim).bfloat16(), fmt)
        for _ in range(299):
            tensor = extend(tensor, torch.randn(1, 2, 1, fmt.head_dim).bfloat16())
        held += tensor.packed_nbytes()
    packed, dense = LayerShape(2, 32, 16, True), LayerShape(2, 32, 16, False)
    assert all_in_bits(config, [packed], 300) == pytest.approx(held * 8 / (300 * 2 * 48))
    assert all_in_bits(config, [packed, dense], 300) == pytest.approx(held * 4 / (300 * 2 * 48) + 8)


def test_measured_bits_of_a_dense_cache():
    assert measured_bits(DynamicCache, LayerShape(2, 32, 16, False), 64) == 16


# Settings


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ("default", {"preset": "default"}),
        ("small:w64", {"preset": "small", "residual_window": 64}),
        ("k4v2", {"bits_k": 4, "bits_v": 2}),
        ("k3v3:w128:s8", {"bits_k": 3, "bits_v": 3, "residual_window": 128, "sink_tokens": 8}),
        ("k8v1:haar:seed7", {"bits_k": 8, "bits_v": 1, "rotation": "haar", "seed": 7}),
    ],
)
def test_settings(setting, options):
    assert parse_setting(setting) == (setting, options)


def test_settings_from_options():
    assert parse_setting({"preset": "small"}) == ("small", {"preset": "small"})
    options = {"bits_k": 4, "bits_v": 2, "residual_window": 64}
    assert parse_setting(options) == ("k4v2:w64:s4", options)


@pytest.mark.parametrize("setting", ["defualt", "k4", "k4v2:x", "k4v2:w", "k9v2", "k4v2:w33", {"bitsk": 4}])
def test_settings_that_cannot_be_read(setting):
    with pytest.raises(ValueError):
        parse_setting(setting)


# evaluate


def test_evaluate(model, tmp_path):
    steps: list[str] = []
    settings = [OPTIONS, "k1v1:w32", "off"]
    text = "".join(chr(32 + number) for number in torch.randint(0, 90, (600,)).tolist())
    found = evaluate(model, Letters(), settings, text, 320, 60, numbers=2, on_step=steps.append)
    dense, packed, coarse, off = found.rows
    assert (dense.name, packed.name, off.name) == ("dense", "k3v3:w32:s4", "off")
    assert dense.kl_mean == 0 and dense.bits == 32 and dense.bits_4096 == 16 and dense.perplexity_increase == 0
    assert off.kl_mean < 1e-6 and off.bits == 32 and off.bits_4096 == 16 and off.packed_layers == 0
    assert 0 < packed.kl_median < packed.kl_mean < packed.kl_p99 and packed.packed_layers == 1
    assert packed.bits == packed.cache_bytes * 8 / (320 * 16 * 2) and 3 < packed.bits_4096 < 4.2
    assert 0 < packed.top1_agreement < 1 and packed.perplexity_increase == packed.perplexity / dense.perplexity - 1
    assert found.numbers == 2 and packed.numbers_found is not None
    assert off.numbers_nll == pytest.approx(dense.numbers_nll, abs=1e-5) and off.numbers_found == dense.numbers_found
    assert 0 < abs(packed.numbers_nll - dense.numbers_nll) < abs(coarse.numbers_nll - dense.numbers_nll)
    assert any("decoding" in step for step in steps) and any("k3v3:w32:s4: the number of" in step for step in steps)

    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    console = Console(width=140, record=True, file=open(tmp_path / "out", "w"))
    console.print(found)
    shown = console.export_text()
    assert "k3v3:w32:s4" in shown and "hidden" in shown and f"{packed.numbers_found} of 2" in shown
    pytest.importorskip("matplotlib")
    plot([found, found], tmp_path / "kl.png")
    assert (tmp_path / "kl.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_refuses_what_it_cannot_do(model):
    with pytest.raises(ValueError, match="fewer than score_from"):
        evaluate(model, Letters(), ["default"], "short")
    with pytest.raises(ValueError, match="tokens must be at least 258"):
        evaluate(model, Letters(), ["default"], tokens=200)
    with pytest.raises(ValueError, match="tokenizer must be that of the model; got None"):
        evaluate(model, None, ["default"])
    with pytest.raises(ValueError, match="numbers must be 1 to 32, or 0 for none; got -1"):
        evaluate(model, Letters(), ["default"], numbers=-1)
    with pytest.raises(ValueError, match="given twice"):
        evaluate(model, Letters(), ["default", "default"])
    with pytest.raises(ValueError, match="compiled already"):
        evaluate(torch.compile(model, backend="eager"), Letters(), ["default"])


def test_default_text_is_long():
    assert len(default_text()) > 200_000


# Peers


def test_peers_that_are_not_installed_say_so(model, monkeypatch):
    absent = Peer("other", (("other-cache", "other_cache"),), lambda model: None)
    broken = Peer("broken", (), lambda model: 1 // 0)
    monkeypatch.setattr("tqc.evaluate.peers.PEERS", (absent, broken))
    found = evaluate(model, Letters(), [], "some text " * 30, 100, 40, numbers=0, peers=True)
    dense, first, second = found.rows
    assert first.reason == "not installed: other-cache" and first.kl_mean is None
    assert second.reason == "ZeroDivisionError: integer division or modulo by zero"
    assert not dense.reason and found.numbers == 0
    console = Console(width=140)
    with console.capture() as capture:
        console.print(found)
    assert "other: not installed: other-cache" in capture.get() and "hidden" not in capture.get()


def test_a_peer_that_fails_while_decoding_is_left_out(model):
    def run(ids: torch.Tensor, **_: Any) -> Any:
        raise RuntimeError("no room\nat all")

    failed: dict[str, str] = {}
    with torch.no_grad():
        dense = Decoder("dense", model, DynamicCache)
        decode_in_step(dense, [Decoder("other", run, DynamicCache, optional=True)], tokens_of(50), 10, print, failed)
        with pytest.raises(RuntimeError, match="no room"):
            decode_in_step(dense, [Decoder("ours", run, DynamicCache)], tokens_of(50), 10, print, failed)
    assert failed == {"other": "RuntimeError: no room"}


def test_fp8_peer_runs(model):
    """The one peer that needs no other package."""
    peer = next(peer for peer in PEERS if not peer.packages)
    with torch.no_grad():
        decoder = Decoder(peer.name, model, lambda: peer.new_cache(model))
        scores = decode_in_step(Decoder("dense", model, DynamicCache), [decoder], tokens_of(150), 20, print, {})
    assert 0 < scores[peer.name].summary()["kl_mean"]
    assert 8 < measured_bits(decoder.new_cache, LayerShape(1, 16, 16, False), 64) < 8.1


def test_plot_without_points(tmp_path):
    pytest.importorskip("matplotlib")
    plot([Evaluation("m", "float32", 10, 2, 0, [Row("dense", "dense")])], tmp_path / "empty.png")
