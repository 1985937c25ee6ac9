"""Small configs of every causal language model that Transformers knows, made from the defaults of its config classes."""

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 2048  # of the shipped tokenizer

KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Values of settings, by the names that different architectures give them.
_GROUPS: list[tuple[str, Any]] = [
    ("hidden_size d_model n_embd dim model_dim embed_dim embedding_size word_embed_proj_dim", 64),
    ("num_hidden_layers n_layer n_layers num_layers num_blocks", 2),
    ("decoder_layers encoder_layers num_decoder_layers num_encoder_layers", 2),
    ("num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads", 4),
    ("num_key_value_heads num_kv_heads n_kv_heads", 2),
    ("head_dim attention_head_dim", 16),
    ("intermediate_size ffn_dim d_ff dff dim_ff ffn_hidden_size n_inner decoder_ffn_dim encoder_ffn_dim mlp_dim", 64),
    ("moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size", 64),
    ("dense_intermediate_size shared_intermediate_size attention_hidden_size lru_width", 64),
    ("input_embedding_size output_embedding_size shape_embed_dim pronunciation_embed_dim output_channels", 64),
    ("sliding_window sliding_window_size attention_window_size", 8),
    ("linear_key_head_dim linear_value_head_dim", 16),
    ("linear_num_key_heads linear_num_value_heads", 2),
    ("index_n_heads index_head_dim index_topk", 16),
    ("max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length", 128),
    ("num_local_experts num_experts n_routed_experts moe_num_experts", 4),
    ("num_experts_per_tok num_experts_per_token moe_k n_group num_expert_group", 2),
    ("topk_group", 1),
    ("kv_lora_rank q_lora_rank o_lora_rank", 32),
    ("qk_nope_head_dim qk_rope_head_dim v_head_dim", 16),
    ("pad_token_id bos_token_id eos_token_id", 0),
    ("vocab_size decoder_vocab_size encoder_hash_byte_group_vocab", VOCABULARY),
    ("is_decoder", True),
]
_SIZES = {name: value for names, value in _GROUPS for name in names.split()}

# Settings that have one entry for each layer, or follow from the others.
_DROPPED = {
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "layer_types",
    "mlp_layer_types",
    "per_layer_config",
    "hybrid_layer_ids",
}

_LAYER_TYPES = ("layer_types", "mlp_layer_types")

_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
_LATENT = {"num_key_value_heads": 4}  # multi-head latent attention
_PER_LAYER_INPUT = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 16}
_INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "rel_extent": 64}
_QWEN4 = {
    "hc_lowrank": 16,
    "ngram_vocab_size_base": 256,
    "split_ngram_parts": 2,
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HYBRID = ["linear_attention", "hybrid"] * 2

# Settings that fit together where the sizes above do not; ``...`` leaves one out.
_OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _LATENT),
    **dict.fromkeys(("glm_moe_dsa", "minicpm3", "youtu"), _LATENT),
    **{kind: {"rotary_dim": 16} for kind in ("codegen", "gptj")},
    **{kind: {"head_dim": 16} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "bailing_hybrid": {**_LATENT, "linear_head_dim": 16, "linear_num_heads": 4},
    "bamba": {**_MAMBA2, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "blt": {
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
        "global_config": {"num_hidden_layers": 3},  # the largest of four stacks
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _ROPE),
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note_text": {
        **_LATENT,
        "layer_types": ["indexed_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"],
        "num_hidden_layers": 2,
    },
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": 64,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": VOCABULARY,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4": {"text_config": _PER_LAYER_INPUT},
    "gemma4_text": _PER_LAYER_INPUT,
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ...},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
    "inkling2_text": _INKLING | {"unpadded_vocab_size": VOCABULARY},
    "inkling_text": _INKLING,
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_linear": {
        **_LATENT,
        "num_local_experts": ...,
        "num_experts": 4,
        "num_experts_per_tok": ...,
        "num_experts_per_token": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "laguna": {"layer_types": ["full_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": ...},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {
        **_LATENT,
        "moe_intermediate_size": 64,
        "zero_expert_num": 1,
        "num_experts_per_tok": 2,
        "qk_head_dim": 32,
    },
    "mellum": {"layer_types": ["full_attention", "sliding_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mamba", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 64,
    },
    "phi4_multimodal": {
        "vision_config": {"image_size": 28, "crop_size": 28},
        "audio_config": {"ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64, "nemo_conv_channels": 64},
    },
    "prophetnet": {"num_decoder_layers": 2, "num_encoder_layers": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 16]},
    "rwkv": {"num_hidden_layers": 7},  # weights are rescaled every 6 layers
    "xlm": {"emb_dim": 64, "n_words": VOCABULARY},
    "xlstm": {"embedding_dim": 64, "num_blocks": 2},
    "xlnet": {"d_head": 16, "d_inner": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": _HYBRID,
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": _HYBRID,
        "num_key_value_heads": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "mamba_d_state": 16,
        "mamba_headdim": 32,
        "n_mamba_heads": 4,
        "chunk_size": 16,
        "adapter_rank": 32,
    },
    "zaya": {
        "layer_types": ["hybrid", "hybrid_sliding"],
        "sliding_window": 8,
        "num_experts_per_tok": 1,
        "router_hidden_size": 32,
    },
}


def small_config(kind: str, **settings: Any) -> Any:
    """Config of a model type with small sizes. Raises whatever the config class does if they do not fit together.

    Args:
        settings: in place of the small or default ones; ``...`` leaves a setting out.
    """
    config_class = CONFIG_MAPPING[kind]
    small = _shrink(config_class().to_dict())
    for name, value in (_OVERRIDES.get(kind, {}) | settings).items():
        inner = small.get(name)
        small[name] = inner | value if isinstance(value, dict) and isinstance(inner, dict) else value
    return config_class(**{name: value for name, value in small.items() if value is not ...})


def _shrink(settings: dict[str, Any]) -> dict[str, Any]:
    counts = (settings.get(name) for name in ("num_hidden_layers", "n_layer", "num_layers"))
    layers = next((count for count in counts if isinstance(count, int)), None)
    small: dict[str, Any] = {}
    for name, value in settings.items():
        per_layer = isinstance(value, list) and len(value) == layers
        if name in _DROPPED or per_layer:
            continue
        if isinstance(value, dict) and name.endswith("_config"):
            small[name] = _shrink(value)
        else:
            small[name] = _SIZES[name] if name in _SIZES and value is not None else value
    return small | _layer_kinds(settings)


def _layer_kinds(settings: dict[str, Any]) -> dict[str, Any]:
    """Types of the layers of a small model: one layer for each combination of types, at least two layers."""
    lists = {name: settings[name] for name in _LAYER_TYPES if settings.get(name)}
    kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))
    if len(kinds) < 2:
        return {}
    return {name: list(types) for name, types in zip(lists, zip(*kinds, strict=True), strict=True)} | {
        "num_hidden_layers": len(kinds)
    }
