"""The results of one job as a table on the terminal."""

from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from matquant.report import formatting
from matquant.report.results import ALLOCATION, Results, datasets, normalized, parents, task_scores


def print_table(results: Results, console: Console) -> None:
    """Print full precision and every slice: width, size, perplexity, KL and tasks; then what it cost, and the warnings.

    Everything stands in one table where the console is wide enough, else in one per dataset and one of the tasks.
    """
    results = normalized(results)
    names, tasks = datasets(results), _task_names(results)
    title = " ".join([results["model"], results["method"], *(["on", *names] if len(names) == 1 else [])])
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
    cost = formatting.cost(results, parents(results))
    console.print(Text(f"{cost} MB: what a runtime reads for the quantized layers. KL: nats per token.", style="dim"))
    for warning in results["warnings"]:
        console.print(Text(f"warning: {warning}", style="yellow"))


def _slices_table(results: dict[str, Any], names: list[str], tasks: list[str]) -> Table:
    table = Table(header_style="bold")
    suffix = (lambda name: f"\n{name}") if len(names) > 1 else (lambda name: "")
    headers = ["bits", "avg", "MB"]
    headers += [f"perplexity{suffix(n)}" for n in names] + [f"KL{suffix(n)}" for n in names] + tasks
    for header in headers:
        table.add_column(Text(header), justify="right", no_wrap=len(names) < 2)
    table.add_row(*_row({"bits": "full"} | results["baseline"], names, tasks), end_section=True)
    for entry in results["slices"]:
        table.add_row(*_row(entry, names, tasks))
    return table


def _row(entry: dict[str, Any], names: list[str], tasks: list[str]) -> list[Text]:
    scores = task_scores(entry)
    cells = [str(entry["bits"]), formatting.average_bits(entry.get("average_bits"))]
    cells.append(formatting.megabytes(entry.get("bytes")))
    cells += [formatting.perplexity(entry.get("perplexity", {}).get(name)) for name in names]
    cells += [formatting.significant(entry.get("kl", {}).get(name)) for name in names]
    cells += [formatting.score(scores.get(task)) for task in tasks]
    return [Text(cell) for cell in cells]


def _tasks_table(results: dict[str, Any], tasks: list[str]) -> Table:
    """One row per task, because there may be many, and never more than a handful of widths."""
    entries = [{"bits": "full"} | results["baseline"], *results["slices"]]
    table = Table(header_style="bold")
    table.add_column("task")
    for entry in entries:
        table.add_column(Text(str(entry["bits"]).replace(ALLOCATION, "alloc.")), justify="right")
    for task in tasks:
        table.add_row(Text(task), *(Text(formatting.score(task_scores(entry).get(task))) for entry in entries))
    return table


def _task_names(results: dict[str, Any]) -> list[str]:
    entries = [results["baseline"], *results["slices"]]
    return list(dict.fromkeys(task for entry in entries for task in task_scores(entry)))


def _fits(table: Table, console: Console) -> bool:
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width
