"""The comparison of a sweep's jobs on the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from matquant.report import formatting
from matquant.report.results import ALLOCATION
from matquant.report.sweep import DONE, FAILED, Job, dataset_names, varying_overrides


def print_summary(jobs: Sequence[Job], path: Path, console: Console) -> None:
    """Print a row per job (method, overrides, KL per width), a table per dataset; then failures and ``path``."""
    for name in dataset_names(jobs) or [""]:
        console.print(Text(f"KL on {name}, nats per token" if name else "jobs", style="bold"))
        console.print(_table(jobs, name))
    failed = [job for job in jobs if job.status == FAILED]
    for job in failed:
        console.print(Text(f"job {job.name} failed: {job.error}", style="red"))
    console.print(Text(f"{len(jobs) - len(failed)} of {len(jobs)} jobs done."))
    console.print(Text(f"summary: {path}"), soft_wrap=True)  # a path that is cut cannot be copied


def _table(jobs: Sequence[Job], dataset: str) -> Table:
    # The method has a column of its own.
    overrides = [
        [o for o in given if o != f"method={j.method}"] for j, given in zip(jobs, varying_overrides(jobs), strict=True)
    ]
    widths = _widths(jobs)
    single = all(len(job.results["slices"]) <= 1 for job in jobs if job.results)
    # At 80 columns every letter counts: no lines between columns, and no more than two blanks.
    table = Table(header_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for header in ("job", "method", "overrides"):
        table.add_column(header, overflow="fold")
    for header in ["bits", "KL", "perplexity"] if single else widths:
        table.add_column(Text(header.replace(ALLOCATION, "alloc.")), justify="right", no_wrap=True)
    for job, given in zip(jobs, overrides, strict=True):
        first = [job.name, job.method, " ".join(given) if job.status == DONE else " ".join([*given, "FAILED"])]
        cells = _single_cells(job, dataset) if single else _kl_cells(job, dataset, widths)
        table.add_row(*(Text(cell) for cell in first + cells), style=None if job.status == DONE else "red")
    return table


def _widths(jobs: Sequence[Job]) -> list[str]:
    found = {entry["bits"] for job in jobs if job.results for entry in job.results["slices"]}
    return [str(bits) for bits in sorted(found - {ALLOCATION})] + [ALLOCATION] * (ALLOCATION in found)


def _kl_cells(job: Job, dataset: str, widths: Sequence[str]) -> list[str]:
    slices = {str(entry["bits"]): entry for entry in _slices(job)}
    return [formatting.significant(slices.get(bits, {}).get("kl", {}).get(dataset)) for bits in widths]


def _single_cells(job: Job, dataset: str) -> list[str]:
    entry: dict[str, Any] = next(iter(_slices(job)), {})
    kl, perplexity = entry.get("kl", {}).get(dataset), entry.get("perplexity", {}).get(dataset)
    bits = str(entry.get("bits", formatting.MISSING))
    return [bits, formatting.significant(kl), formatting.perplexity(perplexity)]


def _slices(job: Job) -> list[dict[str, Any]]:
    return list(job.results["slices"]) if job.results else []
