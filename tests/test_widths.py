"""Widths of layers: the least error within a budget, the file that holds them, and what the compiler makes of them."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import tqc
from tests.common import OPTIONS
from tests.models.common import FAMILIES, layers, prompt
from tqc.cache.packed_tensor import PackedTensor
from tqc.config import Config
from tqc.evaluate.decode import LayerShape, all_in_bits
from tqc.report import collect
from tqc.widths import OtherModelError, Widths, WidthsFileError, least_error

SHARED: dict[str, Any] = {name: value for name, value in OPTIONS.items() if not name.startswith("bits")}


def widths_of(*rows: tuple[int, int], heads: int = 2, head_dim: int = 16, **about: str) -> Widths:
    """Those of layers 0, 1, ..., (keys, values), tried from 2 to 8 bits; wider codes err less."""
    shapes = torch.tensor([[number, heads, head_dim, head_dim] for number in range(len(rows))], dtype=torch.int32)
    errors = torch.rand(2, len(rows), heads, 7, generator=torch.Generator().manual_seed(0)).sort(descending=True)[0]
    keys, values = (torch.tensor(side, dtype=torch.int8)[:, None].repeat(1, heads) for side in zip(*rows, strict=True))
    return Widths(keys, values, shapes, torch.arange(2, 9, dtype=torch.int8), *errors, about)


# The solver

_items = st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=4)


@given(errors=_items, data=st.data(), budget=st.floats(2, 5))
def test_no_choice_within_the_budget_errs_less(errors: list[list[float]], data: st.DataObject, budget: float) -> None:
    tried = [2, 3, 5]
    sizes = data.draw(st.lists(st.sampled_from([16, 32, 48]), min_size=len(errors), max_size=len(errors)))

    def total(choice: tuple[int, ...]) -> float:
        return sum(row[tried.index(width)] for row, width in zip(errors, choice, strict=True))

    def bits(choice: tuple[int, ...]) -> float:
        return sum(size * width for size, width in zip(sizes, choice, strict=True)) / sum(sizes)

    choice = tuple(least_error(errors, sizes, tried, budget))
    allowed = [other for other in itertools.product(tried, repeat=len(errors)) if bits(other) <= budget + 1e-12]
    assert bits(choice) <= budget + 1e-12
    assert total(choice) == pytest.approx(min(map(total, allowed)))


def test_more_bits_never_err_more_and_never_exceed_the_budget() -> None:
    widths = widths_of(*[(3, 3)] * 5)
    found = [widths.solved(budget / 16) for budget in range(32, 136)]
    assert all(solved.bits <= budget / 16 for budget, solved in zip(range(32, 136), found, strict=True))
    errors = [solved.expected_error() for solved in found]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]
    assert found[0].of_rows() == [(2, 2)] * 5 and found[-1].of_rows() == [(8, 8)] * 5
    with pytest.raises(ValueError, match=r"budget_bits must be at least 2, .* got 1.5"):
        widths.solved(1.5)


def test_bits_count_what_layers_hold() -> None:
    shapes = torch.tensor([[0, 2, 16, 16], [1, 1, 64, 32]], dtype=torch.int32)
    held = torch.tensor([[2, 2], [4, 0]], dtype=torch.int8)
    widths = replace(widths_of((2, 2), (2, 2)), keys=held, values=held, shapes=shapes)
    assert widths.bits == pytest.approx((2 * 64 + 4 * 96) / 160)
    assert widths.of_rows() == [(2, 2), (4, 4)]


# The file


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "widths.safetensors"
    widths = widths_of((2, 3), (4, 2), model="tiny", layers="2")
    widths.save(path)
    loaded = Widths.load(path)
    assert loaded == widths and loaded.about == widths.about and loaded.digest == widths.digest
    assert loaded.of_layer(1, 2, 16, 16) == (4, 2) and loaded.bits == 2.75
    assert loaded != widths_of((2, 3), (4, 3))
    widths_of((8, 8)).save(path)
    assert Widths.load(path).of_rows() == [(8, 8)] and [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"keys": torch.full((2, 2), 9, dtype=torch.int8)}, "keys of a width that is none of"),
        ({"keys": torch.full((2, 2), 3.0)}, "keys of shape .* and dtype F32"),
        ({"values": torch.full((3, 2), 3, dtype=torch.int8)}, "values of shape .*, not"),
        ({"key_errors": torch.full((2, 2, 7), torch.nan)}, "key_errors that are negative or not finite"),
        ({"value_errors": torch.zeros(2, 2, 6)}, "value_errors of shape"),
        ({"tried": torch.tensor([2, 3, 4, 5, 6, 8, 7], dtype=torch.int8)}, "must ascend"),
        ({"shapes": torch.tensor([[1, 2, 16, 16], [0, 2, 16, 16]], dtype=torch.int32)}, "must ascend"),
        ({"shapes": torch.tensor([[0, 3, 16, 16], [1, 2, 16, 16]], dtype=torch.int32)}, "cannot be"),
        ({"more": torch.zeros(1)}, "must hold keys"),
        ({"tqc_widths": "2"}, "is of version '2' of widths"),
        ({"tqc_widths": None}, "no field 'tqc_widths'"),
    ],
)
def test_a_file_that_cannot_be_is_one_clear_error(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "widths.safetensors"
    widths_of((2, 3), (4, 2)).save(path)
    version = change.pop("tqc_widths", "1")
    save_file({**load_file(path), **change}, path, metadata={"tqc_widths": version} if version else None)
    with pytest.raises(WidthsFileError, match=message) as caught:
        Widths.load(path)
    assert str(path) in str(caught.value)
    with pytest.raises(WidthsFileError, match=message):
        Config.from_options({"widths": str(path)})


def test_damaged_files_load_or_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "widths.safetensors"
    widths_of((2, 3), (4, 2)).save(path)
    whole, generator = path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole[: generator.choice([len(whole), generator.randrange(len(whole))])])
        for _ in range(generator.randrange(3) if damaged else 0):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            Config(widths=path)
        except WidthsFileError:
            pass


# Options


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"widths": "FILE", "bits_k": 3}, ValueError, "bits_k and widths cannot both be given"),
        ({"widths": "FILE", "bits_v": 3}, ValueError, "bits_v and widths cannot both be given"),
        ({"widths": "FILE", "preset": "off"}, ValueError, "widths are for packed caches"),
        ({"widths": "FILE", "budget_bits": 1}, ValueError, "budget_bits must be at least 2, .* got 1"),
        ({"widths": "FILE", "budget_bits": "3"}, TypeError, "budget_bits must be a number, got '3'"),
        ({"budget_bits": 3}, ValueError, "budget_bits chooses among widths, .* got 3"),
        ({"widths": 3}, TypeError, "widths must be the path of a file .* got 3"),
        ({"widths": "./missing"}, ValueError, "widths './missing' cannot be read: No such file"),
    ],
)
def test_mistakes(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    widths_of((2, 3), (4, 2)).save(tmp_path / "file")
    given = {name: str(tmp_path / "file") if value == "FILE" else value for name, value in options.items()}
    with pytest.raises(error, match=message):
        Config.from_options(given)


def test_heads_of_a_layer_are_of_one_width_for_now(tmp_path: Path) -> None:
    widths = widths_of((2, 3), (4, 2))
    widths.values[1, 1] = 3
    widths.save(tmp_path / "file")
    with pytest.raises(ValueError, match="widths per head are not supported yet: those of layer 1 differ"):
        Config(widths=tmp_path / "file")
    assert Config(widths=tmp_path / "file", budget_bits=3).widths.bits <= 3


def test_a_budget_chooses_anew_and_presets_give_the_rest(tmp_path: Path) -> None:
    widths = widths_of((2, 3), (4, 2))
    config = Config.from_options({"widths": widths, "budget_bits": 3.5, "preset": "small"})
    assert config.widths == widths.solved(3.5) != widths and config.residual_window == 128
    assert {config: 1}[Config.from_options({"widths": widths.solved(3.5), "budget_bits": 3.5, "preset": "small"})]


# The compiler


def bits_of(cache: Any) -> list[tuple[int, int]]:
    return [(layer.keys.fmt.bits, layer.values.fmt.bits) for layer in layers(cache)]


def planned(plans: list[Any]) -> list[list[tuple[int, int]]]:
    return [[(site.k_fmt.bits, site.v_fmt.bits) for site in plan.sites] for plan in plans]


def test_each_layer_gets_its_widths_in_prefill_and_decode(tmp_path: Path) -> None:
    model, rows = FAMILIES["llama"].build(), [(8, 5), (6, 7)]
    widths_of(*rows, layers="2").save(tmp_path / "file")
    cache, plain = (DynamicCache(config=model.config) for _ in range(2))
    torch._dynamo.reset()
    options = {**SHARED, "widths": str(tmp_path / "file")}
    with collect() as plans, torch.no_grad():
        packed = torch.compile(model, backend="tqai", options=options)
        ids = prompt(1, 82)
        out = [packed(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 80), (80, 81), (81, 82))]
        dense = [model(ids[:, a:b], past_key_values=plain).logits for a, b in ((0, 80), (80, 81), (81, 82))]
    assert planned(plans) == [rows, rows] and bits_of(cache) == rows
    torch.testing.assert_close(out[2], dense[2], atol=0.5, rtol=0.1)
    tqc.save_cache(cache, tmp_path / "cache")
    loaded = tqc.load_cache(tmp_path / "cache")
    assert bits_of(loaded) == rows
    for before, after in zip(layers(cache), layers(loaded), strict=True):
        assert torch.equal(before.keys + 0, after.keys + 0) and torch.equal(before.values + 0, after.values + 0)
    with torch.no_grad():
        token = prompt(1, 83)[:, 82:]
        torch.testing.assert_close(
            packed(token, past_key_values=loaded).logits, packed(token, past_key_values=cache).logits
        )


def test_generate_explain_and_skipped_layers(tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    widths_of((8, 7), (7, 8), layers="2").save(tmp_path / "file")
    options = {**SHARED, "widths": str(tmp_path / "file")}
    ids = prompt(1, 80)
    torch._dynamo.reset()
    model.compile(backend="tqai", options={**options, "skip_layers": [0]})
    held = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True).past_key_values
    assert [isinstance(layer.keys, PackedTensor) for layer in layers(held)] == [False, True]
    assert layers(held)[1].keys.fmt.bits == 7
    explained = tqc.explain(FAMILIES["llama"].build(), input_ids=ids, options=options)
    assert [[site["keys"].split(":")[2] for site in sites] for sites in explained.graphs] == [["b8", "b7"]] * 2
    assert json.dumps(explained.to_dict())
    torch._dynamo.reset()


def test_graphs_of_one_file_are_not_those_of_what_it_held_before(tmp_path: Path) -> None:
    """Dynamo shares graphs between models whose options are equal, and the file's name stays."""
    model, path, found = FAMILIES["llama"].build(), tmp_path / "file", []
    torch._dynamo.reset()
    for rows in ([(8, 8), (8, 8)], [(4, 6), (5, 7)], [(8, 8), (8, 8)]):
        widths_of(*rows).save(path)
        given = {**SHARED, "widths": str(path)}
        cache = DynamicCache(config=model.config)
        with collect() as plans, torch.no_grad():
            torch.compile(model, backend="tqai", options=given)(prompt(1, 80), past_key_values=cache)
        assert bits_of(cache) == rows and given["widths"] == str(path)
        found.append(len(plans))
    assert found == [1, 1, 0]  # what it held at first has a graph already
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "widths, message",
    [
        (widths_of((3, 3)), "layer 1 has a cache, and widths are given for layers 0 to 0"),
        (widths_of((3, 3), (3, 3), heads=4), "layer 0 has 2 heads .* given for 4"),
        (widths_of((3, 3), (3, 3), head_dim=32), "head_dims of 16 and 16, and widths are given for 2 with 32 and 32"),
        (widths_of((3, 3), (3, 3), (3, 3), layers="3"), "it has 3 layers, and this one 2"),
    ],
)
def test_widths_of_another_model_are_refused(widths: Widths, message: str) -> None:
    model = FAMILIES["llama"].build()
    cache = DynamicCache(config=model.config)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message) as caught, torch.no_grad():
        packed = torch.compile(model, backend="tqai", options={**SHARED, "widths": widths})
        packed(prompt(1, 80), past_key_values=cache)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), OtherModelError)
    torch._dynamo.reset()


def test_all_in_bits_are_those_of_each_layer() -> None:
    shapes = [LayerShape(2, 16, 16, True, number) for number in range(2)]
    mixed = Config(widths=widths_of((2, 3), (4, 5)))
    one, other = (all_in_bits(Config(bits_k=k, bits_v=v), shapes[:1], 1024) for k, v in ((2, 3), (4, 5)))
    assert all_in_bits(mixed, shapes, 1024) == pytest.approx((one + other) / 2)
