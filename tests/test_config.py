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
        ({"skip_layers": ["first"]}, TypeError, "skip_layers must be integers"),
    ],
)
def test_mistakes(options, error, message):
    with pytest.raises(error, match=message):
        Config.from_options(options)


def test_off_is_off_for_both():
    assert Config.from_options(mode="off").off
    assert Config.from_options({"bits_k": 16, "bits_v": 16}).off
    assert not Config().off
