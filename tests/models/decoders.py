"""Small random models of several architectures, for block-by-block execution."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2Config, GPT2Config, LlamaConfig, OPTConfig, PretrainedConfig, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama_eager": lambda: LlamaConfig(**SIZES | {"attn_implementation": "eager"}),
    "qwen3": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True),
    # Window below the tested length, so that sliding and full masks differ; caps low enough to have an effect.
    "gemma2": lambda: Gemma2Config(
        **SIZES, query_pre_attn_scalar=8, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=0.5
    ),
    "opt": lambda: OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=64,
        max_position_embeddings=64,
        word_embed_proj_dim=24,
        do_layer_norm_before=False,
        pad_token_id=1,
    ),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, n_positions=64),
}


def make(kind: str, seed: int = 0) -> Any:
    """Random model in eval mode, without gradients."""
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the initialisation, where norms are 1 and biases 0
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval().requires_grad_(False)


def ids_of(batch: int, length: int = 12, seed: int = 1) -> Tensor:
    """Random tokens, int64 [batch, length]."""
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(seed))
