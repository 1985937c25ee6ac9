"""Results of one job as a table on the terminal."""

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from matquant import number_format
from matquant.report.results import (
    ALLOCATION,
    BaselineResult,
    JobResults,
    SliceResult,
    cost_sentence,
    failure_sentence,
    refine_sentence,
    task_scores,
)

Entry = BaselineResult | SliceResult


def print_table(results: JobResults, console: Console) -> None:
    """Print full precision and every slice: bits, size, perplexity, KL and tasks; then the cost and the warnings.

    One table if the console is wide enough, else one per dataset and one of the tasks.
    """
    names, tasks = results.datasets, _task_names(results)
    title = " ".join([results.model, results.method, *(["on", *names] if len(names) == 1 else [])])
    console.print(Text(title, style="bold"))
    table = _slices_table(results, names, tasks)
    if _fits(table, console):
        console.print(table)
    else:
        for name in names:
            console.print(Text(f"on {name}"))
            console.print(_slices_table(results, [name], []))
        if tasks:
            console.print(_tasks_table(results, tasks))
    cost = cost_sentence(results.seconds.get("quantize"), results.parent.stored)
    cost += refine_sentence(results.refine)
    console.print(Text(f"{cost} MB: read by a runtime for the quantized layers. KL: nats per token.", style="dim"))
    if results.failure is not None:
        console.print(Text(failure_sentence(results.failure), style="red"))
    for warning in results.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))


def _slices_table(results: JobResults, names: list[str], tasks: list[str]) -> Table:
    table = Table(header_style="bold")
    suffix = (lambda name: f"\n{name}") if len(names) > 1 else (lambda name: "")
    headers = ["bits", "avg", "MB"]
    headers += [f"perplexity{suffix(n)}" for n in names] + [f"KL{suffix(n)}" for n in names] + tasks
    for header in headers:
        table.add_column(Text(header), justify="right", no_wrap=len(names) < 2)
    table.add_row(*_row(results.baseline, names, tasks), end_section=True)
    for one in results.slices:
        table.add_row(*_row(one, names, tasks))
    return table


def _row(entry: Entry, names: list[str], tasks: list[str]) -> list[Text]:
    scores = task_scores(entry.tasks)
    one = entry if isinstance(entry, SliceResult) else None
    cells = [_bits(entry), number_format.average_bits(one.average_bits if one else None)]
    cells.append(number_format.megabytes(entry.bytes))
    cells += [number_format.perplexity(entry.perplexity.get(name)) for name in names]
    cells += [number_format.significant(one.kl.get(name) if one else None) for name in names]
    cells += [number_format.score(scores.get(task)) for task in tasks]
    return [Text(cell) for cell in cells]


def _bits(entry: Entry) -> str:
    return str(entry.bits) if isinstance(entry, SliceResult) else "full"


def _tasks_table(results: JobResults, tasks: list[str]) -> Table:
    """Table with a row per task: there may be many tasks, but only a few slices."""
    entries: list[Entry] = [results.baseline, *results.slices]
    table = Table(header_style="bold")
    table.add_column("task")
    for entry in entries:
        table.add_column(Text(_bits(entry).replace(ALLOCATION, "alloc.")), justify="right")
    for task in tasks:
        table.add_row(Text(task), *(Text(number_format.score(task_scores(entry.tasks).get(task))) for entry in entries))
    return table


def _task_names(results: JobResults) -> list[str]:
    entries: list[Entry] = [results.baseline, *results.slices]
    return list(dict.fromkeys(task for entry in entries for task in task_scores(entry.tasks)))


def _fits(table: Table, console: Console) -> bool:
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width
