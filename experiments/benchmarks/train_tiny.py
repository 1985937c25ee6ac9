"""Train the model that ships in experiments/models/tiny.

    python experiments/benchmarks/train_tiny.py
    python experiments/benchmarks/train_tiny.py --architecture qwen3 --out FOLDER      # a model that nothing is tuned on

A Llama of 5.2 M parameters and its byte-level BPE tokenizer, trained on the source of Python's standard library. One GPU
takes minutes, a CPU a day. Settings were chosen on the calibration split; the evaluation split is only measured.
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout that is not installed

from matquant.data.sources import stdlib  # noqa: E402
from matquant.report.provenance import provenance  # noqa: E402

TINY = ROOT / "experiments" / "models" / "tiny"
TINY_RECORD = ROOT / "experiments" / "results" / "tiny" / "training.json"
CONTEXT = 512
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=CONTEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Token ids of all texts in one row; the end-of-text token follows each text."""
    end = tokenizer.eos_token_id
    ids = [i for text in tokenizer(texts, add_special_tokens=False)["input_ids"] for i in (*text, end)]
    return torch.tensor(ids, dtype=torch.int32)


def build_model(architecture: str, vocabulary: int) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """Untrained Llama of 5.2 M parameters (the shipped model), or Qwen3 of 26 M."""
    common = {
        "vocab_size": vocabulary,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "head_dim": 64,
    }
    if architecture == "qwen3":
        sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
        return Qwen3ForCausalLM(Qwen3Config(**common, **sizes, num_attention_heads=8, num_key_value_heads=4))
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
    return LlamaForCausalLM(LlamaConfig(**common, **sizes, num_attention_heads=4, num_key_value_heads=2))


def add_dropout(model: torch.nn.Module, p: float) -> None:
    """Add dropout to the output of each attention and feed-forward module during training."""

    def drop(module: torch.nn.Module, _inputs: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        if isinstance(output, tuple):
            return (torch.nn.functional.dropout(output[0], p, module.training), *output[1:])
        return torch.nn.functional.dropout(output, p, module.training)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


@torch.no_grad()
def mean_loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Cross-entropy in nats per token over non-overlapping sequences; the first token of each is not predicted."""
    model.eval()
    sequences = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT).long()
    losses = [model(input_ids=batch, labels=batch).loss * len(batch) for batch in sequences.split(32)]
    return float(torch.stack(losses).double().sum() / len(sequences))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 2 % of the steps, then cosine decay to 2 % of the peak."""
    warmup = max(1, steps // 50)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: torch.nn.Module, ids: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace) -> None:
    """Train the model with AdamW; print the losses ten times."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=ids.is_cuda)
    compiled = torch.compile(model) if ids.is_cuda else model
    generator = torch.Generator(device=ids.device).manual_seed(args.seed)
    offsets = torch.arange(CONTEXT, device=ids.device)
    start = time.time()
    for step in range(args.steps):
        compiled.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        begin = torch.randint(len(ids) - CONTEXT, (args.batch, 1), generator=generator, device=ids.device)
        batch = ids[begin + offsets].long()
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            loss = compiled(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, args.steps // 10) == 0:
            held = mean_loss(model, held_out)
            tokens = (step + 1) * batch.numel()
            print(
                f"step {step + 1}: train {loss.item():.4f}, held out {held:.4f} nats/token, "
                f"{tokens / 1e6:.0f} M tokens, {time.time() - start:.0f} s",
                flush=True,
            )


def record(model: torch.nn.Module, splits: dict[str, torch.Tensor], text_bytes: int, seconds: float) -> dict:
    """Record of a trained model, for training.json."""
    loss = mean_loss(model, splits["evaluation"])
    nats_per_byte = loss * len(splits["evaluation"]) / text_bytes
    return {
        "provenance": provenance(),
        "python": platform.python_version(),  # version of the library that is the text, unless --stdlib names another
        "corpus_tokens": {name: len(ids) for name, ids in splits.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds),
        "evaluation": {
            "window": CONTEXT,
            "nats_per_token": round(loss, 4),
            "perplexity": round(math.exp(loss), 4),
            "bits_per_byte": round(nats_per_byte / math.log(2), 4),
        },
    }


def parse_arguments() -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=("llama", "qwen3"), default="llama")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128, help=f"sequences of {CONTEXT} tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stdlib", type=Path, help="folder of another standard library; default: this interpreter's")
    parser.add_argument("--out", type=Path, default=TINY, help="folder of the model")
    return parser.parse_args()


def main() -> None:
    """Train tokenizer and model, and record the evaluation."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = {name: list(stdlib.documents(name, args.stdlib)) for name in stdlib.SPLITS}
    tokenizer = train_tokenizer(texts["train"], args.vocabulary)
    splits = {name: encode(tokenizer, text).to(device) for name, text in texts.items()}
    model = build_model(args.architecture, args.vocabulary).to(device)
    add_dropout(model, args.dropout)

    start = time.time()
    train(model, splits["train"], splits["calibration"], args)
    seconds = time.time() - start

    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    text_bytes = sum(len(text.encode()) for text in texts["evaluation"])
    figures = record(model.float(), splits, text_bytes, seconds)
    recorded = TINY_RECORD if args.out == TINY else args.out / "training.json"
    recorded.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
