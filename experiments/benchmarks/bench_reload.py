"""Candidates per second: layers that change their bit-width in memory, against weights that are read from files.

    python experiments/benchmarks/bench_reload.py                 # the shipped model
    python experiments/benchmarks/bench_reload.py --blocks 4      # random blocks of the shape of an 8B Llama, for a GPU
    python experiments/benchmarks/bench_reload.py --blocks 4 --tokens 1024 2048        # these rows only

Both evaluate the same children of one parent on the same tokens and must find the same losses. The reference works like
the search that MatGPTQ publishes: one file per layer and bit-width with the dense weight. For each candidate it loads
the files of the layers whose bit-width changes, and runs the whole model on one sequence at a time against stored
logits. All files are read once before the measurement, so that they come from the page cache, not from the disk.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parent))
from search_bench import Bench

from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.models.blocks import BlockModel
from matquant.report.provenance import provenance
from matquant.search.allocation_problem import Budget, LayerCost, decimal_fraction, make_problem
from matquant.search.evaluator import EvaluatorConfig, open_evaluator
from matquant.search.fitness.kl_divergence import KlDivergence
from matquant.search.layer_forwards import DenseLayerForwards, PlaneLayerForwards
from matquant.search.mutation import make_offspring, switch_levels

BITS = (2, 3, 4, 6, 8)  # choices of MatGPTQ's search
GROUP_SIZE = 128

# Sequences, tokens per sequence, and candidates. PUBLISHED has the stages of a published generation; the rows before it
# have fewer tokens (the first stage of search=hybrid has 1024). The shipped model has a context of 512 tokens.
PUBLISHED = ((1, 2048, 64), (8, 2048, 16), (64, 2048, 5))
STAGES_8B = ((1, 512, 64), (1, 1024, 64), *PUBLISHED)
STAGES_SHIPPED = ((1, 32, 64), (1, 256, 64), (4, 512, 32))


def shipped(device: torch.device) -> tuple[BlockModel, dict[str, NestedWeight], torch.Tensor]:
    """Shipped model, nested weights of its parent by layer name, and sequences."""
    bench = Bench()
    return bench.blocks, bench.weights, bench.evaluation


def random_8b(blocks: int, device: torch.device) -> tuple[BlockModel, dict[str, NestedWeight], torch.Tensor]:
    """Some blocks of the shape of Llama-3-8B with random weights, their nested weights by layer name, and random sequences."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=blocks,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        torch.set_default_dtype(torch.float16)
        model = BlockModel(AutoModelForCausalLM.from_config(config).eval().requires_grad_(False))
        torch.set_default_dtype(torch.float32)
    layers = {n: layer for i in range(blocks) for n, layer in model.linears(i).items()}
    return model, {n: round_to_nearest(layer.weight) for n, layer in layers.items()}, torch.randint(32000, (64, 2048))


def round_to_nearest(weight: torch.Tensor) -> NestedWeight:
    """Nested weight with the nearest 8-bit codes and one scale per group."""
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // GROUP_SIZE, GROUP_SIZE)
    scales = (groups.abs().amax(-1) / 127).half()
    codes = (groups / scales.float()[..., None] + 127.5).round().clamp(0, 255).to(torch.uint8).view(rows, columns)
    return NestedWeight(
        codes=codes,
        scales=scales,
        zeros=None,
        format=WeightFormat(master_bits=8, slicing="msb", group_size=GROUP_SIZE, scale_dtype=scales.dtype),
    )


