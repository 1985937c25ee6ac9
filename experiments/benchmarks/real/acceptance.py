"""Acceptance rate of self-speculative decoding on a real model, by the bit-width that drafts.

    python experiments/benchmarks/real/acceptance.py FOLDER --out experiments/results/serving/acceptance.json
    python experiments/benchmarks/real/acceptance.py FOLDER --device cuda --dtype float16 --drafts 2 3 4 --tokens 2 4 8

FOLDER is a packed folder (``pack=nested``) of an instruction model. Each prompt is continued greedily and by sampling at
temperature 1, with ``matquant.speculate``. A record has the keys draft, target, tokens (drafts a round), text (``source`` or
``prose``), sampling, drafted, accepted, acceptance_rate, tokens_per_round, and on a GPU seconds and plain_seconds, of the same
tokens with and without drafts.

On a CPU the dequantized weights of both bit-widths are kept, because the CPU operator dequantizes at every call. The tokens are
the same up to rounding, and speed is not measured.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import matquant
from matquant.inference import NestedLinear, nested_layers
from matquant.report.provenance import provenance

PROMPTS = {
    "source": (
        "import json\nfrom pathlib import Path\n\n\ndef read_records(path: Path) -> list[dict]:\n",
        "class Queue:\n    def __init__(self) -> None:\n        self.items = []\n\n    def push(self, item) -> None:\n",
    ),
    "prose": (
        "Explain in a few sentences why the sky is blue.",
        "Write a short letter that asks a landlord to repair a heating.",
    ),
}


def keep_dequantized(model: Any, widths: Sequence[int]) -> None:
    """Let each nested layer multiply with dequantized weights that are kept for these bit-widths."""
    for layer in nested_layers(model).values():
        dense = {bits: layer.nested_planes().dequantize(bits, torch.float32) for bits in widths}

        def forward(x: Tensor, layer: NestedLinear = layer, dense: dict[int, Tensor] = dense) -> Tensor:
            return F.linear(x, dense[layer.phase_bits()], layer.bias)

        layer.forward = forward


def encode(tokenizer: Any, text: str, kind: str) -> Tensor:
    """Token ids [1, length] of a prompt; prose is a question to the assistant."""
    if kind == "prose":
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    return tokenizer(text, return_tensors="pt")["input_ids"]


def measure(
    model: Any, prompts: Sequence[Tensor], settings: dict[str, Any], draft: int, target: int, tokens: int
) -> dict[str, Any]:
    """Acceptance over all prompts, and on a GPU the seconds."""
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    with matquant.speculate(model, draft=draft, target=target, tokens=tokens, adaptive=False) as speculation:
        seconds = generate_all(model, prompts, settings)
        found |= {"drafted": speculation.drafted, "accepted": speculation.accepted}
        found["acceptance_rate"] = round(speculation.acceptance_rate, 4)
        found["tokens_per_round"] = round(1 + speculation.accepted / speculation.rounds, 3)
    if model.device.type == "cuda":
        model.set_bits(target)
        found |= {"seconds": round(seconds, 3), "plain_seconds": round(generate_all(model, prompts, settings), 3)}
    return found


def generate_all(model: Any, prompts: Sequence[Tensor], settings: dict[str, Any]) -> float:
    """Continue all prompts, and return the seconds."""
    start = time.perf_counter()
    for prompt in prompts:
        model.generate(prompt.to(model.device), pad_token_id=0, **settings)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Measure what the command line names, and write the records after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--drafts", nargs="+", type=int, default=[2, 3, 4, 6])
    parser.add_argument("--target", type=int, default=8)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4], help="drafts a round")
    parser.add_argument("--length", type=int, default=48, help="new tokens for each prompt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/serving/acceptance.json"))
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=getattr(torch, given.dtype)).to(given.device)
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    records = []
    for draft, tokens in itertools.product(given.drafts, given.tokens):
        if given.device == "cpu":
            keep_dequantized(model, [draft, given.target])
        for sampling, (kind, texts) in itertools.product((False, True), PROMPTS.items()):
            settings = {
                "max_new_tokens": given.length,
                "min_new_tokens": given.length,
                "do_sample": sampling,
                "top_k": 0,
            }
            if sampling:
                settings |= {"temperature": 1.0, "top_p": 1.0}
            else:
                settings |= {"temperature": None, "top_p": None, "top_k": None}
            prompts = [encode(tokenizer, text, kind) for text in texts]
            about = {"draft": draft, "target": given.target, "tokens": tokens, "text": kind, "sampling": sampling}
            records.append(about | measure(model, prompts, settings, draft, given.target, tokens))
            print(records[-1], flush=True)
            given.out.parent.mkdir(parents=True, exist_ok=True)
            content = {"provenance": provenance(), "model": given.folder.name, "dtype": given.dtype, "records": records}
            given.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
