"""Small random models of many architectures, built from the config classes of Transformers.

``CONFIGS`` sets what matters for a selection of them; all others get the sizes of ``small_configs``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from shared import TINY
from small_configs import small_config

VOCABULARY = 128

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PLAIN = {key: value for key, value in SIZES.items() if key not in ("head_dim", "num_key_value_heads")}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaConfig(**SIZES),
    "mistral": lambda: tf.MistralConfig(**SIZES, sliding_window=8),
    "qwen2": lambda: tf.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3Config(**SIZES),
    "gemma2": lambda: tf.Gemma2Config(**SIZES, query_pre_attn_scalar=16, sliding_window=8),
    "gemma3_text": lambda: tf.Gemma3TextConfig(**SIZES, query_pre_attn_scalar=16, sliding_window=8),
    "phi3": lambda: tf.Phi3Config(**SIZES),
    "opt": lambda: tf.OPTConfig(
        hidden_size=64,
        ffn_dim=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
        pad_token_id=1,
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**PLAIN),
    "gpt2": lambda: tf.GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_inner=64,
        vocab_size=VOCABULARY,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "falcon": lambda: tf.FalconConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        ffn_hidden_size=64,
        new_decoder_architecture=True,
        num_kv_heads=2,
        bias=True,
    ),
    "granite": lambda: tf.GraniteConfig(**PLAIN, residual_multiplier=0.5, embedding_multiplier=3.0, logits_scaling=2.0),
    "olmo2": lambda: tf.Olmo2Config(**PLAIN, num_key_value_heads=2),
    "mixtral": lambda: tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=64
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True
    ),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **PLAIN,
        num_key_value_heads=4,
        moe_intermediate_size=64,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_shared_experts=1,
    ),
    "gpt_oss": lambda: tf.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
}


def make_model(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """Random model of a kind, see ``random_model``.

    Args:
        changes: fields of the config.
    """
    config = CONFIGS[kind]() if kind in CONFIGS else small_config(kind)
    config.update(changes)
    return random_model(config, dtype, seed)


def random_model(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Random model in eval mode; its weights are moved from their initialisation, where norms are 1 and biases 0."""
    torch.manual_seed(seed)
    model: Any = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype).eval().requires_grad_(False)


def save(model: Any, folder: Path, shard: str = "5GB") -> Path:
    """Save a checkpoint as on the hub, with the tokenizer of the shipped model."""
    model.save_pretrained(folder, max_shard_size=shard)
    tf.AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder
