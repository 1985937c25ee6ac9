"""Hybrid search against evolution on the shipped model: with equal tokens, and with the published settings.

    python experiments/search/compare.py --jobs 8                                # five seeds, four budgets; for a GPU
    python experiments/search/compare.py --jobs 8 --seeds 0 --published 1        # the published settings alone, one seed
    python experiments/search/compare.py --jobs 8 --published 1 --seconds 240    # ends in good time, and goes on the next time

Searches on windows of the calibration split and measures on the evaluation split, which no search has seen. Each search is
written as it ends, and what the file has for the same parent is not done again. One that --seconds cuts off goes on where it
stopped: the store has its generations.
"""

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from matquant.pipeline import Job, compute

from matquant import cli
from matquant.config import Config, from_hydra
from matquant.data import texts
from matquant.formats.parent import Parent
from matquant.models.blocks import BlockModel, compute_dtype
from matquant.models.loading import load
from matquant.paths import resource_root
from matquant.search.config import SearchConfig
from matquant.search.evaluator import open_evaluator
from matquant.search.layer_forwards import DecodedSlices
from matquant.search.stage import problems, search
from matquant.search.strategies import Setting
from matquant.store import Artifact, Draft, Store
from matquant.store.artifact import read_artifact

HERE = Path(__file__).parent
BUDGETS = (2.5, 3.0, 3.5, 4.5)
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
# 1.7 million tokens in all; evolution ends with the generation in which it has measured as many.
TEXT = ("search.sequences=256", "search.batch_size=64", "search.serve=decoded")
HYBRID = ("search=hybrid", "search.sensitivity_tokens=4096", "search.generations=20", "search.tokens=[2048,8192]")
EVOLVE = (
    "search=evolve",
    "search.generations=10000",
    "search.offspring=16",
    "search.survivors=[4,1]",
    "search.tokens=[256,2048]",
    "search.initial_tokens=8192",
)
# As MatGPTQ publishes it, but for windows of 512 tokens, the shipped model's longest, and for the widths: as many tokens.
PUBLISHED_TEXT = ("search.sequences=256", "search.sequence_length=512", "search.batch_size=128", "search.serve=decoded")
PUBLISHED = ("search=evopress", "search.widths=[2,3,4,5,6,7,8]")
# A tenth of the evaluations that those settings take.
TENTH = ("search=hybrid", "search.sensitivity_tokens=16384", "search.generations=90", "search.tokens=[2048,16384]")

EQUAL_TOKENS = "evolve, equal tokens"
# The longest first, so that none of them is left over at the end.
OF_PUBLISHED = {"evolve, published": (*PUBLISHED, *PUBLISHED_TEXT), "hybrid, a tenth": (*TENTH, *PUBLISHED_TEXT)}
METHODS = {"hybrid": (*HYBRID, *TEXT), EQUAL_TOKENS: (*EVOLVE, *TEXT)} | OF_PUBLISHED
_PROGRESS = 25  # generations between two lines on a search