class ReloadingModel:
    """Model whose layers are loaded from files when their bit-width changes, as in MatGPTQ's code."""

    def __init__(self, blocks: BlockModel, weights: dict[str, NestedWeight], dtype: torch.dtype, folder: Path) -> None:
        self.model, self.weights, self.dtype, self.folder = blocks.model, weights, dtype, folder
        self.layers = {n: m for i in range(len(blocks)) for n, m in blocks.linears(i).items()}

    def write(self, candidates: list[dict[str, int]]) -> None:
        """Write the files of these candidates and read them once, so that they are in the page cache."""
        for name, bits in {pair for layer_bits in candidates for pair in layer_bits.items()}:
            if not self._file(name, bits).exists():
                save_file({"weight": self.weights[name].dequantize(bits, self.dtype)}, self._file(name, bits))
                load_file(self._file(name, bits))

    def measure(
        self, parent: dict[str, int], children: list[dict[str, int]], sequences: torch.Tensor
    ) -> tuple[float, list[float]]:
        """Return the seconds per child and the losses of the children; restore the model's weights."""
        own = {name: p.data for name, p in self.model.named_parameters()}
        self.model.to(self.dtype)
        with torch.no_grad():
            targets = [self._log_probabilities(sequence) for sequence in sequences]
            self._load(parent, {})
            start = time.perf_counter()
            losses = []
            for child, before in zip(children, [parent, *children], strict=False):
                self._load(child, before)
                losses.append(self._loss(sequences, targets))
            seconds = time.perf_counter() - start
        for name, parameter in self.model.named_parameters():
            parameter.data = own[name]
        return seconds / len(children), losses

    def _file(self, name: str, bits: int) -> Path:
        return self.folder / f"{name}-{bits}.safetensors"

    def _load(self, layer_bits: dict[str, int], before: dict[str, int]) -> None:
        for name, bits in layer_bits.items():
            if before.get(name) != bits:
                weight = self.layers[name].weight
                weight.data = load_file(self._file(name, bits), device=str(weight.device))["weight"]

    def _log_probabilities(self, sequence: torch.Tensor) -> torch.Tensor:
        return self.model(sequence[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)

    def _loss(self, sequences: torch.Tensor, targets: list[torch.Tensor]) -> float:
        total = torch.zeros((), dtype=torch.float64, device=sequences.device)
        for sequence, target in zip(sequences, targets, strict=True):
            total += kl_div(self._log_probabilities(sequence), target, log_target=True, reduction="sum")
        return float(total / (sequences.numel() - len(sequences)))


def measure_in_memory(
    blocks, problem, layer_forwards, children, sequences, batch_tokens, device
) -> tuple[float, list[float]]:
    """Seconds per candidate with the evaluator, and the losses."""
    batch_size = max(1, batch_tokens // sequences.shape[1])
    config = EvaluatorConfig(fitness=KlDivergence(), batch_size=batch_size, device=device)
    with open_evaluator(blocks, problem.units, layer_forwards, sequences, config) as evaluator:
        evaluator.losses(children, evaluator.all_tokens())  # fills the cache of dense weights
        start = time.perf_counter()
        losses = evaluator.losses(children, evaluator.all_tokens())
        return (time.perf_counter() - start) / len(children), losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--blocks", type=int, default=0, help="number of blocks of the shape of an 8B Llama; 0: shipped model"
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="rows to measure; default: all")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens per forward pass in memory")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    blocks, weights, text = random_8b(arguments.blocks, device) if arguments.blocks else shipped(device)
    if device.type == "cuda":
        blocks.model.to(device)
        text = text.to(device)
    block_of = {name: i for i in range(len(blocks)) for name in blocks.linears(i)}
    layers = [
        LayerCost(name=n, block=block_of[n], parameters=w.codes.numel(), bytes_read={}) for n, w in weights.items()
    ]
    problem = make_problem(layers, BITS, Budget(kind="average_bits", value=decimal_fraction(3)))
    parent = (3,) * len(problem.units)
    layer_forwards = {"dense": DenseLayerForwards(weights, device, dtype, 32 * 10**9)}
    if device.type == "cuda":
        layer_forwards["planes"] = PlaneLayerForwards(weights, device, dtype)
    stages = STAGES_8B if arguments.blocks else STAGES_SHIPPED
    if arguments.tokens:
        stages = [stage for stage in stages if stage[0] * stage[1] in arguments.tokens]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        reloading = ReloadingModel(blocks, weights, dtype, Path(folder))
        for count, length, candidates in stages:
            sequences = text[:count, :length].contiguous()
            children = make_offspring(problem, parent, candidates, random.Random(0), switch_levels)
            layer_bits = [problem.layer_bits(candidate) for candidate in (parent, *children)]
            reloading.write(layer_bits)
            slow, expected = reloading.measure(layer_bits[0], layer_bits[1:], sequences)
            row = {"tokens": count * length, "candidates": candidates, "reloading": slow}
            for name, forwards in layer_forwards.items():
                row[name], found = measure_in_memory(
                    blocks, problem, forwards, children, sequences, arguments.batch_tokens, device
                )
                worst = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
                assert worst < (1e-3 if dtype == torch.float32 else 3e-2), worst
            rows.append(row)
            times = ", ".join(f"{name} {1 / row[name]:.1f} ({slow / row[name]:.1f} times)" for name in layer_forwards)
            print(f"{row['tokens']} tokens: reloading {1 / slow:.1f} candidates/s, {times}", flush=True)
    if set(PUBLISHED) <= set(stages):
        generation = [row for row in rows if row["tokens"] in {count * length for count, length, _ in PUBLISHED}]
        for name in layer_forwards:
            slow, fast = (sum(row[key] * row["candidates"] for row in generation) for key in ("reloading", name))
            print(f"published generation, {name}: {slow / fast:.2f} times", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
