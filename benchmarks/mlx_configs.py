"""Small configurations of mlx-lm's models, by what fields of a configuration are called."""

from __future__ import annotations

from typing import Any

# What a configuration that has such a field gets.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "model_dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "d_ff", "n_inner", "ffn_hidden_size", "moe_intermediate_size"), 96),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size", "moe_ffn_hidden_size"), 96),
    **dict.fromkeys(("expert_ffn_hidden_size", "intermediate_size_mlp", "block_ff_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_transformer_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_attention_groups", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "kv_channels", "query_pre_attn_scalar"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "num_experts_top_k"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), 512),
    **dict.fromkeys(("original_max_position_embeddings", "model_max_length"), 512),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon", "norm_epsilon"), 1e-5),
    **dict.fromkeys(("layernorm_epsilon", "layer_norm_rms_epsilon"), 1e-5),
    **dict.fromkeys(("sliding_window", "window_size", "sliding_window_size", "attention_window_size"), 40),
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_qkv_bias", "use_bias", "no_bias"), False),
    **dict.fromkeys(("rope_theta", "rope_base", "rotary_emb_base"), 10000.0),
    **{"tie_word_embeddings": True, "partial_rotary_factor": 0.5, "first_k_dense_replace": 1, "n_group": 1},
    **{
        "topk_group": 1,
        "n_shared_experts": 1,
        "num_shared_experts": 1,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    **{"norm_topk_prob": True, "moe_layer_freq": 1, "routed_scaling_factor": 1.0, "sliding_window_pattern": 2},
    **{"rotary_dim": 8, "rotary_pct": 0.5, "logit_scale": 1.0, "attention_multiplier": 0.25, "hidden_act": "silu"},
    **{"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0, "ssm_state_size": 8},
    **{"state_size": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "conv_kernel": 4, "conv_kernel_size": 4},
    **{"time_step_rank": 4, "linear_conv_kernel_dim": 4, "full_attention_interval": 2, "conv_L_cache": 3},
    **{"full_attn_idxs": [1, 3], "conv_dim": 64, "conv_dim_out": 64, "hidden_size_per_layer_input": 8},
    **{"vocab_size_per_layer_input": 128, "num_kv_shared_layers": 0, "attn_logit_softcapping": 50.0},
    **{"final_logit_softcapping": 30.0, "attention_logits_soft_cap": 50.0, "add_qkv_bias": False, "dt_rank": 4},
    **{"rope_traditional": False, "qkv_bias": False, "scale_emb": 1.0, "scale_depth": 1.0, "dim_model_base": 64},
}
VARIATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"layer_types": ["sliding_attention", "full_attention"] * 2},
    {"num_key_value_heads": 4},
    {"q_lora_rank": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
)


ALTERNATING = ["sliding_attention", "full_attention"] * 2
MAMBA = {"mamba_proj_bias": False, "mamba_conv_bias": True, "use_conv_bias": True, "n_groups": 1}
MLA = {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "zero_expert_num": 1, "zero_expert_type": "identity"}
LFM = {"conv_bias": False, "block_dim": 64, "block_multiple_of": 16, "block_ffn_dim_multiplier": 1.0,
       "block_auto_adjust_ff_dim": False, "use_expert_bias": False, "num_dense_layers": 1}  # fmt: skip
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "mscale": 1.0, "mscale_all_dim": 1.0}
# What some models want besides; those of which a part has another name too.
OWN: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 64, "num_kv_reuse_layers": 2},
    "apertus": {"post_norm": False, "qk_norm": True},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "bailing_hybrid": {"layer_group_size": 2, "group_norm_size": 2},
    "bailing_moe_linear": {"layer_group_size": 2, "group_norm_size": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    },
    "deepseek_v2": {"rope_scaling": YARN},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": ALTERNATING, "is_moe_layer": [False, True] * 2},
    "glm4_moe": {"rope_scaling": None, "use_qk_norm": True},
    "glm_moe_dsa": {
        **{"index_head_dim": 32, "index_n_heads": 2, "index_topk": 16, "topk_method": "noaux_tc"},
        **{"scoring_func": "sigmoid", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    },
    "granitemoehybrid": {
        **{"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1},
        **MAMBA,
    },
    "hunyuan": {
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
    },  # fmt: skip
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_expand": 2,
    },  # fmt: skip
    "kimi_linear": {
        "linear_attn_config": {
            **{"kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 4, "head_dim": 16},
            "short_conv_kernel_size": 4,
        }
    },
    "lfm2": LFM,
    "lfm2-vl": LFM,
    "lfm2_moe": LFM,
    "lille-130m": {"block_size": 512, "n_kv_heads": 2},
    "llama4": {"attention_chunk_size": 40, "interleave_moe_layer_step": 2, "rope_scaling": None, "use_qk_norm": True},
    "llama4_text": {"no_rope_layers": [1, 0] * 2, "use_qk_norm": True},
    "longcat_flash": {**MLA, "attention_method": "MLA"},
    "longcat_flash_ngram": MLA,
    "mamba": MAMBA,
    "mamba2": {**MAMBA, "time_step_limit": (0.001, 100.0), "num_heads": 8, "head_dim": 16, "expand": 2},
    "mellum": {"layer_types": ALTERNATING},
    "mimo_v2_flash": {
        **{"hybrid_layer_pattern": [1, 0] * 2, "add_swa_attention_sink_bias": True, "topk_method": "noaux_tc"},
        **{"add_full_attention_sink_bias": False, "scoring_func": "sigmoid", "swa_rope_theta": 10000.0},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "swa_v_head_dim": 16},
        **{"moe_layer_freq": [0, 1, 1, 1]},
    },
    "minicpm3": {
        "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "original_max_position_embeddings": 256}
    },  # fmt: skip
    "ministral3": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 256,
        }
    },  # fmt: skip
    "mistral4": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 256,
        }
    },  # fmt: skip
    "nemotron_h": {
        **MAMBA,
        **{"mamba_num_heads": 8, "mamba_head_dim": 16, "hybrid_override_pattern": "M*-*", "num_hidden_layers": 4},
    },
    "olmo_hybrid": {"linear_allow_neg_eigval": False, "layer_types": ["linear_attention", "full_attention"] * 2},
    "openelm": {
        "ffn_dim_divisor": 16,
        "num_query_heads": [4] * 4,
        "num_kv_heads": [2] * 4,
        "ffn_multipliers": [1.5] * 4,
    },  # fmt: skip
    "phi3small": {"dense_attention_every_n_layers": 2, "ff_intermediate_size": 96, "gegelu_limit": 20.0},
    "plamo": {"n_shared_head": 2},
    "recurrent_gemma": {"conv1d_width": 4, "logits_soft_cap": 30.0, "block_types": ["recurrent", "attention"] * 2},
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
    "spark2_5": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "step3p5": {"moe_top_k": 2, "moe_num_experts": 4, "share_expert_dim": 96},
}
