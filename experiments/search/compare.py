"""Hybrid search against evolution on the shipped model: with equal tokens, and with the published settings.

    python experiments/search/compare.py --jobs 8                  # five seeds, four budgets; for a GPU
    python experiments/search/compare.py --jobs 8 --published 1    # also the published settings, for so many seeds

Searches on windows of the calibration split and measures on the evaluation split, which no search has seen. What results.json
has for the same parent is not done again.
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
from joblib import Parallel, delayed

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
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
# 1.7 million tokens in all; evolution ends with the generation in which it has measured as many.
TEXT = ("search.sequences=256", "search.serve=decoded")
HYBRID = ("search=hybrid", "search.sensitivity_tokens=4096", "search.generations=20", "search.tokens=[2048,8192]")
EVOLVE = (
    "search=evolve", "search.generations=10000", "search.offspring=16", "search.survivors=[4,1]",
    "search.tokens=[256,2048]", "search.initial_tokens=8192",
)  # fmt: skip
# As MatGPTQ publishes it, but for windows of 512 tokens, the shipped model's longest, and for the widths: as many tokens.
PUBLISHED_TEXT = (
    "search.sequences=256", "search.sequence_length=512", "search.batch_size=64", "search.serve=decoded",
)  # fmt: skip
PUBLISHED = ("search=evopress", "search.widths=[2,3,4,5,6,7,8]")
OF_PUBLISHED = ("hybrid, a tenth", "evolve, published")
# A tenth of the evaluations that those settings take.
TENTH = ("search=hybrid", "search.sensitivity_tokens=16384", "search.generations=90", "search.tokens=[2048,16384]")


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
        cells = [f"{interpolated(uniform, bits):.5f}"]
        for method in methods:
            values = [row["kl"] for row in rows if row["method"] == method and row["budget"] == bits]
            spread = f" ± {statistics.stdev(values):.5f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.5f}{spread} ({len(values)})" if values else "-")
        lines.append(f"| {bits} | {' | '.join(cells)} |")
    spent = [statistics.fmean(row["tokens"] for row in rows if row["method"] == method) for method in methods]
    counted = [statistics.fmean(row["evaluations"] for row in rows if row["method"] == method) for method in methods]
    lines.append(f"| tokens | | {' | '.join(f'{tokens / 1e6:.2f} M' for tokens in spent)} |")
    lines.append(f"| evaluations | | {' | '.join(f'{count:.0f}' for count in counted)} |")
    return "\n".join(lines)


def compare(seed: int, bits: float, published: bool) -> list[dict[str, Any]]:
    """Both methods on as many tokens, or the published settings and a tenth of their evaluations; with KL."""
    bench = Bench()
    budget = (f"search.average_bits={bits}", f"search.seed={seed}")
    if published:
        evolve = bench.find(*PUBLISHED, *PUBLISHED_TEXT, *budget)
        found = dict(zip(OF_PUBLISHED, (bench.find(*TENTH, *PUBLISHED_TEXT, *budget), evolve), strict=True))
    else:
        hybrid = bench.find(*HYBRID, *TEXT, *budget)
        evolve = bench.find(*EVOLVE, *TEXT, *budget, f"search.max_tokens={hybrid['tokens']}")
        found = {"hybrid": hybrid, "evolve, equal tokens": evolve}
    losses = bench.measure([entry["candidate"] for entry in found.values()])
    return [
        {"method": method, "budget": bits, "seed": seed, "kl": kl} | entry
        for (method, entry), kl in zip(found.items(), losses, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--published", type=int, default=0, help="seeds for the published settings")
    parser.add_argument("--jobs", type=int, default=1, help="searches at a time")
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    arguments = parser.parse_args()
    bench = Bench()
    uniform = dict(zip(WIDTHS, bench.measure([[b] * 42 for b in WIDTHS]), strict=True))
    parent = bench.parent.artifact.sha256
    known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    rows: list[dict[str, Any]] = known["rows"] if known.get("parent") == parent else []
    done = {(row["seed"], row["budget"], row["method"] in OF_PUBLISHED) for row in rows}
    tasks = [(seed, bits, True) for seed in range(arguments.published) for bits in BUDGETS]
    tasks += [(seed, bits, False) for seed in range(arguments.seeds) for bits in BUDGETS]
    tasks = [task for task in tasks if task not in done]
    start = time.time()
    running = Parallel(arguments.jobs, return_as="generator_unordered", batch_size=1)
    for found in running(delayed(compare)(*task) for task in tasks):
        rows += found
        rows.sort(key=lambda row: (row["method"], row["budget"], row["seed"]))
        text = json.dumps({"parent": parent, "uniform": uniform, "rows": rows})
        arguments.output.write_text(text.replace(', {"method"', ',\n{"method"') + "\n")
        one = found[0]
        print(f"{one['method']}, seed {one['seed']}, {one['budget']} bits: {time.time() - start:.0f} s", flush=True)
    print(table(rows, uniform), flush=True)


if __name__ == "__main__":
    main()
