"""Make a random Llama of any size, shard by shard: the model may be larger than memory.

    python experiments/benchmarks/make_llama.py FOLDER                       # the shape of Llama 3.1 8B, 32 blocks, 16 GB
    python experiments/benchmarks/make_llama.py FOLDER --blocks 4            # 4 blocks of that shape
    python experiments/benchmarks/make_llama.py FOLDER --width 0.25          # all sizes times 0.25

Weights are normal, scaled so that activations keep their magnitude; norms are 1. The tokenizer is that of the shipped model.
The same seed gives the same model on the same device type.
"""

import argparse
import concurrent.futures
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from matquant import machine
from matquant.paths import resource_root

INDEX = "model.safetensors.index.json"
MAX_THREADS = 8  # each makes a shard of at most 1 GB


def make_config(blocks: int, width: float, vocabulary: int) -> LlamaConfig:
    """Config of Llama 3.1 8B with ``blocks`` blocks and its sizes times ``width``."""
    return LlamaConfig(
        hidden_size=int(4096 * width),
        intermediate_size=int(14336 * width),
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=0,
    )


def make_shard(config: LlamaConfig, number: int, seed: int, device: str) -> dict[str, Tensor]:
    """Tensors of one file: the embeddings (0), a block, or the last norm and the head."""
    generator = torch.Generator(device).manual_seed(seed * 1000 + number)

    def matrix(rows: int, columns: int, std: float) -> Tensor:
        empty = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        return empty.normal_(0, std, generator=generator).cpu()

    hidden, inner, keys = config.hidden_size, config.intermediate_size, config.hidden_size // 4
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    if number == 0:
        return {"model.embed_tokens.weight": matrix(config.vocab_size, hidden, 1.0)}
    if number > config.num_hidden_layers:
        return {"model.norm.weight": ones, "lm_head.weight": matrix(config.vocab_size, hidden, hidden**-0.5)}
    rows = {
        "self_attn.q_proj": hidden,
        "self_attn.k_proj": keys,
        "self_attn.v_proj": keys,
        "self_attn.o_proj": hidden,
        "mlp.gate_proj": inner,
        "mlp.up_proj": inner,
    }
    block = {f"{name}.weight": matrix(count, hidden, hidden**-0.5) for name, count in rows.items()}
    block |= {"mlp.down_proj.weight": matrix(hidden, inner, inner**-0.5)}
    block |= {f"{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
    return {f"model.layers.{number - 1}.{name}": tensor for name, tensor in block.items()}


def make(folder: Path, blocks: int, width: float, vocabulary: int, seed: int = 0, device: str = "cpu") -> None:
    """Write the checkpoint. Random numbers are drawn on ``device``; at most ``MAX_THREADS`` shards are in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    config = make_config(blocks, width, vocabulary)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resource_root() / "experiments" / "models" / "tiny").save_pretrained(folder)
    files: dict[str, str] = {}

    def write(number: int) -> int:
        tensors = make_shard(config, number, seed, device)
        name = f"model-{number + 1:05d}-of-{blocks + 2:05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        files.update(dict.fromkeys(tensors, name))
        return sum(tensor.nbytes for tensor in tensors.values())

    with concurrent.futures.ThreadPoolExecutor(min(MAX_THREADS, machine.cores())) as pool:
        size = sum(pool.map(write, range(blocks + 2)))
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2))


def main() -> None:
    """Make the model of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=float, default=1.0, help="factor on all sizes of the 8B shape")
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    make(arguments.folder, arguments.blocks, arguments.width, arguments.vocabulary, arguments.seed, arguments.device)


if __name__ == "__main__":
    main()
