"""Candidates per second: layers changed in memory, against reading the layers that change from disk for each candidate.

    python experiments/benchmarks/bench_reload.py                 # the shipped model
    python experiments/benchmarks/bench_reload.py --blocks 4      # random blocks of the shape of an 8B Llama, for a GPU
    python experiments/benchmarks/bench_reload.py --blocks 4 --tokens 1024 2048        # these rows alone

Both measure the same children of one parent on the same tokens and must find the same losses. The reference does what the
published search does: one file with the dense weight for every layer and width; for each candidate it loads the files of
the layers whose width changes into the model, and runs the whole model window by window against kept logits. Files are
read once before, so that they come from the system's cache and not from a disk.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import torch
from compare_searches import Bench
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, LlamaConfig

from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.models.blocks import BlockModel
from matquant.report.provenance import provenance
from matquant.search.allocation_problem import Budget, Layer, exact, make_problem
from matquant.search.evaluator import open_evaluator
from matquant.search.layer_forwards import DecodedSlices, PlaneSlices
from matquant.search.mutation import breed, switch_levels

WIDTHS = (2, 3, 4, 6, 8)  # those that MatGPTQ's search chooses from
GROUP_SIZE = 128

# Windows, their length, and the candidates that are measured on them: the stages of a generation as published, and fewer tokens
# before (the first stage of hybrid has 1024). The shipped model takes no more than 512.
PUBLISHED = ((1, 2048, 64), (8, 2048, 16), (64, 2048, 5))
STAGES_8B = ((1, 512, 64), (1, 1024, 64), *PUBLISHED)
STAGES_SHIPPED = ((1, 32, 64), (1, 256, 64), (4, 512, 32))


def shipped(device: torch.device) -> tuple[BlockModel, dict[str, NestedWeight], torch.Tensor]:
    """The shipped model, its parent's layers, and text."""
    bench = Bench()
    codes = {n: w for i in range(len(bench.parent.blocks)) for n, w in bench.parent.block(i).items()}
    return bench.blocks, codes, bench.evaluation


def random_8b(blocks: int, device: torch.device) -> tuple[BlockModel, dict[str, NestedWeight], torch.Tensor]:
    """Some blocks of the shape of Llama-3-8B with random weights, rounded to nearest; and random text."""
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
    return model, {n: rounded(layer.weight) for n, layer in layers.items()}, torch.randint(32000, (64, 2048))


def rounded(weight: torch.Tensor) -> NestedWeight:
    """Codes of 8 bits to the nearest, a scale for each group."""
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