class OutOfTime(Exception):
    """Ends a search after a generation that the store has."""


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One search."""

    seed: int
    budget: float
    method: str

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}, {self.budget} bits"


class WatchedDraft:
    """The draft of a search; ``watch`` is told the name of each part after it was written."""

    def __init__(self, draft: Draft, watch: Callable[[str], None]) -> None:
        self.has, self.read_json = draft.has, draft.read_json
        self.draft, self.watch = draft, watch

    def write_json(self, name: str, value: Any) -> None:
        self.draft.write_json(name, value)
        self.watch(name)


class WatchedStore(Store):
    """A store whose searches are watched."""

    def __init__(self, path: Path, watch: Callable[[str], None]) -> None:
        super().__init__(path)
        self.watch = watch

    def open_or_build(self, kind: str, inputs: Mapping[str, Any], build: Callable[[Any], dict[str, Any]]) -> Artifact:
        return super().open_or_build(kind, inputs, lambda draft: build(WatchedDraft(draft, self.watch)))


def config_of(*overrides: str) -> Config:
    cli.register()
    with initialize_config_dir(str(resource_root() / "conf"), version_base="1.3"):
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
        self.store = Path(config.store.path)
        self.blocks, self.parent, self.loaded = open_parent(config)
        self.text = config.calibration
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = compute_dtype(self.loaded.dtype, self.device)
        text = dataclasses.replace(config.eval.datasets["stdlib"], sequences=16)
        self.evaluation = texts.windows(text, "evaluation", self.loaded.tokenizer)

    def find(self, overrides: tuple[str, ...], watch: Callable[[str], None]) -> dict[str, Any]:
        """One search: its allocation as widths of units, and what it spent; its speed since it last went on.

        Raises what ``watch`` raises.
        """
        wanted: SearchConfig = config_of(*overrides).search
        text = dataclasses.replace(
            self.text, sequences=wanted.sequences, sequence_length=wanted.sequence_length, seed=1 + wanted.seed
        )
        windows = texts.windows(text, "calibration", self.loaded.tokenizer)
        setting = Setting(blocks=self.blocks, parent=self.parent, windows=windows, device=self.device, dtype=self.dtype)
        outcome = search(wanted, setting, WatchedStore(self.store, watch), lambda _: None)
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
            Setting(
                blocks=self.blocks, parent=self.parent, windows=self.evaluation, device=self.device, dtype=self.dtype
            ),
        )[0].units
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


@functools.cache
def bench() -> Bench:
    """One for all searches of a process."""
    return Bench()


def watcher(task: Task, deadline: float) -> Callable[[str], None]:
    """Says how far a search is, and ends it after the deadline."""
    start = time.monotonic()

    def watch(name: str) -> None:
        _, is_generation, number = name.removesuffix(".json").partition("-generation-")
        if is_generation and int(number) % _PROGRESS == 0:
            print(f"  {task}: generation {int(number)}, {time.monotonic() - start:.0f} s", flush=True)
        if is_generation and time.time() > deadline:
            raise OutOfTime

    return watch


def run(task: Task, tokens: int | None, deadline: float) -> dict[str, Any] | None:
    """One search with its KL; None if the time was over before it ended.

    Args:
        tokens: after which it ends, if it counts them.
        deadline: in seconds since the epoch.
    """
    if time.time() > deadline:
        return None
    limit = () if tokens is None else (f"search.max_tokens={tokens}",)
    overrides = (*METHODS[task.method], f"search.average_bits={task.budget}", f"search.seed={task.seed}", *limit)
    try:
        found = bench().find(overrides, watcher(task, deadline))
    except OutOfTime:
        return None
    (kl,) = bench().measure([found["candidate"]])
    return {"method": task.method, "budget": task.budget, "seed": task.seed, "kl": kl} | found


class Results:
    """The file of results: what was measured for one parent."""

    def __init__(self, path: Path, parent: str) -> None:
        self.path, self.parent = path, parent
        known = json.loads(path.read_text()) if path.exists() else {"parent": parent}
        if known["parent"] != parent:
            raise SystemExit(f"{path} has results for another parent ({known['parent'][:12]}). Give another --output.")
        self.uniform = {int(bits): kl for bits, kl in known.get("uniform", {}).items()}
        self.rows: list[dict[str, Any]] = known.get("rows", [])

    def of(self, task: Task) -> dict[str, Any] | None:
        wanted = dataclasses.asdict(task).items()
        return next((row for row in self.rows if wanted <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.rows.sort(key=lambda row: (row["method"], row["budget"], row["seed"]))
        self.write()

    def write(self) -> None:
        text = json.dumps({"parent": self.parent, "uniform": self.uniform, "rows": self.rows})
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(text.replace(', {"method"', ',\n{"method"') + "\n")
        partial.replace(self.path)


def wanted(seeds: int, published: int, budgets: list[float]) -> list[list[Task]]:
    """The searches in two rounds: the second one needs what the first has found."""
    first = [Task(seed, bits, method) for seed in range(published) for method in OF_PUBLISHED for bits in budgets]
    first += [Task(seed, bits, "hybrid") for seed in range(seeds) for bits in budgets]
    return [first, [Task(seed, bits, EQUAL_TOKENS) for seed in range(seeds) for bits in budgets]]


def measure(tasks: list[Task], results: Results, pool: ProcessPoolExecutor, deadline: float) -> int:
    """Do a round of searches, except those that are there; the number of those that are still missing."""
    start, running = time.monotonic(), {}
    for task in tasks:
        before = results.of(dataclasses.replace(task, method="hybrid")) if task.method == EQUAL_TOKENS else None
        if results.of(task) is None and (before is not None or task.method != EQUAL_TOKENS):
            running[pool.submit(run, task, before and before["tokens"], deadline)] = task
    for future in as_completed(running):
        try:
            row = future.result()
        except Exception as error:  # of one search; the others stand
            print(f"{running[future]} failed: {error!r}", flush=True)
            continue
        if row is not None:
            results.add(row)
            print(f"{running[future]}: KL {row['kl']:.5f} after {time.monotonic() - start:.0f} s", flush=True)
    return sum(results.of(task) is None for task in tasks)


def begin(threads: int, numbers: "multiprocessing.Queue[int]") -> None:
    """Make a process ready: its share of the cores, and the next of the GPUs."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(numbers.get() % torch.cuda.device_count())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="for equal tokens")
    parser.add_argument("--published", type=int, default=0, help="seeds for the published settings")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS), help="average bits")
    parser.add_argument("--jobs", type=int, default=1, help="searches at a time")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which every search stops")
    parser.add_argument("--output", type=Path, default=HERE / "results.json")
    arguments = parser.parse_args()
    deadline = time.time() + arguments.seconds
    results = Results(arguments.output, bench().parent.artifact.sha256)
    if not results.uniform:
        results.uniform = dict(zip(WIDTHS, bench().measure([[b] * 42 for b in WIDTHS]), strict=True))
        results.write()
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    spawn = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
    numbers = spawn.Queue()
    for number in range(arguments.jobs):
        numbers.put(number)
    rounds = wanted(arguments.seeds, arguments.published, arguments.budgets)
    with ProcessPoolExecutor(arguments.jobs, spawn, begin, (threads, numbers)) as pool:
        missing = sum(measure(tasks, results, pool, deadline) for tasks in rounds)
    if results.rows:
        print(table(results.rows, results.uniform), flush=True)
    if missing:
        raise SystemExit(f"{missing} searches are missing. The same command goes on with them.")


if __name__ == "__main__":
    main()
