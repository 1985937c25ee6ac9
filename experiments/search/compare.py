"""Hybrid search against evolution on the shipped model, with equal tokens and with equal settings to those published.

    python experiments/search/compare.py                          # five seeds, four budgets
    python experiments/search/compare.py --seeds 1 --published    # also evolution at a sixty-fourth of the published tokens

Searches on windows of the calibration split and measures on the evaluation split, which no search has seen. What is finished
is kept in the store and in results.json, so that a killed run goes on from there.
"""

import argparse
import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from matquant import cli
from matquant.config import Config, from_hydra
from matquant.data import texts
from matquant.home import home
from matquant.models.blocks import BlockModel, compute_dtype
from matquant.models.load import load
from matquant.pipeline import Job, compute
from matquant.quantize.parent import Parent
from matquant.search.evaluator import open_evaluator
from matquant.search.running import Setting
from matquant.search.settings import SearchConfig
from matquant.search.slices import DecodedSlices
from matquant.search.stage import problems, search
from matquant.store import Store
from matquant.store.artifact import read_artifact

HERE = Path(__file__).parent
BUDGETS = (2.5, 3.0, 3.5, 4.5)
WIDTHS = "search.widths=[2,3,4,6,8]"  # those that MatGPTQ's search chooses from
TEXT = ("search.sequences=32", "search.sequence_length=256")
HYBRID = ("search=hybrid", WIDTHS, *TEXT, "search.sensitivity_tokens=256", "search.generations=6",
          "search.offspring=10", "search.tokens=[256,1024]")  # fmt: skip
EVOLVE = ("search=evolve", WIDTHS, *TEXT, "search.generations=10000", "search.initial_tokens=1024",
          "search.offspring=16", "search.survivors=[4,1]", "search.tokens=[128,1024]")  # fmt: skip
# The published generations, offspring and survivors; tokens of every stage divided by 64, for a CPU.
PUBLISHED = ("search=evopress", "search.tokens=[32,256,2048]", "search.initial_tokens=8192", "search.sequences=64",
             "search.sequence_length=256", "search.batch_size=8")  # fmt: skip


def config_of(*overrides: str) -> Config:
    cli.register()
    with initialize_config_dir(str(home() / "conf"), version_base="1.3"):
        return from_hydra(compose("config", list(overrides)))


def open_parent(config: Config) -> tuple[BlockModel, Parent, Any]:
    """The shipped model and its parent, which is made if the store has none."""
    job = Job(folder=Path(), command="", name="", group=None, resolved={})
    found = compute(dataclasses.replace(config, stages=("quantize",)), job)["parent"]
    loaded = load(config.model)
    return BlockModel(loaded.model), Parent(read_artifact(Path(found["path"]))), loaded


class Bench:
    """Searches and measures on one model."""

    def __init__(self) -> None:
        config = config_of("tracking=none")
        self.store = Store(Path(config.store.path))
        self.blocks, self.parent, self.loaded = open_parent(config)
        self.text = config.calibration
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = compute_dtype(self.loaded.dtype, self.device)
        text = dataclasses.replace(config.eval.datasets["stdlib"], sequences=16)
        self.evaluation = texts.windows(text, "evaluation", self.loaded.tokenizer)

    def find(self, *overrides: str) -> dict[str, Any]:
        """One search: its allocation as widths of units, and what it spent."""
        wanted: SearchConfig = config_of(*overrides).search
        text = dataclasses.replace(
            self.text, sequences=wanted.sequences, sequence_length=wanted.sequence_length, seed=1 + wanted.seed
        )
        windows = texts.windows(text, "calibration", self.loaded.tokenizer)
        setting = Setting(blocks=self.blocks, parent=self.parent, windows=windows, device=self.device, dtype=self.dtype)
        outcome = search(wanted, setting, self.store, lambda _: None)
        widths = outcome.allocations[0].widths
        units = problems(wanted, setting)[0].units
        record = outcome.record
        return {
            "candidate": [widths[unit.layers[0]] for unit in units],
            "average_bits": outcome.allocations[0].average_bits,
            **{key: record.get(key) for key in ("evaluations", "tokens", "seconds", "evaluations_per_second")},
        }

    def measure(self, candidates: list[list[int]]) -> list[float]:
        """KL on the evaluation split."""
        units = problems(
            config_of("search=hybrid", "search.average_bits=8").search,
            Setting(blocks=self.blocks, parent=self.parent, windows=self.evaluation, device=self.device, dtype=self.dtype),
        )[0].units  # fmt: skip
        codes = {n: w for i in range(len(self.parent.blocks)) for n, w in self.parent.block(i).items()}
        slices = DecodedSlices(codes, self.device, self.dtype, 4 * 10**9)
        with open_evaluator(
            self.blocks, units, slices, self.evaluation, batch_size=8, fitness="kl", top_k=1, device=self.device
        ) as evaluator:
            return evaluator.losses([tuple(c) for c in candidates], evaluator.everything())


def interpolated(uniform: dict[int, float], bits: float) -> float:
    """KL between two uniform slices, on a log scale: what no search would have to beat."""
    below, above = max(b for b in uniform if b <= bits), min(b for b in uniform if b >= bits)
    if below == above:
        return uniform[below]
    share = (bits - below) / (above - below)
    return math.exp((1 - share) * math.log(uniform[below]) + share * math.log(uniform[above]))


def table(rows: list[dict[str, Any]], uniform: dict[int, float]) -> str:
    """KL per budget, mean and standard deviation over seeds, as Markdown."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [f"| average bits | uniform, interpolated | {' | '.join(methods)} |", "|---|---|" + "---|" * len(methods)]
    for bits in BUDGETS:
        cells = [f"{interpolated(uniform, bits):.4f}"]
        for method in methods:
            values = [row["kl"] for row in rows if row["method"] == method and row["budget"] == bits]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.4f}{spread} ({len(values)})" if values else "-")
        lines.append(f"| {bits} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--published", action="store_true", help="also evolution with the published generations")
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    arguments = parser.parse_args()
    bench = Bench()
    uniform = dict(zip((2, 3, 4, 6, 8), bench.measure([[b] * 42 for b in (2, 3, 4, 6, 8)]), strict=True))
    rows: list[dict[str, Any]] = []
    start = time.time()
    for seed in range(arguments.seeds):
        found = []
        for bits in BUDGETS:
            budget = (f"search.average_bits={bits}", f"search.seed={seed}")
            hybrid = bench.find(*HYBRID, *budget)
            found.append({"method": "hybrid"} | hybrid | {"budget": bits, "seed": seed})
            evolve = bench.find(*EVOLVE, *budget, f"search.max_tokens={hybrid['tokens']}")
            found.append({"method": "evolve, equal tokens"} | evolve | {"budget": bits, "seed": seed})
            if arguments.published:
                found.append(
                    {"method": "evolve, published"} | bench.find(*PUBLISHED, *budget) | {"budget": bits, "seed": seed}
                )
            print(f"seed {seed}, {bits} bits: {time.time() - start:.0f} s", flush=True)
        for row, kl in zip(found, bench.measure([row["candidate"] for row in found]), strict=True):
            rows.append(row | {"kl": kl})
        arguments.output.write_text(json.dumps({"uniform": uniform, "rows": rows}, indent=1) + "\n")
        print(table(rows, uniform), flush=True)


if __name__ == "__main__":
    main()
