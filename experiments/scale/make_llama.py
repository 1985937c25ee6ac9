"""Makes a random Llama of any shape, shard by shard, so that a model larger than memory can be made.

    python experiments/scale/make_llama.py FOLDER                       # the shape of Llama 3.1 8B, 32 blocks, 16 GB
    python experiments/scale/make_llama.py FOLDER --blocks 4            # the same, cut to 4 blocks
    python experiments/scale/make_llama.py FOLDER --width 0.25          # every width a quarter

Weights are normal, scaled so that activations keep their size; norms are 1. The tokenizer is that of the shipped model.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from matquant.home import home

INDEX = "model.safetensors.index.json"


def shape(blocks: int, width: float, vocabulary: int) -> LlamaConfig:
    """The config of Llama 3.1 8B with so many blocks, its widths times ``width``."""
    return LlamaConfig(
        hidden_size=int(4096 * width), intermediate_size=int(14336 * width), num_hidden_layers=blocks,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=vocabulary, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, rms_norm_eps=1e-5, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"], dtype="bfloat16", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def shards(config: LlamaConfig, seed: int) -> Iterator[dict[str, Tensor]]:
    """What each file holds: the embeddings, each block, then the last norm and the head."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, columns**-0.5, generator=generator)

    hidden, inner, keys = config.hidden_size, config.intermediate_size, config.hidden_size // 4
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    yield {"model.embed_tokens.weight": matrix(config.vocab_size, hidden) * hidden**0.5}
    for index in range(config.num_hidden_layers):
        rows = {"self_attn.q_proj": hidden, "self_attn.k_proj": keys, "self_attn.v_proj": keys, "self_attn.o_proj": hidden,
                "mlp.gate_proj": inner, "mlp.up_proj": inner}  # fmt: skip
        block = {f"{name}.weight": matrix(count, hidden) for name, count in rows.items()}
        block |= {"mlp.down_proj.weight": matrix(hidden, inner)}
        block |= {f"{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        yield {f"model.layers.{index}.{name}": tensor for name, tensor in block.items()}
    yield {"model.norm.weight": ones, "lm_head.weight": matrix(config.vocab_size, hidden)}


def make(folder: Path, blocks: int, width: float, vocabulary: int, seed: int = 0) -> None:
    """Write the checkpoint; never more than one shard is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    config = shape(blocks, width, vocabulary)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(home() / "experiments" / "tiny" / "model").save_pretrained(folder)
    files: dict[str, str] = {}
    size = 0
    for number, tensors in enumerate(shards(config, seed), 1):
        name = f"model-{number:05d}-of-{blocks + 2:05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        files |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": files}, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.folder, arguments.blocks, arguments.width, arguments.vocabulary, arguments.seed)


if __name__ == "__main__":
    main()
