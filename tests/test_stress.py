"""The models of benchmarks/quality/transformations.py: hard to code, and the dense function is as before."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from tests.models.common import FAMILIES, prompt

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "quality" / "transformations.py"
MODELS = ["llama", "qwen2", "qwen3", "olmo2", "gemma3"]


@pytest.fixture(scope="module")
def stress():
    spec = importlib.util.spec_from_file_location("transformations", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return FAMILIES[request.param].build()


def results(model):
    """Logits of a prompt, and the keys that the first layer keeps."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = model(prompt(1, 20), past_key_values=cache).logits
    return logits, cache.layers[0].keys


@pytest.mark.parametrize("transformation", ["pairs-4", "pairs-64", "channel"])
def test_outlier_pairs_keep_the_function(stress, model, monkeypatch, transformation):
    pairs = stress.with_outlier_pairs  # a head here has 8 pairs
    monkeypatch.setattr(stress, "with_outlier_pairs", lambda model, factor, _: pairs(model, factor, (1, 2)))
    logits, keys = results(model)
    stressed, larger = results(stress.transformed(copy.deepcopy(model), transformation))
    torch.testing.assert_close(stressed, logits, atol=1e-4, rtol=1e-4)
    factor = {"pairs-4": 4, "pairs-64": 64, "channel": 256}[transformation]
    gain = torch.ones(keys.shape[-1])
    gain[[1, 2, 9, 10]] = factor
    torch.testing.assert_close(larger, keys * gain, atol=1e-4 * factor, rtol=1e-4)


def test_a_bias_keeps_the_function(stress, model):
    still, keys = results(stress.with_still_pairs(copy.deepcopy(model)))
    biased, moved = results(stress.transformed(copy.deepcopy(model), "bias"))
    torch.testing.assert_close(biased, still, atol=1e-4, rtol=1e-4)
    shift = moved - keys
    torch.testing.assert_close(shift.norm(dim=-1), torch.full(shift.shape[:-1], 600.0), atol=1e-2, rtol=0)
    torch.testing.assert_close(shift, shift[:, :, :1].expand_as(shift), atol=1e-3, rtol=0)
    # The slowest pairs, which stand still for it, hardly turned.
    torch.testing.assert_close(still, results(model)[0], atol=1e-2, rtol=1e-2)


def test_further_positions_keep_the_function(stress, model):
    logits, keys = results(model)
    shifted, turned = results(stress.transformed(copy.deepcopy(model), "at-32K"))
    # An angle of some 10,000 radians in float32 is off by up to 0.0005.
    torch.testing.assert_close(shifted, logits, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(turned.norm(dim=-1), keys.norm(dim=-1))
    assert (turned - keys).norm() > 0.5 * keys.norm()


def test_unknown_transformations_are_refused(stress):
    with pytest.raises(ValueError, match="transformation must be one of plain, .*; got 'pair'"):
        stress.transformed(None, "pair")
