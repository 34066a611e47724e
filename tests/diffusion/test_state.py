"""State in the packed format: its error, its bytes, and a generation that goes through it."""

from __future__ import annotations

import pytest
import torch

from tests.common import normal
from tests.diffusion.common import EAGER, generate, transformer
from tqc.diffusion.pipeline import make_dispatcher
from tqc.diffusion.state import Generation, PackedState
from tqc.passes.rewrites.step_state import ATTENTION, StateKey

KEY, ODD = StateKey("attn", ATTENTION), StateKey("odd", ATTENTION)


# All-in bits of a bfloat16 element, and the mean squared error of Lloyd-Max levels with room for scales.
@pytest.mark.parametrize("bits, share, error", [(8, 0.52, 1e-4), (4, 0.27, 0.011), (2, 0.145, 0.13)])
def test_a_packed_state_reads_back_within_its_width(bits, share, error):
    state = normal(2, 257, 3, 64, dtype=torch.bfloat16)
    packed = PackedState.of(state, bits)
    read = packed.read()
    assert (read.shape, read.dtype) == (state.shape, state.dtype)
    assert torch.equal(read[:, 256:], state[:, 256:])
    difference = (read - state)[:, :256].float()
    assert difference.square().mean() < error * state.float().square().mean()
    assert packed.nbytes < share * state.nbytes


def test_a_state_of_less_than_a_page_stays_as_it_is():
    state = normal(2, 31, 3, 64)
    assert torch.equal(PackedState.of(state, 2).read(), state)


def test_two_branches_hold_one_state():
    generation = Generation()
    generation.keep("cond", 0, KEY, normal(1, 4, 2, 8))
    generation.take_over("uncond", "cond", 0, KEY)
    assert generation.nbytes == 4 * 2 * 8 * 4
    generation.branch("cond").trim(0, ATTENTION, 0)
    assert not generation.branch("cond").held
    assert torch.equal(generation.read("uncond", KEY), normal(1, 4, 2, 8))
    assert generation.nbytes == 4 * 2 * 8 * 4


def test_a_generation_with_bits_packs_what_it_keeps():
    generation, state = Generation(bits=4), normal(1, 64, 2, 32)
    generation.keep("cond", 0, KEY, state)
    assert generation.nbytes < 0.16 * state.nbytes
    assert torch.equal(generation.read("cond", KEY), PackedState.of(state, 4).read())
    generation.keep("cond", 0, ODD, normal(1, 64, 2, 12))  # no head dimension of the format
    assert torch.equal(generation.read("cond", ODD), normal(1, 64, 2, 12))


@pytest.mark.extended
def test_steps_that_share_packed_state_are_near_those_that_share_it_dense():
    model = transformer("dit")
    with torch.no_grad():
        outputs = {}
        for bits in (None, 8, 2):
            dispatcher = make_dispatcher(model, strategy="share", state_bits=bits, options=EAGER)
            dispatcher.install()
            outputs[bits] = generate(model, "dit", steps=2)[1]
        errors = [(outputs[bits] - outputs[None]).abs().max().item() for bits in (8, 2)]
    assert 0 < 8 * errors[0] < errors[1] < 0.3
