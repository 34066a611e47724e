"""Tiny random models of the real classes, and how to compare them compressed with dense."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.common import OPTIONS
from tqc import report
from tqc.cache.packed_tensor import PackedTensor
from tqc.passes.plan import Plan

VOCAB = 128
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_SMALL = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_SEQ2SEQ = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 1,
}
_MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
_MIXED = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "num_hidden_layers": 3}


@dataclass(frozen=True)
class Family:
    """One model class, small.

    Attributes:
        model, config: class names in transformers.
        options: of the config.
        packed: how many attention sites a decode step finds packed.
        dense: how many it leaves dense.
    """

    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    packed: int = 2
    dense: int = 0

    def build(self, attn: str = "sdpa", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**self.options, **options})
        model = getattr(transformers, self.model)._from_config(config, attn_implementation=attn, dtype=dtype).eval()
        _spread(model)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return model


def _spread(model: Any) -> None:
    """Weights larger than at initialization, so that attention is far from uniform and logits tell tokens apart."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            parameter.data.mul_(3.0)
        if name.endswith("sinks"):
            parameter.data.normal_()
        if name.endswith("k_proj.bias"):
            parameter.data.normal_(std=4.0)


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "mistral": Family("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 60}),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", _DECODER),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", _DECODER),
    "olmo2": Family("Olmo2ForCausalLM", "Olmo2Config", _DECODER),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", {**_DECODER, **_MOE}),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "gpt_neox": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_DECODER, "num_key_value_heads": 4}),
    "gptj": Family(
        "GPTJForCausalLM", "GPTJConfig", {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
    ),
    "opt": Family("OPTForCausalLM", "OPTConfig", {**_DECODER, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", {**_DECODER, **_MIXED, "sliding_window": 60}, 3),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", {**_DECODER, **_MIXED, "sliding_window": 60}, 3),
    "gpt_oss": Family("GptOssForCausalLM", "GptOssConfig", {**_DECODER, **_MIXED, **_MOE, "sliding_window": 60}, 3),
    "codegen": Family(
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {**_SMALL, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512, "n_ctx": 512},
    ),
    "gpt_neo": Family(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **{**_SMALL, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 512},
            **{"attention_types": [[["global", "local"], 1]], "window_size": 24},
        },
    ),
    "bloom": Family("BloomForCausalLM", "BloomConfig", {**_SMALL, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "trocr": Family(
        "TrOCRForCausalLM",
        "TrOCRConfig",
        {
            **{**_SMALL, "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96},
            **{"max_position_embeddings": 512, "use_cache": True, "is_decoder": False},
        },
    ),
    "xglm": Family(
        "XGLMForCausalLM",
        "XGLMConfig",
        {**_SMALL, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96, "max_position_embeddings": 512},
    ),
    "falcon_alibi": Family(
        "FalconForCausalLM",
        "FalconConfig",
        {
            **{**_SMALL, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
            **{"new_decoder_architecture": False, "multi_query": False},
        },
    ),
    "mpt": Family(
        "MptForCausalLM", "MptConfig", {**_SMALL, "d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {**_SEQ2SEQ, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4},
        4,
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **_SEQ2SEQ,
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "max_position_embeddings": 512,
            "forced_eos_token_id": None,
        },
        4,
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_SEQ2SEQ,
            **{"d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4},
            **{"decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "num_mel_bins": 8},
            **{"max_source_positions": 60, "max_target_positions": 128, "suppress_tokens": None},
            **{"begin_suppress_tokens": None},
        },
        4,
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        {
            **_DECODER,
            "num_key_value_heads": 4,
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "first_k_dense_replace": 2,
        },
        0,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_DECODER,
            "num_key_value_heads": 4,
            "kv_lora_rank": 32,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "first_k_dense_replace": 2,
        },
        0,
    ),
}

for _name, _model, _config, _options, _packed in (
    ("lfm2", "Lfm2", "Lfm2", {"layer_types": ["conv", "full_attention", "full_attention"], "num_hidden_layers": 3}, 2),
    (
        "jamba",
        "Jamba",
        "Jamba",
        {
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4, "expert_layer_offset": 3},
            **{"num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4},
        },
        1,
    ),
    (
        "qwen3_next",
        "Qwen3Next",
        "Qwen3Next",
        {
            **{"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2},
            **{"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 4},
            **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        },
        1,
    ),
    (
        "bamba",
        "Bamba",
        "Bamba",
        {
            **{"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1},
            **{"mamba_d_state": 8, "mamba_expand": 2},
        },
        1,
    ),
    (
        "gemma3n",
        "Gemma3n",
        "Gemma3nText",
        {
            **{"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 2},
            **{"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "laurel_rank": 8},
            **{"altup_num_inputs": 2, "activation_sparsity_pattern": None},
        },
        4,
    ),
):
    FAMILIES[_name] = Family(f"{_model}ForCausalLM", f"{_config}Config", {**_DECODER, **_options}, _packed)


@contextmanager
def compiled(model: Any, **options: Any) -> Iterator[list[Plan]]:
    """`model` runs through the backend inside the block, and as it was behind it; yields the plans of its graphs."""
    torch._dynamo.reset()
    model.compile(backend="tqai", options={**OPTIONS, **options})
    try:
        with report.collect() as plans, torch.no_grad():
            yield plans
    finally:
        model._compiled_call_impl = None
        torch._dynamo.reset()


def sites(plan: Plan, action: str) -> int:
    return len(plan.with_action(action))


def prompt(batch: int = 2, length: int = 80, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(model: Any, ids: Tensor, cache: Any, splits: tuple[int, ...] = (80,), **kwargs: Any) -> Tensor:
    """Feed `ids` to a decoder with `cache`, cut at `splits` and token by token behind; all logits."""
    cuts = [0, *splits, *range(splits[-1] + 1, ids.shape[1] + 1)]
    calls = zip(cuts, cuts[1:], strict=False)
    return torch.cat([model(ids[:, a:b], past_key_values=cache, **kwargs).logits for a, b in calls], dim=1)


def dense(tensor: Tensor) -> Tensor:
    return tensor.dequantize() if isinstance(tensor, PackedTensor) else tensor


def layers(cache: Any) -> list[Any]:
    """Layers of a cache that hold keys and values, those of both halves of an encoder-decoder's."""
    if hasattr(cache, "self_attention_cache"):
        return layers(cache.self_attention_cache) + layers(cache.cross_attention_cache)
    return [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Compare vectors (the last dimension): the worst one's error, relative to the typical length of `expected`."""
    assert actual.shape == expected.shape, what
    error = (actual.float() - expected.float()).norm(dim=-1).max() / expected.float().norm(dim=-1).mean()
    assert error < tolerance, f"{what}: a vector is off by {error:.2e} of a typical one's length"


def assert_caches_close(actual: Any, expected: Any, tolerance: float, packed: int | None = None) -> None:
    """Compare two caches layer by layer; `packed` of the layers of `actual` must hold packed tensors."""
    ours, theirs = layers(actual), layers(expected)
    assert len(ours) == len(theirs)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(dense(a.keys), b.keys, tolerance, f"keys of layer {index}")
        assert_close(dense(a.values), b.values, tolerance, f"values of layer {index}")
    if packed is not None:
        assert sum(isinstance(layer.keys, PackedTensor) for layer in ours) == packed
        assert sum(isinstance(layer.values, PackedTensor) for layer in ours) == packed
