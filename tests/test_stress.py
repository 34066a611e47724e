"""The stress models of benchmarks/quality/stress.py: hard to code, and the dense function is as before."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from tests.models.common import FAMILIES, prompt

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "quality" / "stress.py"


@pytest.fixture(scope="module")
def stress():
    spec = importlib.util.spec_from_file_location("stress", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_outlier_pairs_keep_the_function(stress, family):
    model = FAMILIES[family].build()
    ids = prompt(1, 40)
    with torch.no_grad():
        before = model(ids).logits
        stressed = stress.with_outlier_pairs(copy.deepcopy(model), 16, (1, 2))
        torch.testing.assert_close(stressed(ids).logits, before, atol=1e-4, rtol=1e-4)
    keys = {name for name, weight in model.state_dict().items() if not torch.equal(weight, stressed.state_dict()[name])}
    assert {name.split(".")[-2][0] for name in keys} == {"k", "q"} and len(keys) == 2 * len(model.model.layers)


def test_unknown_transformations_are_refused(stress):
    with pytest.raises(ValueError, match="transformation must be one of plain, .*; got 'pair'"):
        stress.transformed(None, "pair")
