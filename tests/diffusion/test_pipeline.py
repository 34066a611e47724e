"""`tqc.compile_pipeline` on real pipelines with random weights; their VAEs."""

from __future__ import annotations

import types

import diffusers
import pytest
import torch

import tqc
from tests.diffusion.common import EAGER, transformer
from tqc.diffusion.dispatcher import dispatcher_of
from tqc.diffusion.plan import Cell, Plan


def vae():
    torch.manual_seed(0)
    kind = "EncoderBlock2D"
    return diffusers.AutoencoderKL(
        down_block_types=(f"Down{kind}",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(8,),
        norm_num_groups=4, latent_channels=4,
    )  # fmt: skip


def dit_pipeline():
    scheduler = diffusers.DDIMScheduler()
    pipe = diffusers.DiTPipeline(transformer("dit"), vae().eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, steps=4, labels=(1, 2), **how):
    generator = torch.Generator().manual_seed(0)
    how = {"guidance_scale": 4.0, "output_type": "np", **how}
    return torch.from_numpy(pipe(list(labels), num_inference_steps=steps, generator=generator, **how).images)


def test_a_pipeline_shares_between_steps_and_frees_its_state():
    pipe = dit_pipeline()
    plain = draw(pipe)
    tqc.compile_pipeline(pipe, options=EAGER)
    assert torch.equal(draw(pipe), plain)
    tqc.compile_pipeline(pipe, strategy="share", cfg_sharing=True, options=EAGER)
    found = draw(pipe)
    assert torch.equal(draw(pipe), found)
    assert not torch.equal(found, plain)
    assert isinstance(pipe, diffusers.DiTPipeline) and type(pipe).__name__ == "DiTPipeline"
    dispatcher = dispatcher_of(pipe.transformer)
    assert [generation.nbytes for generation in dispatcher._generations()] == [0]
    sources = {site.source for variant, _ in dispatcher.variants.values() for site in variant.sites[0]}
    assert sources == {"half", "own"}
    alone = draw(pipe, guidance_scale=1.0)  # without guidance there are no branches
    tqc.compile_pipeline(pipe, strategy="share", options=EAGER)
    assert torch.equal(draw(pipe, guidance_scale=1.0), alone)
    tqc.decompile_pipeline(pipe)
    assert type(pipe) is diffusers.DiTPipeline
    assert torch.equal(draw(pipe), plain)


def test_a_generation_inside_another_and_one_that_fails_leave_it_alone():
    pipe = dit_pipeline()
    tqc.compile_pipeline(pipe, strategy="share", options=EAGER)
    expected = draw(pipe)
    step, inner = pipe.scheduler.step, []

    def interrupting(*args, **kwargs):
        pipe.scheduler.step = step
        if not inner:
            timesteps = pipe.scheduler.timesteps
            inner.append(draw(pipe))
            pipe.scheduler.set_timesteps(len(timesteps))
        return step(*args, **kwargs)

    pipe.scheduler.step = interrupting
    assert torch.equal(draw(pipe), expected)
    assert torch.equal(inner[0], expected)

    def failing(*args, **kwargs):
        raise KeyError("stop")

    pipe.scheduler.step = failing
    with pytest.raises(KeyError, match="stop"):
        draw(pipe)
    dispatcher = dispatcher_of(pipe.transformer)
    assert [generation.nbytes for generation in dispatcher._generations()] == [0]
    pipe.scheduler.step = step
    assert torch.equal(draw(pipe), expected)


def test_wan_guides_in_two_calls():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    wan_vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4,
                                         latents_std=[1.0] * 4)  # fmt: skip
    parts = {"tokenizer": None, "text_encoder": None, "vae": wan_vae.eval(), "scheduler": scheduler}
    pipe = diffusers.WanPipeline(transformer=transformer("wan"), **parts)
    pipe.set_progress_bar_config(disable=True)
    prompt = torch.randn(2, 1, 5, 48, generator=torch.Generator().manual_seed(0))

    def film():
        return pipe(
            prompt_embeds=prompt[0], negative_prompt_embeds=prompt[1], height=64, width=64, num_frames=5,
            num_inference_steps=3, output_type="latent", generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    plain = film()
    tqc.compile_pipeline(pipe, strategy="share", cfg_sharing=True, options=EAGER)
    found = film()
    assert not torch.equal(found, plain)
    variants = dispatcher_of(pipe.transformer).variants
    sources = {
        tuple(site.source for site in variant.sites[0] if site.kind == "self") for variant, _ in variants.values()
    }
    assert sources == {("full",), ("other",), ("own",)}
    tqc.decompile_pipeline(pipe)
    assert "cache_context" not in vars(pipe.transformer)
    assert torch.equal(film(), plain)


def test_a_plan_of_another_number_of_steps_is_told_before_anything_runs():
    pipe = dit_pipeline()
    plan = Plan("DiTTransformer2DModel", ((Cell(),) * 2, (Cell("shared"),) * 2))
    tqc.compile_pipeline(pipe, plan=plan, options=EAGER)
    with pytest.raises(ValueError, match="the plan has 2 steps, and the scheduler is set to 4"):
        draw(pipe)
    assert not dispatcher_of(pipe.transformer).variants
    draw(pipe, steps=2)
    transformer_alone = dispatcher_of(pipe.transformer)
    with torch.no_grad(), pytest.raises(ValueError, match="the plan has 2 steps, and this is call 3"):
        for timestep in (900, 800, 700):
            sample = torch.zeros(2, 4, 16, 16)
            pipe.transformer(sample, timestep=torch.tensor([timestep] * 2), class_labels=torch.tensor([0, 1]))
    assert transformer_alone._generations()[0].nbytes == 0


@pytest.mark.parametrize(
    "given, message",
    [
        ({"strategy": "sharing"}, "strategy must be one of .*share.*; got 'sharing' .did you mean 'share'"),
        ({"plan": Plan("Other", ((Cell(),) * 2,))}, "the plan is of Other with 2 layers"),
        ({"state_bits": 3}, "state_bits must be one of 8, 4, 2, or None; got 3"),
        ({"options": {"rset": "eager"}}, "unknown option 'rset'"),
        ({"skip_layers": [7]}, "skip_layers must be between -2 and 1, got 7"),
    ],
)
def test_an_error_leaves_the_pipeline_as_it_was(given, message):
    pipe = dit_pipeline()
    before = dict(vars(pipe.transformer))
    with pytest.raises(ValueError, match=message):
        tqc.compile_pipeline(pipe, **given)
    assert type(pipe) is diffusers.DiTPipeline and vars(pipe.transformer) == before


def test_a_pipeline_without_a_transformer_is_told():
    for pipe in (types.SimpleNamespace(), types.SimpleNamespace(transformer=None, unet=torch.nn.Linear(2, 2))):
        with pytest.raises(ValueError, match="pipe must have a transformer, and SimpleNamespace has none"):
            tqc.compile_pipeline(pipe)
    with pytest.raises(ValueError, match="Linear takes none"):
        tqc.compile_pipeline(types.SimpleNamespace(transformer=torch.nn.Linear(2, 2)))


def test_vae_memory_keeps_the_tiles_of_diffusers_unless_asked():
    pipe = types.SimpleNamespace(vae=diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1))
    height = pipe.vae.tile_sample_min_height
    assert tqc.optimize_vae_memory(pipe) == ["tiling", "slicing"]
    assert pipe.vae.use_tiling and pipe.vae.use_slicing and pipe.vae.tile_sample_min_height == height
    tqc.optimize_vae_memory(pipe, tile_sample_min_height=512)
    assert pipe.vae.tile_sample_min_height == 512
    pipe.vae.disable_tiling()
    with pytest.raises(ValueError, match="no 'tile_sample_min_heigth' .did you mean 'tile_sample_min_height'"):
        tqc.optimize_vae_memory(pipe, tile_sample_min_heigth=512)
    with pytest.raises(ValueError, match="tile_sample_min_height must be a positive number, got 0"):
        tqc.optimize_vae_memory(pipe, tile_sample_min_height=0)
    assert not pipe.vae.use_tiling

    pipe = types.SimpleNamespace(vae=vae())  # whose method takes no sizes
    assert tqc.optimize_vae_memory(pipe, slicing=False) == ["tiling"]
    assert pipe.vae.use_tiling and not pipe.vae.use_slicing
    with pytest.raises(ValueError, match="they take no sizes"):
        tqc.optimize_vae_memory(pipe, tile_sample_min_height=512)
    with pytest.raises(ValueError, match="Linear can decode neither by tiles nor by slices"):
        tqc.optimize_vae_memory(types.SimpleNamespace(vae=torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="SimpleNamespace has none"):
        tqc.optimize_vae_memory(types.SimpleNamespace())


def test_rotary_embeddings_leave_float64():
    rope = torch.nn.Module()
    rope.double_precision = True
    pipe = types.SimpleNamespace(transformer=torch.nn.Sequential(rope, torch.nn.Linear(2, 2)), vae=None)
    assert tqc.patch_mps_compatibility(pipe) == 1
    assert rope.double_precision is False
    assert tqc.patch_mps_compatibility(pipe) == 0