class Reloading:
    """One model whose layers are read from disk as their widths change, as the published code does."""

    def __init__(self, blocks: BlockModel, codes: dict[str, NestedWeight], dtype: torch.dtype, folder: Path) -> None:
        self.model, self.codes, self.dtype, self.folder = blocks.model, codes, dtype, folder
        self.layers = {n: m for i in range(len(blocks)) for n, m in blocks.linears(i).items()}

    def write(self, candidates: list[dict[str, int]]) -> None:
        """The files that these candidates need, which are in the system's cache then."""
        for name, bits in {pair for widths in candidates for pair in widths.items()}:
            if not self._file(name, bits).exists():
                save_file({"weight": self.codes[name].dequantize(bits, self.dtype)}, self._file(name, bits))
                load_file(self._file(name, bits))

    def measure(
        self, parent: dict[str, int], children: list[dict[str, int]], windows: torch.Tensor
    ) -> tuple[float, list[float]]:
        """Seconds for each child, and the children's losses. The model is as before afterwards."""
        own = {name: p.data for name, p in self.model.named_parameters()}
        self.model.to(self.dtype)
        with torch.no_grad():
            targets = [self._logits(window) for window in windows]
            self._load(parent, {})
            start = time.perf_counter()
            losses = []
            for child, before in zip(children, [parent, *children], strict=False):
                self._load(child, before)
                losses.append(self._loss(windows, targets))
            seconds = time.perf_counter() - start
        for name, parameter in self.model.named_parameters():
            parameter.data = own[name]
        return seconds / len(children), losses

    def _file(self, name: str, bits: int) -> Path:
        return self.folder / f"{name}-{bits}.safetensors"

    def _load(self, widths: dict[str, int], before: dict[str, int]) -> None:
        for name, bits in widths.items():
            if before.get(name) != bits:
                weight = self.layers[name].weight
                weight.data = load_file(self._file(name, bits), device=str(weight.device))["weight"]

    def _logits(self, window: torch.Tensor) -> torch.Tensor:
        return self.model(window[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)

    def _loss(self, windows: torch.Tensor, targets: list[torch.Tensor]) -> float:
        total = torch.zeros((), dtype=torch.float64, device=windows.device)
        for window, target in zip(windows, targets, strict=True):
            total += kl_div(self._logits(window), target, log_target=True, reduction="sum")
        return float(total / (windows.numel() - len(windows)))


def in_memory(blocks, problem, slices, children, windows, batch_tokens, device) -> tuple[float, list[float]]:
    """Seconds for each candidate by the evaluator, and its losses."""
    batch = max(1, batch_tokens // windows.shape[1])
    with open_evaluator(
        blocks, problem.units, slices, windows, batch_size=batch, fitness="kl", top_k=1, device=device
    ) as evaluator:
        evaluator.losses(children, evaluator.everything())  # a search meets each slice many times
        start = time.perf_counter()
        losses = evaluator.losses(children, evaluator.everything())
        return (time.perf_counter() - start) / len(children), losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=0, help="of the shape of an 8B Llama; 0 for the shipped model")
    parser.add_argument("--tokens", type=int, nargs="+", help="rows to measure; all when not given")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="that go through the model at a time in memory")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    blocks, codes, text = random_8b(arguments.blocks, device) if arguments.blocks else shipped(device)
    if device.type == "cuda":
        blocks.model.to(device)
        text = text.to(device)
    index_of = {name: i for i in range(len(blocks)) for name in blocks.linears(i)}
    layers = [Layer(name=n, block=index_of[n], parameters=w.codes.numel(), bytes={}) for n, w in codes.items()]
    problem = make_problem(layers, WIDTHS, Budget(kind="average_bits", value=exact(3)))
    parent = (3,) * len(problem.units)
    serving = {"decoded": DecodedSlices(codes, device, dtype, 32 * 10**9)}
    if device.type == "cuda":
        serving["planes"] = PlaneSlices(codes, device, dtype)
    stages = STAGES_8B if arguments.blocks else STAGES_SHIPPED
    if arguments.tokens:
        stages = [stage for stage in stages if stage[0] * stage[1] in arguments.tokens]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        reloading = Reloading(blocks, codes, dtype, Path(folder))
        for count, length, candidates in stages:
            windows = text[:count, :length].contiguous()
            children = breed(problem, parent, candidates, random.Random(0), switch_levels)
            widths = [problem.layer_widths(candidate) for candidate in (parent, *children)]
            reloading.write(widths)
            slow, expected = reloading.measure(widths[0], widths[1:], windows)
            row = {"tokens": count * length, "candidates": candidates, "reloading": slow}
            for name, slices in serving.items():
                row[name], found = in_memory(blocks, problem, slices, children, windows, arguments.batch_tokens, device)
                worst = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
                assert worst < (1e-3 if dtype == torch.float32 else 3e-2), worst
            rows.append(row)
            times = ", ".join(f"{name} {1 / row[name]:.1f} ({slow / row[name]:.1f} times)" for name in serving)
            print(f"{row['tokens']} tokens: reloading {1 / slow:.1f} candidates/s, {times}", flush=True)
    if set(PUBLISHED) <= set(stages):
        generation = [row for row in rows if row["tokens"] in {count * length for count, length, _ in PUBLISHED}]
        for name in serving:
            slow, fast = (sum(row[key] * row["candidates"] for row in generation) for key in ("reloading", name))
            print(f"a generation as published, {name}: {slow / fast:.2f} times", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
