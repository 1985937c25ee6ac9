"""Hybrid search against evolution on the shipped model: with equal tokens, and with the published settings.

    python experiments/benchmarks/compare_searches.py --jobs 8                                # five seeds, four budgets; for a
    GPU python experiments/benchmarks/compare_searches.py --jobs 8 --seeds 0 --published 1        # published settings only,
    one seed python experiments/benchmarks/compare_searches.py --jobs 8 --published 1 --seconds 240    # stops early; the next
    run continues

The searches use the calibration split. The KL is measured on the evaluation split, which no search sees. Each result is
written when its search ends. Results that the file has for the same parent are not computed again. A search that
``--seconds`` stops resumes after its last generation, which is in the store.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from search_bench import bench

from matquant.paths import resource_root
from matquant.report.provenance import provenance

RESULTS = resource_root() / "experiments" / "results" / "search"
BUDGETS = (2.5, 3.0, 3.5, 4.5)
BITS = (2, 3, 4, 5, 6, 7, 8)
# 1.7 million tokens in total. Evolution ends with the generation in which it reaches as many.
TEXT = ("search.sequences=256", "search.batch_size=64", "search.layer_forward=dense")
HYBRID = ("search=hybrid", "search.sensitivity_tokens=4096", "search.generations=20", "search.tokens=[2048,8192]")
EVOLVE = (
    "search=evolve",
    "search.generations=10000",
    "search.offspring=16",
    "search.survivors=[4,1]",
    "search.tokens=[256,2048]",
    "search.initial_tokens=8192",
)
# Settings that MatGPTQ publishes, except for sequences of 512 tokens (the context of the shipped model) and for the
# bit-widths. The number of tokens is equal.
PUBLISHED_TEXT = (
    "search.sequences=256",
    "search.sequence_length=512",
    "search.batch_size=128",
    "search.layer_forward=dense",
)
PUBLISHED = ("search=evopress", "search.bits=[2,3,4,5,6,7,8]")
# A tenth of the evaluations of the published settings.
TENTH = ("search=hybrid", "search.sensitivity_tokens=16384", "search.generations=90", "search.tokens=[2048,16384]")

EQUAL_TOKENS = "evolve, equal tokens"
# The longest first, so that no process runs a long search alone at the end.
PUBLISHED_METHODS = {"evolve, published": (*PUBLISHED, *PUBLISHED_TEXT), "hybrid, a tenth": (*TENTH, *PUBLISHED_TEXT)}
METHODS = {"hybrid": (*HYBRID, *TEXT), EQUAL_TOKENS: (*EVOLVE, *TEXT)} | PUBLISHED_METHODS
_LOG_INTERVAL = 25  # generations


class OutOfTime(Exception):
    """End of a search at the deadline; its finished generations are in the store."""


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One search."""

    seed: int
    budget: float
    method: str

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}, {self.budget} bits"


def interpolate_uniform(uniform: dict[int, float], bits: float) -> float:
    """KL between the neighbouring uniform slices, interpolated on a log scale: the baseline without a search."""
    below, above = max(b for b in uniform if b <= bits), min(b for b in uniform if b >= bits)
    if below == above:
        return uniform[below]
    weight = (bits - below) / (above - below)
    return math.exp((1 - weight) * math.log(uniform[below]) + weight * math.log(uniform[above]))


