"""Comparison of a sweep's jobs on the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from matquant import number_format
from matquant.report.results import ALLOCATION, SliceResult
from matquant.report.sweep import DONE, FAILED, SweepJob, dataset_names, varying_overrides


def print_summary(jobs: Sequence[SweepJob], path: Path, console: Console) -> None:
    """Print a table per dataset with a row per job (method, overrides, KL by bits); then the failures and ``path``."""
    for name in dataset_names(jobs) or [""]:
        console.print(Text(f"KL on {name}, nats per token" if name else "jobs", style="bold"))
        console.print(_table(jobs, name))
    failed = [job for job in jobs if job.status == FAILED]
    for job in failed:
        console.print(Text(f"job {job.name} failed: {job.error}", style="red"))
    console.print(Text(f"{len(jobs) - len(failed)} of {len(jobs)} jobs done."))
    console.print(Text(f"summary: {path}"), soft_wrap=True)  # one line, so that the path can be copied


def _table(jobs: Sequence[SweepJob], dataset: str) -> Table:
    # The method has its own column.
    overrides = [
        [o for o in given if o != f"method={j.method}"] for j, given in zip(jobs, varying_overrides(jobs), strict=True)
    ]
    bits = _bits(jobs)
    single = all(len(job.results.slices) <= 1 for job in jobs if job.results)
    # Narrow enough for 80 columns: no lines between columns, and at most two blanks.
    table = Table(header_style="bold", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for header in ("job", "method", "overrides"):
        table.add_column(header, overflow="fold")
    for header in ["bits", "KL", "perplexity"] if single else bits:
        table.add_column(Text(header.replace(ALLOCATION, "alloc.")), justify="right", no_wrap=True)
    for job, given in zip(jobs, overrides, strict=True):
        first = [job.name, job.method, " ".join(given) if job.status == DONE else " ".join([*given, "FAILED"])]
        cells = _single_cells(job, dataset) if single else _kl_cells(job, dataset, bits)
        table.add_row(*(Text(cell) for cell in first + cells), style=None if job.status == DONE else "red")
    return table


def _bits(jobs: Sequence[SweepJob]) -> list[str]:
    found = {one.bits for job in jobs for one in _slices(job)}
    uniform = sorted(bits for bits in found if isinstance(bits, int))
    return [str(bits) for bits in uniform] + [ALLOCATION] * (ALLOCATION in found)


def _kl_cells(job: SweepJob, dataset: str, bits: Sequence[str]) -> list[str]:
    kl = {str(one.bits): one.kl.get(dataset) for one in _slices(job)}
    return [number_format.significant(kl.get(name)) for name in bits]


def _single_cells(job: SweepJob, dataset: str) -> list[str]:
    one = next(iter(_slices(job)), None)
    if one is None:
        return [number_format.MISSING] * 3
    kl, perplexity = one.kl.get(dataset), one.perplexity.get(dataset)
    return [str(one.bits), number_format.significant(kl), number_format.perplexity(perplexity)]


def _slices(job: SweepJob) -> Sequence[SliceResult]:
    return job.results.slices if job.results else ()
