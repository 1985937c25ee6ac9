"""Evaluations per second: layers changed in memory, against reading the layers that change from disk for each candidate.

    python experiments/search/bench_reload.py                # tokens of 32 to 2048 in one run

Both measure the same children of the same parent on the same tokens and must find the same losses. The reference does what the
published search does: for each candidate it opens the file of every layer whose width changes, decodes the slice, copies it
into the model, and runs the whole model window by window against kept logits.
"""

import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div

sys.path.insert(0, str(Path(__file__).parent))
from compare import Bench, config_of

from matquant.nested import NestedWeight
from matquant.search.evaluator import open_evaluator
from matquant.search.mutation import breed, switch_levels
from matquant.search.running import Setting
from matquant.search.slices import DecodedSlices
from matquant.search.stage import problems

CANDIDATES = 32


class Reloading:
    """One model whose layers are read from disk as their widths change, as the published code does."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.model = bench.blocks.model
        self.layers = {n: m for i in range(len(bench.blocks)) for n, m in bench.blocks.linears(i).items()}
        self.files, self.about = {}, {}
        for index in range(len(bench.parent.blocks)):
            for name, weight in bench.parent.block(index).items():
                self.files[name] = folder / f"{name}.safetensors"
                save_file({"codes": weight.codes.contiguous(), "scales": weight.scales.contiguous()}, self.files[name])
                self.about[name] = (weight.master_bits, weight.slicing, weight.offset)
        self.state = dict.fromkeys(self.layers, 0)

    @torch.no_grad()
    def loss(self, widths: dict[str, int], windows: torch.Tensor, targets: list[torch.Tensor]) -> float:
        for name, bits in widths.items():
            if self.state[name] != bits:
                stored = load_file(self.files[name])
                master, slicing, offset = self.about[name]
                weight = NestedWeight(**stored, zeros=None, master_bits=master, slicing=slicing, offset=offset)
                self.layers[name].weight.data = weight.decode(bits)
                self.state[name] = bits
        total = torch.zeros((), dtype=torch.float64)
        for window, target in zip(windows, targets, strict=True):
            logits = self.model(window[None], use_cache=False).logits[0, :-1].log_softmax(-1)
            total += kl_div(logits, target, log_target=True, reduction="sum")
        return float(total / (windows.numel() - len(windows)))


def main() -> None:
    bench = Bench()
    config = config_of("search=hybrid", "search.average_bits=3", "search.widths=[2,3,4,6,8]").search
    print("| tokens | reloading, evaluations/s | in memory | times |\n|---|---|---|---|")
    for count, length in ((1, 32), (1, 128), (1, 512), (4, 512)):
        windows = bench.evaluation[:count, :length].contiguous()
        setting = Setting(
            blocks=bench.blocks, parent=bench.parent, windows=windows, device=bench.device, dtype=bench.dtype
        )
        (problem,) = problems(config, setting)
        parent = (3,) * len(problem.units)
        children = breed(problem, parent, CANDIDATES, random.Random(0), switch_levels)
        codes = {n: w for i in range(len(bench.parent.blocks)) for n, w in bench.parent.block(i).items()}
        slices = DecodedSlices(codes, bench.device, bench.dtype, 4 * 10**9)
        with open_evaluator(
            bench.blocks, problem.units, slices, windows, batch_size=8, fitness="kl", top_k=1, device=bench.device
        ) as evaluator:
            evaluator.losses(children, evaluator.everything())  # a search meets each slice many times
            start = time.perf_counter()
            found = evaluator.losses(children, evaluator.everything())
            fast = CANDIDATES / (time.perf_counter() - start)
        slow, expected = reloaded(bench, problem, children, windows)
        assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-5)
        print(f"| {count * length} | {slow:.1f} | {fast:.1f} | {fast / slow:.1f} |", flush=True)


def reloaded(bench: Bench, problem, children, windows) -> tuple[float, list[float]]:
    """Evaluations a second of the reference, and its losses."""
    own = {name: p.data for name, p in bench.blocks.model.named_parameters()}
    bench.blocks.model.float()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        logits = [bench.blocks.model(w[None], use_cache=False).logits[0, :-1].log_softmax(-1) for w in windows]
        model = Reloading(bench, Path(folder))
        model.loss(problem.layer_widths((3,) * len(problem.units)), windows, logits)
        start = time.perf_counter()
        losses = [model.loss(problem.layer_widths(child), windows, logits) for child in children]
        seconds = time.perf_counter() - start
    for name, parameter in bench.blocks.model.named_parameters():
        parameter.data = own[name]
    return CANDIDATES / seconds, losses


if __name__ == "__main__":
    main()
