"""Model families that llama.cpp runs: names in GGUF, hyperparameters, and where its tensors differ from Transformers'.

Only families that Transformers reads from GGUF files are listed, and ``mixtral``, which it does not. What llama.cpp would run
with other results than Transformers is refused.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from matquant.errors import UserError

_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Family of models.

    Attributes:
        name: ``general.architecture``.
        interleaved_rotary: True if the rows of queries and keys are in the order of pairs that rotate together.
        norm_shift: number that the weights of norms are larger by.
        activation: the only activation function that llama.cpp has for the family.
        check: refusal of what llama.cpp computes differently.
        parameters: hyperparameters that only this family has, by key without the architecture's name.
        windowed: True if llama.cpp masks by the sliding window; else the context ends at the window.
    """

    name: str
    interleaved_rotary: bool = False
    norm_shift: float = 0.0
    activation: tuple[str, ...] = ("silu", "swish")
    check: Callable[[Any], None] = lambda config: None
    parameters: Callable[[Any], dict[str, Any]] = lambda config: {}
    windowed: bool = False


def architecture_of(config: Any) -> Architecture:
    """Family of a model by the config of Transformers.

    Raises:
        UserError: names the family, or the setting that llama.cpp does not have.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"pack=gguf does not know the architecture {kind}. It writes {', '.join(ARCHITECTURES)}; pack=nested holds every "
            "architecture."
        )
    found = ARCHITECTURES[kind]
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in found.activation:
        raise _unsupported(config, f"the activation function {activation}")
    for rope in _ropes(config):
        if rope["rope_type"] not in _ROPE_TYPES or (rope["rope_type"] == "longrope") != ("long_factor" in rope):
            raise _unsupported(config, f"rotary embeddings of type {rope['rope_type']}")
    if kind != "phi3" and any(rope.get("partial_rotary_factor", 1.0) != 1.0 for rope in _ropes(config)):
        raise _unsupported(config, "a partial_rotary_factor")
    found.check(config)
    return found


def hyperparameters(config: Any, architecture: Architecture) -> dict[str, Any]:
    """Values of the keys ``<architecture>.<key>`` of the file: int, float, bool or str."""
    head_dim = _head_dim(config)
    rope = _full_rope(config)
    found = {
        "context_length": context_length(config, architecture),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1.0)),
        "vocab_size": config.vocab_size,
    }
    return found | _rope_scaling(config, rope) | architecture.parameters(config)


def context_length(config: Any, architecture: Architecture) -> int:
    """Longest context in which llama.cpp computes the same as Transformers."""
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    slides = window is not None and "sliding_attention" in layers and not architecture.windowed
    return int(min(config.max_position_embeddings, window) if slides else config.max_position_embeddings)


def rope_tensors(config: Any) -> dict[str, Tensor]:
    """Tensors of rotary frequencies that the file needs beside the model's own, by name in the file: float32 [head_dim / 2]."""
    rope = _full_rope(config)
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, _head_dim(config))}
    if rope["rope_type"] == "longrope":
        return {f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"]) for kind in ("long", "short")}
    return {}


def rotary_order(rows: int, heads: int) -> Tensor:
    """Rows of a projection of queries or keys in the order of llama.cpp, which rotates neighbours: int64 [rows].

    Transformers rotates row j of the first half of a head with row j of its second half.
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)


def _rope_scaling(config: Any, rope: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters of scaled rotary embeddings; nothing for others, and for llama3, whose factors are a tensor."""
    kind = rope["rope_type"]
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "yarn":
        found = {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": original,
        }
        return found | {
            f"rope.scaling.yarn_{key}": float(rope[key]) for key in ("beta_fast", "beta_slow") if rope.get(key)
        }
    if kind == "longrope":
        scale = config.max_position_embeddings / original
        attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        return {
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": float(rope.get("attention_factor") or attention),
        }
    return {}


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Divisors of the rotary frequencies of Llama 3: 1 for short wavelengths, the factor for long ones, smooth between."""
    wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, head_dim, 2).double() / head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
    smooth = smooth.clamp(0, 1)
    divisors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return divisors.float()


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Parameters of the rotary embeddings, one for all layers or one for each type of layer."""
    found = config.rope_parameters
    return [found] if "rope_type" in found else list(found.values())


def _full_rope(config: Any) -> dict[str, Any]:
    """Parameters of the rotary embeddings of layers with full attention."""
    found: dict[str, Any] = config.rope_parameters
    return found if "rope_type" in found else dict(found["full_attention"])


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _unsupported(config: Any, what: str) -> UserError:
    return UserError(
        f"pack=gguf: llama.cpp does not run {config.model_type} with {what}. pack=nested holds every model."
    )


def _check_gemma(config: Any, period: int, largest: int) -> None:
    """Refuse attention that llama.cpp has as a constant: its scale, and which layers see the whole context.

    Args:
        period: number of layers after which one has full attention.
        largest: number of layers of the one size whose scale depends on the hidden size.
    """
    layers = config.num_hidden_layers
    scale = config.hidden_size // config.num_attention_heads if layers == largest else _head_dim(config)
    if config.query_pre_attn_scalar != scale:
        raise _unsupported(config, f"query_pre_attn_scalar={config.query_pre_attn_scalar} (it has {scale})")
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    if list(config.layer_types) != expected:
        raise _unsupported(config, f"layer_types other than full attention in every layer {period}")


def _gemma2(config: Any) -> dict[str, Any]:
    return {
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def _check_gemma2(config: Any) -> None:
    if config.attn_logit_softcapping is None or config.final_logit_softcapping is None:
        raise _unsupported(config, "no softcapping of logits")
    _check_gemma(config, period=2, largest=46)


def _gemma3(config: Any) -> dict[str, Any]:
    found = {
        "attention.sliding_window": config.sliding_window,
        "rope.freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"]),
    }
    cap = config.final_logit_softcapping
    return found if cap is None else found | {"final_logit_softcapping": float(cap)}


