"""Options: every mistake gets one error that names the option, its value and what is allowed."""

import pytest

from tqc.config import PRESETS, Config


def test_presets_are_valid_and_options_override_them():
    for name in PRESETS:
        assert Config.from_options(mode=name) == Config.from_options({"preset": name})
    config = Config.from_options({"preset": "small", "bits_v": 4, "skip_layers": [0, -1]})
    assert (config.bits_k, config.bits_v, config.skip_layers) == (2, 4, (0, -1))
    assert Config.from_options() == Config()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits_key": 4}, ValueError, r"unknown option 'bits_key' \(did you mean 'bits_k'\?\)"),
        ({"preset": "qualty"}, ValueError, r"got 'qualty' \(did you mean 'quality'\?\)"),
        ({"bits_k": 9}, ValueError, "bits_k must be 1 to 8, or 16 .* got 9"),
        ({"bits_v": 0}, ValueError, "bits_v must be 1 to 8, or 16 .* got 0"),
        ({"bits_k": 4.0}, TypeError, "bits_k must be an int, got 4.0"),
        ({"bits_k": True}, TypeError, "bits_k must be an int, got True"),
        ({"bits_k": 16}, ValueError, "must both be 16 or neither; got bits_k=16, bits_v=3"),
        ({"fold_values": 1}, TypeError, "fold_values must be True or False, got 1"),
        ({"residual_window": 50}, ValueError, "residual_window must be a positive multiple of 32, got 50"),
        ({"sink_tokens": -1}, ValueError, "sink_tokens must be at least 0, got -1"),
        ({"rotation": "fourier"}, ValueError, "rotation must be one of hadamard, haar; got 'fourier'"),
        ({"rest": "jit"}, ValueError, "rest must be one of inductor, eager; got 'jit'"),
        ({"strategy": "evikt"}, ValueError, r"strategy must be .*; got 'evikt' \(did you mean 'evict'\?\)"),
        ({"strategy": "evict", "scorer": "snapvk"}, ValueError, r"got 'snapvk' \(did you mean 'snapkv'\?\)"),
        (
            {"strategy": "evict", "scorer": "snapkv", "scorer_kwargs": {"kern": 5}},
            ValueError,
            r"no parameter 'kern' .*'kernel'",
        ),
        ({"scorer": "snapkv"}, ValueError, "scorer needs a strategy .* got 'snapkv' and none"),
        ({"keep": 0.5}, ValueError, "keep needs a strategy"),
        ({"strategy": "evict", "keep": 0.47}, ValueError, "keep must be one of 1/8, .*; got 0.47"),
        ({"strategy": "evict", "keep": True}, TypeError, "keep must be a number, got True"),
        ({"strategy": "evict", "tiers": "1x4/2"}, ValueError, "tiers are for strategy 'tiered'"),
        ({"strategy": "tiered", "keep": 0.5}, ValueError, "keep is for strategy 'evict'"),
        ({"strategy": "tiered", "tiers": "5x4/4"}, ValueError, "tiers must read as 1x4.* got '5x4/4'"),
        ({"strategy": "tiered", "tiers": 4}, ValueError, "tiers must read as .* got 4"),
        ({"strategy": "tiered", "budget_bits": 1.5}, ValueError, "budget_bits must be at least 2.0 .* got 1.5"),
        ({"strategy": "evict", "preset": "off"}, ValueError, "strategy 'evict' is for packed caches"),
        (
            {"strategy": "evict", "scorer": "snapkv", "residual_window": 64},
            ValueError,
            "residual_window must be at least 79",
        ),
        ({"skip_layers": ["first"]}, TypeError, "skip_layers must be integers"),
    ],
)
def test_mistakes(options, error, message):
    with pytest.raises(error, match=message):
        Config.from_options(options)


def test_a_strategy_gets_the_window_that_it_needs_and_its_groups():
    plain, evict = Config(), Config.from_options({"strategy": "evict", "keep": 0.25, "scorer": "knorm"})
    assert evict.residual_window == 128 and Config.from_options({"strategy": "evict"}).residual_window == 96
    keys, values = evict.formats(64, 64)
    assert (keys.groups.tokens, keys.groups.tiers, keys.groups.scorer) == (128, ((1, 3),), "knorm()")
    assert values.groups.scorer == "" and keys.evicts
    tiered = Config.from_options(
        {"strategy": "tiered", "budget_bits": 2.4, "scorer": "snapkv", "scorer_kwargs": {"queries": 4}}
    )
    keys, values = tiered.formats(64, 64, repeats=3)
    assert keys.groups.code_bits == values.groups.code_bits == 2.0
    assert keys.score_rows == 12 and values.score_rows == 0 and keys.bits == 4
    assert all(fmt.groups is None for fmt in (*plain.formats(64, 64), *evict.formats(64, 64, repeats=None)))


def test_off_is_off_for_both():
    assert Config.from_options(mode="off").off
    assert Config.from_options({"bits_k": 16, "bits_v": 16}).off
    assert not Config().off
