"""More transformers of diffusers, small and with random weights: LTX, HunyuanVideo, CogVideoX, Wan 2.2's two, LoRA."""

from __future__ import annotations

import diffusers
import pytest
import torch

import tqc
from tests.diffusion.common import EAGER, inputs, transformer
from tests.diffusion.oracle import Attention, Blocks
from tqc.diffusion.dispatcher import dispatcher_of
from tqc.diffusion.pipeline import make_dispatcher
from tqc.diffusion.plan import Cell, Plan

pytestmark = pytest.mark.extended


def ltx():
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=24,
    )  # fmt: skip
    given = {"encoder_hidden_states": (2, 5, 24), "hidden_states": (2, 24, 8)}
    more = {"encoder_attention_mask": torch.ones(2, 5), "num_frames": 2, "height": 3, "width": 4}
    return model, given, more, model.transformer_blocks


def hunyuan():
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=False,
        text_embed_dim=24, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    given = {"hidden_states": (2, 4, 2, 8, 8), "encoder_hidden_states": (2, 5, 24), "pooled_projections": (2, 8)}
    return model, given, {"encoder_attention_mask": torch.ones(2, 5)}, None


def cogvideox():
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=24, num_layers=2, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=5,
    )  # fmt: skip
    return model, {"hidden_states": (2, 2, 4, 8, 8), "encoder_hidden_states": (2, 5, 24)}, {}, None


MODELS = {"ltx": ltx, "hunyuan": hunyuan, "cogvideox": cogvideox}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def made(name):
    """A transformer, its blocks, and what gives the inputs of a step."""
    torch.manual_seed(0)
    model, shapes, more, blocks = MODELS[name]()

    def at(step):
        generator = torch.Generator().manual_seed(step)
        tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        return {**tensors, **more, "timestep": torch.tensor([900 - 100 * step] * 2), "return_dict": False}

    return model.eval().requires_grad_(False), at, blocks


@pytest.mark.parametrize("name", MODELS)
def test_shared_and_forecast_attention_is_as_in_plain_torch(name):
    model, at, _ = made(name)
    decide = ["full", "full", ("forecast", 1), "full"]
    oracle = Attention(decide.__getitem__)
    expected = [oracle.call(model, **at(step)) for step in range(4)]
    if name == "hunyuan":  # its refiner attends to the prompt alone, outside of the blocks
        expected = None
    dispatcher = make_dispatcher(model, strategy="taylor", strategy_kwargs={"warmup": 2, "every": 2}, options=EAGER)
    dispatcher.install()
    found = [model(**at(step))[0] for step in range(4)]
    kinds = {site.kind for variant, _ in dispatcher.variants.values() for site in variant.sites[0]}
    assert kinds == {"ltx": {"self", "cross"}, "hunyuan": {"self", "joint"}, "cogvideox": {"joint"}}[name]
    for step, one in enumerate(found if expected is not None else ()):
        torch.testing.assert_close(one, expected[step], rtol=0, atol=1e-5)
    full, shared = (variant.flops["attention"] for variant, _ in dispatcher.variants.values())
    assert shared < full


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_that_computes_everything_is_the_plain_compiled_transformer(name):
    model, at, _ = made(name)
    model.compile(backend="tqai", options=EAGER)
    expected = model(**at(0))[0]
    layers = len(make_dispatcher(model).blocks)
    make_dispatcher(model, plan=Plan(type(model).__name__, ((Cell(),) * layers,)), options=EAGER).install()
    assert torch.equal(model(**at(0))[0], expected)


def test_whole_blocks_of_ltx_are_shared():
    model, at, blocks = made("ltx")
    oracle = Blocks(model, blocks, lambda step, layer: ("forecast", 0) if step % 2 else "full")
    given = [{**at(step)} for step in range(2)]
    expected = [oracle.call(**one) for one in given]
    make_dispatcher(model, strategy="share", strategy_kwargs={"blocks": True}, options=EAGER).install()
    for one, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(model(**one)[0], wanted, rtol=0, atol=1e-5)


def test_a_batch_of_both_branches_projects_one_half():
    model, at, _ = made("ltx")
    dispatcher = make_dispatcher(model, cfg_sharing=True, options=EAGER)
    dispatcher.install()
    plain = make_dispatcher(made("ltx")[0], options=EAGER)
    with model.cache_context("cond_uncond"):
        model(**at(0))
    plain.install()
    plain.transformer(**at(0))
    (half, _), (full, _) = *dispatcher.variants.values(), *plain.variants.values()
    # Two layers, three projections of 24 tokens from 32 to 32, for one sample of two; half of self-attention.
    tokens, width = 24, 32
    projections = 2 * 3 * (2 * tokens * width * width)
    attention = 2 * (4 * tokens * tokens * width)
    assert full.flops["total"] - half.flops["total"] == projections + attention


def test_wan_2_2_compiles_both_of_its_transformers():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4,
                                     latents_std=[1.0] * 4)  # fmt: skip
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae.eval(), "scheduler": scheduler}
    second = transformer("wan")
    for parameter in second.parameters():
        parameter.mul_(1.05)
    pipe = diffusers.WanPipeline(transformer=transformer("wan"), transformer_2=second, boundary_ratio=0.6, **parts)
    pipe.set_progress_bar_config(disable=True)
    prompt = torch.randn(2, 1, 5, 48, generator=torch.Generator().manual_seed(0))

    def film():
        return pipe(
            prompt_embeds=prompt[0], negative_prompt_embeds=prompt[1], height=64, width=64, num_frames=5,
            num_inference_steps=6, output_type="latent", generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    plain = film()
    tqc.compile_pipeline(pipe, options=EAGER)
    assert torch.equal(film(), plain)
    tqc.compile_pipeline(pipe, strategy="delta2", scorer="snr", cfg_sharing=True,
                         strategy_kwargs={"threshold": 2.0}, options=EAGER)  # fmt: skip
    found = film()
    assert not torch.equal(found, plain) and torch.equal(film(), found)
    for model in (pipe.transformer, pipe.transformer_2):
        dispatcher = dispatcher_of(model)
        assert len(dispatcher.variants) > 1
        assert [generation.nbytes for generation in dispatcher._generations()] == [0]


def test_a_pipeline_that_was_called_eagerly_is_compiled_later():
    model = transformer("dit")
    expected = [model(**inputs("dit", 900.0 - 100 * step, seed=step))[0] for step in range(2)]
    make_dispatcher(model, options=EAGER).install()
    found = [model(**inputs("dit", 900.0 - 100 * step, seed=step))[0] for step in range(2)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_lora_loaded_before_and_scaled_after():
    peft = pytest.importorskip("peft")
    model = transformer("sd3")
    model.add_adapter(peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_out.0"]))
    model.eval().requires_grad_(False)
    oracle = Attention(["full", ("forecast", 0), ("forecast", 0)].__getitem__)

    def at(step):
        scale = (1.0, 1.0, 0.3)[step]  # what is shared is from before the projection of the output
        return {**inputs("sd3", 900.0 - 100 * step, seed=step), "joint_attention_kwargs": {"scale": scale}}

    expected = [oracle.call(model, **at(step)) for step in range(3)]
    make_dispatcher(model, strategy="share", strategy_kwargs={"every": 3}, options=EAGER).install()
    for step, wanted in enumerate(expected):
        torch.testing.assert_close(model(**at(step))[0], wanted, rtol=0, atol=1e-5, msg=lambda m: f"step {step}: {m}")  # noqa: B023
