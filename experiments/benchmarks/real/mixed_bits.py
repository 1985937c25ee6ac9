"""Refined slices where they are read in practice: among layers of other bit-widths, after a prefill at 8 bits, and as drafts.

    python run.py model.path=MODEL.gguf ... pack=nested pack.path=ONE_SHOT                  # as in benchmark.py
    python run.py model.path=MODEL.gguf ... refine=scales pack=nested pack.path=REFINED
    python experiments/benchmarks/real/mixed_bits.py MODEL.gguf one_shot=ONE_SHOT scales=REFINED

A refinement trains the scales of a bit-width in a model whose layers all have that bit-width. Each parent is measured in
float32 on the texts of ``benchmark.py``, with dequantized weights of all bit-widths in memory. A record has the keys model,
parent, text, case, bits, kl (to the full-precision model), acceptance, commit, machine and date. Cases:

    alone           all layers at ``bits``
    among 8         half of the layers at ``bits``, drawn anew for each of three draws, the others at 8
    among others    the same, the others each at 2, 3, 4, 6 or 8, drawn too
    after itself    the second half of each window, after a first half at ``bits`` too
    after 8         the same tokens, after a first half at 8 bits whose cache is kept; ``acceptance`` is then the probability
                    that the slice of 8 bits accepts a token drawn at ``bits``: the mean of sum(min(p8, p))

Writes mixed_bits/MODEL.json beside the records of ``benchmark.py``, and prints a table of the ratios to the first parent.
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from acceptance import keep_dequantized
from benchmark import TEXTS, open_reference, origin, texts_of
from torch import Tensor
from transformers import AutoModelForCausalLM

import matquant  # noqa: F401 - registers the quantizer of packed folders
from matquant.data.texts import windows
from matquant.inference import nested_layers
from matquant.store import Store

WIDTHS = (2, 3, 4, 6, 8)
HIGH = 8
DRAWS = 3
BATCH = 4

Logits = Callable[[Tensor], Tensor]  # from ids [windows, tokens] to log-probabilities [windows, positions, vocabulary]


def draw(names: Sequence[str], bits: int, others: Sequence[int], seed: int) -> dict[str, int]:
    """Bit-width of each layer: half of them, chosen by the seed, at ``bits``, and each of the rest at one of ``others``."""
    generator = random.Random(seed)
    chosen = set(generator.sample(list(names), len(names) // 2))
    return {name: bits if name in chosen else generator.choice(others) for name in names}


def reader(model: Any, bits: int | dict[str, int]) -> Logits:
    """Log-probabilities of all tokens at these bit-widths."""

    def read(ids: Tensor) -> Tensor:
        model.set_bits(bits)
        return log_probabilities(model(ids, use_cache=False))

    return read


def second_half(model: Any, first: int, bits: int) -> Logits:
    """Log-probabilities of the second half, after a first half at ``first`` bits whose cache is kept."""

    def read(ids: Tensor) -> Tensor:
        middle = ids.shape[1] // 2
        model.set_bits(first)
        cache = model(ids[:, :middle], use_cache=True).past_key_values
        model.set_bits(bits)
        return log_probabilities(model(ids[:, middle:], past_key_values=cache, use_cache=True))

    return read


def log_probabilities(output: Any) -> Tensor:
    return output.logits.float().log_softmax(-1)


@torch.inference_mode()
def mean_kl(exact: Logits, others: Sequence[Logits], ids: Tensor) -> list[float]:
    """Mean KL(exact || other) over the positions that both return, in nats, for each of ``others``."""
    sums, count = [0.0] * len(others), 0
    for batch in ids.split(BATCH):
        reference = exact(batch)
        count += reference.shape[0] * reference.shape[1]
        for place, other in enumerate(others):
            sums[place] += (reference.exp() * (reference - other(batch))).sum().item()
    return [total / count for total in sums]


@torch.inference_mode()
def mean_acceptance(target: Logits, drafts: Logits, ids: Tensor) -> float:
    """Mean probability that the target accepts a token that is drawn from the draft's distribution."""
    kept = [torch.minimum(target(batch), drafts(batch)).exp().sum(-1).flatten() for batch in ids.split(BATCH)]
    return torch.cat(kept).mean().item()