def markdown_table(rows: list[dict[str, Any]], uniform: dict[int, float]) -> str:
    """KL per budget, mean and standard deviation over the seeds, and cost."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [f"| average bits | uniform, interpolated | {' | '.join(methods)} |", "|---|---|" + "---|" * len(methods)]
    for bits in BUDGETS:
        cells = [f"{interpolate_uniform(uniform, bits):.5f}"]
        for method in methods:
            values = [row["kl"] for row in rows if row["method"] == method and row["budget"] == bits]
            deviation = f" ± {statistics.stdev(values):.5f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.5f}{deviation} ({len(values)})" if values else "-")
        lines.append(f"| {bits} | {' | '.join(cells)} |")
    tokens = [statistics.fmean(row["tokens"] for row in rows if row["method"] == method) for method in methods]
    counts = [statistics.fmean(row["evaluations"] for row in rows if row["method"] == method) for method in methods]
    lines.append(f"| tokens | | {' | '.join(f'{count / 1e6:.2f} M' for count in tokens)} |")
    lines.append(f"| evaluations | | {' | '.join(f'{count:.0f}' for count in counts)} |")
    return "\n".join(lines)


def make_watcher(task: Task, deadline: float) -> Callable[[str], None]:
    """Function that prints the progress of a search, and raises OutOfTime after a generation past the deadline."""
    start = time.monotonic()

    def on_write(name: str) -> None:
        _, is_generation, number = name.removesuffix(".json").partition("-generation-")
        if is_generation and int(number) % _LOG_INTERVAL == 0:
            print(f"  {task}: generation {int(number)}, {time.monotonic() - start:.0f} s", flush=True)
        if is_generation and time.time() > deadline:
            raise OutOfTime

    return on_write


def run(task: Task, max_tokens: int | None, deadline: float) -> dict[str, Any] | None:
    """Run one search and measure its KL.

    Args:
        max_tokens: end of the generations; None for all.
        deadline: in seconds since the epoch.

    Returns:
        The row of the results; None if the deadline comes first.
    """
    if time.time() > deadline:
        return None
    limit = () if max_tokens is None else (f"search.max_tokens={max_tokens}",)
    overrides = (*METHODS[task.method], f"search.average_bits={task.budget}", f"search.seed={task.seed}", *limit)
    try:
        found = bench().find(overrides, make_watcher(task, deadline))
    except OutOfTime:
        return None
    (kl,) = bench().measure([found["candidate"]])
    return {"method": task.method, "budget": task.budget, "seed": task.seed, "kl": kl} | found


class Results:
    """Result file of one parent."""

    def __init__(self, path: Path, parent: str) -> None:
        self.path, self.parent = path, parent
        known = json.loads(path.read_text()) if path.exists() else {"parent": parent}
        if known["parent"] != parent:
            raise SystemExit(f"{path} has results for another parent ({known['parent'][:12]}). Give another --output.")
        self.uniform = {int(bits): kl for bits, kl in known.get("uniform", {}).items()}
        self.rows: list[dict[str, Any]] = known.get("rows", [])

    def row_of(self, task: Task) -> dict[str, Any] | None:
        """Row of a search; None if it is missing."""
        items = dataclasses.asdict(task).items()
        return next((row for row in self.rows if items <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and write the file."""
        self.rows.append(row)
        self.rows.sort(key=lambda row: (row["method"], row["budget"], row["seed"]))
        self.write()

    def write(self) -> None:
        """Write the file atomically, one row per line."""
        text = json.dumps(
            {"provenance": provenance(), "parent": self.parent, "uniform": self.uniform, "rows": self.rows}
        )
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(text.replace(', {"method"', ',\n{"method"') + "\n")
        partial.replace(self.path)


def plan_rounds(seeds: int, published: int, budgets: Sequence[float]) -> list[list[Task]]:
    """Searches in two rounds: the second one gets as many tokens as the hybrid searches of the first spend."""
    first = [Task(seed, bits, method) for seed in range(published) for method in PUBLISHED_METHODS for bits in budgets]
    first += [Task(seed, bits, "hybrid") for seed in range(seeds) for bits in budgets]
    return [first, [Task(seed, bits, EQUAL_TOKENS) for seed in range(seeds) for bits in budgets]]


def run_round(tasks: list[Task], results: Results, pool: ProcessPoolExecutor, deadline: float) -> int:
    """Run the searches of a round that have no row yet; return the number of rows that are still missing."""
    start, running = time.monotonic(), {}
    for task in tasks:
        hybrid = results.row_of(dataclasses.replace(task, method="hybrid")) if task.method == EQUAL_TOKENS else None
        if results.row_of(task) is None and (hybrid is not None or task.method != EQUAL_TOKENS):
            running[pool.submit(run, task, hybrid and hybrid["tokens"], deadline)] = task
    for future in as_completed(running):
        try:
            row = future.result()
        except Exception as error:  # one failed search must not end the others
            print(f"{running[future]} failed: {error!r}", flush=True)
            continue
        if row is not None:
            results.add(row)
            print(f"{running[future]}: KL {row['kl']:.5f} after {time.monotonic() - start:.0f} s", flush=True)
    return sum(results.row_of(task) is None for task in tasks)


def init_process(threads: int, indices: "multiprocessing.Queue[int]") -> None:
    """Set the number of threads and the GPU of a worker process."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(indices.get() % torch.cuda.device_count())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds of the comparison with equal tokens")
    parser.add_argument("--published", type=int, default=0, help="seeds of the comparison with the published settings")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS), help="average bits")
    parser.add_argument("--jobs", type=int, default=1, help="parallel searches")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop all searches after this time")
    parser.add_argument("--output", type=Path, default=RESULTS / "results.json")
    arguments = parser.parse_args()
    deadline = time.time() + arguments.seconds
    results = Results(arguments.output, bench().parent.artifact.sha256)
    if not results.uniform:
        layers = len(bench().weights)
        results.uniform = dict(zip(BITS, bench().measure([[bits] * layers for bits in BITS]), strict=True))
        results.write()
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    spawn = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    indices = spawn.Queue()
    for index in range(arguments.jobs):
        indices.put(index)
    rounds = plan_rounds(arguments.seeds, arguments.published, arguments.budgets)
    with ProcessPoolExecutor(arguments.jobs, spawn, init_process, (threads, indices)) as pool:
        missing = sum(run_round(tasks, results, pool, deadline) for tasks in rounds)
    if results.rows:
        print(markdown_table(results.rows, results.uniform), flush=True)
    if missing:
        raise SystemExit(f"{missing} searches are missing. Run the same command again to continue them.")


if __name__ == "__main__":
    main()
