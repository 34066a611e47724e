"""Small random models of mlx-lm."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn

SHARED = {
    **{"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16},
    **{"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 100, "max_position_embeddings": 512},
    **{"rope_theta": 10000.0, "tie_word_embeddings": True},
}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {**_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "gemma2": {},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "phi3": {"original_max_position_embeddings": 512},
    "mistral": {**_WINDOWS, "file": "llama"},
    "qwen3_next": {
        **{**_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [], "shared_expert_intermediate_size": 32},
        **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16},
        **{"linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "full_attention_interval": 2},
        **{"partial_rotary_factor": 0.5},
    },
    "deepseek_v3": {
        **{"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32},
        **{"n_routed_experts": 4, "num_experts_per_tok": 4, "n_shared_experts": 1, "moe_intermediate_size": 32},
        **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    },
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}
ATTENTION = [name for name in MODELS if name not in ("qwen3_next", "deepseek_v3")]
# Of four layers, how many have windows.
WINDOWED = {"mistral": 2, "gemma3_text": 2, "gpt_oss": 2}


def build(name: str, **changes: Any) -> nn.Module:
    """A model with random weights, the same each time."""
    given = {**SHARED, "model_type": name, **MODELS[name], **changes}
    module = importlib.import_module(f"mlx_lm.models.{given.pop('file', name)}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(given))
    if name == "gpt_oss":
        for layer in model.layers:
            layer.self_attn.sinks = mx.random.normal((4,))
    mx.eval(model.parameters())
    return model


def tokens(*shape: int) -> mx.array:
    mx.random.seed(1)
    return mx.random.randint(0, 100, shape)


def tokenizer() -> Any:
    """A tokenizer that has a word for each token, for mlx-lm's functions that want one."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{index}": index for index in range(100)}, "w0"))
    return TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w99"))