def _check_gemma3(config: Any) -> None:
    if config.attn_logit_softcapping is not None:
        raise _unsupported(config, "softcapping of attention logits")
    if getattr(config, "use_bidirectional_attention", False):
        raise _unsupported(config, "bidirectional attention")
    _check_gemma(config, period=6, largest=62)


def _experts(config: Any) -> dict[str, Any]:
    count = getattr(config, "num_experts", None) or config.num_local_experts
    found = {"expert_count": count, "expert_used_count": config.num_experts_per_tok}
    if getattr(config, "moe_intermediate_size", None):
        found["expert_feed_forward_length"] = config.moe_intermediate_size
    if getattr(config, "shared_expert_intermediate_size", None):
        found["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return found


def _check_experts(config: Any, normalized: bool) -> None:
    """Refuse blocks without experts, and another normalization of the router's weights than llama.cpp has."""
    if config.decoder_sparse_step != 1 or config.mlp_only_layers:
        raise _unsupported(config, "some blocks without experts (mlp_only_layers, decoder_sparse_step)")
    if config.norm_topk_prob != normalized:
        raise _unsupported(config, f"norm_topk_prob={config.norm_topk_prob}")


_GELU = ("gelu_pytorch_tanh",)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(name="llama", interleaved_rotary=True),
    "mistral": Architecture(name="llama", interleaved_rotary=True),
    "mixtral": Architecture(name="llama", interleaved_rotary=True, parameters=_experts),
    "qwen2": Architecture(name="qwen2"),
    "qwen3": Architecture(name="qwen3"),
    "qwen2_moe": Architecture(
        name="qwen2moe", parameters=_experts, check=lambda config: _check_experts(config, normalized=False)
    ),
    "qwen3_moe": Architecture(
        name="qwen3moe", parameters=_experts, check=lambda config: _check_experts(config, normalized=True)
    ),
    "phi3": Architecture(name="phi3"),
    "gemma2": Architecture(
        name="gemma2", norm_shift=1.0, activation=_GELU, check=_check_gemma2, parameters=_gemma2, windowed=True
    ),
    "gemma3_text": Architecture(
        name="gemma3", norm_shift=1.0, activation=_GELU, check=_check_gemma3, parameters=_gemma3, windowed=True
    ),
}