def measure(exact: Any, model: Any, ids: Tensor, widths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One record for each case and bit-width."""
    names = list(nested_layers(model))

    def full(batch: Tensor) -> Tensor:
        return log_probabilities(exact(batch, use_cache=False))

    def last(batch: Tensor) -> Tensor:
        return full(batch)[:, batch.shape[1] // 2 :]

    def drawn(others: Sequence[int]) -> list[Logits]:
        return [reader(model, draw(names, bits, others, seed)) for seed in range(DRAWS)]

    for bits in widths:
        alone, *among = mean_kl(full, [reader(model, bits), *drawn([HIGH]), *drawn(WIDTHS)], ids)
        itself, after = mean_kl(last, [second_half(model, bits, bits), second_half(model, HIGH, bits)], ids)
        accepted = mean_acceptance(second_half(model, HIGH, HIGH), second_half(model, HIGH, bits), ids)
        found = {"alone": alone, "among 8": statistics.mean(among[:DRAWS])}
        found |= {"among others": statistics.mean(among[DRAWS:]), "after itself": itself, "after 8": after}
        for case, kl in found.items():
            yield {"case": case, "bits": bits, "kl": kl, "acceptance": accepted if case == "after 8" else None}


def table(records: Sequence[dict[str, Any]]) -> str:
    """KL of the first parent, the ratio of each other one to it, and acceptances, by text, case and bit-width."""
    parents = list(dict.fromkeys(record["parent"] for record in records))
    head = " ".join(f"{name:>12}" for name in parents)
    lines = [f"{'text':>7} {'case':>13} {'bits':>4} {head}  acceptance of each"]
    keyed = {(r["parent"], r["text"], r["case"], r["bits"]): r for r in records}
    for parent, *key in keyed:
        if parent == parents[0]:
            found = [keyed[one, *key] for one in parents]
            ratios = " ".join(f"{one['kl'] / found[0]['kl']:>12.3f}" for one in found[1:])
            accepted = " ".join(f"{one['acceptance']:.3f}" for one in found if one["acceptance"] is not None)
            line = f"{key[0]:>7} {key[1]:>13} {key[2]:>4} {found[0]['kl']:>12.4g} {ratios}  {accepted}"
            lines.append(line.rstrip())
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line names, and write the records after each parent and text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("parents", nargs="+", metavar="NAME=FOLDER", help="folders that were packed with pack=nested")
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4], choices=WIDTHS)
    parser.add_argument(
        "--texts", nargs="+", choices=TEXTS, default=list(TEXTS), help="default: all that the model has"
    )
    parser.add_argument("--windows", type=int, default=16, help="windows of each text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/real"))
    given = parser.parse_args()
    if wrong := [
        one for one in given.parents if "=" not in one or not Path(one.partition("=")[2], "config.json").exists()
    ]:
        parser.error(f"{wrong[0]} is no NAME=FOLDER of a packed folder")
    if len({one.partition("=")[0] for one in given.parents}) < len(given.parents):
        parser.error("two parents have the same name")
    exact, tokenizer, store = open_reference(given.model, given.device)
    if not set(given.texts) & texts_of(tokenizer).keys():
        parser.error(
            f"{given.model.name} has none of the texts {', '.join(given.texts)}: its tokenizer has no chat template"
        )
    file = given.out / "mixed_bits" / f"{given.model.stem}.json"
    print(table(run(given, exact, tokenizer, store, file)))


def run(given: argparse.Namespace, exact: Any, tokenizer: Any, store: Store, file: Path) -> list[dict[str, Any]]:
    """Records of all parents, which are also written to the file."""
    records: list[dict[str, Any]] = []
    for name, _, folder in (parent.partition("=") for parent in given.parents):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(given.device).eval()
        keep_dequantized(model, WIDTHS)
        for text, config in texts_of(tokenizer).items():
            if text not in given.texts:
                continue
            ids = windows(config, "evaluation", tokenizer, store)[: given.windows].to(given.device)
            about = {"model": given.model.stem, "parent": name, "text": text}
            records += [about | row | origin() for row in measure(exact, model, ids, given.bits)]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(records, indent=1, allow_nan=False) + "\n")
        del model
    return records


if __name__ == "__main__":
    main()
