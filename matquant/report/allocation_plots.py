"""A search's part of a report: its front, its generations, and the widths that it gave."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matquant.report import formatting
from matquant.report.drawing import INK, MUTED, PAPER, SERIES, log_ticks, styled
from matquant.report.heatmap import _in_block, _label_cells, _new_figure, _projections
from matquant.report.results import ALLOCATION, is_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = "cividis"  # told apart by colour-blind readers; every cell holds its number too
_WIDEST = 24  # blocks whose cells leave room for a number


def allocations(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The slices that have a width for each layer."""
    return [entry for entry in results["slices"] if entry["bits"] == ALLOCATION and "allocation" in entry]


def widths_figure(entry: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """The widths of one allocation: blocks across, projections down, a number in each cell. None without layers."""
    widths = entry["allocation"].get("widths") or {}
    names = _projections(layers)
    layers = [row for row in layers if row["name"] in names]
    cells = {(row["block"], names[row["name"]]): widths[row["name"]] for row in layers if row["name"] in widths}
    if not cells:
        return None
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    rows = sorted(dict.fromkeys(name for _, name in cells), key=_in_block)
    columns = sorted({block for block, _ in cells})
    with styled():
        figure, axes, bar = _new_figure(rows)
        bar.remove()
        for (block, name), bits in cells.items():
            x, y = columns.index(block), rows.index(name)
            colour = colormaps[_COLOURS]((bits - 2) / 6)
            tip = f"tip:block {block}, {name}: {bits} bits"
            axes.add_patch(
                Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor=PAPER, linewidth=0.8, gid=tip)
            )
            if len(columns) <= _WIDEST:
                ink = INK if bits > 4 else "#fffffe"  # on light cells and on dark ones, whatever the page's colours
                axes.text(x, y, str(bits), ha="center", va="center", fontsize=8, color=ink)
        _label_cells(axes, columns, rows)
    return figure


def generations_figure(search: Mapping[str, Any]) -> "Figure | None":
    """The fittest candidate's loss after each generation, over the tokens that were measured; a line for each budget."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for entry in search.get("history") or []:
        if is_number(entry.get("loss")) and entry["loss"] > 0:
            points = lines.setdefault(entry["budget"], [])
            points.append(((points[-1][0] if points else 0) + entry["tokens"] / 1000, entry["loss"]))
    if not lines:
        return None
    from matplotlib.figure import Figure

    values = [y for points in lines.values() for _, y in points]
    with styled():
        figure = Figure(figsize=(5.0, 3.3), layout="constrained")
        axes = figure.add_subplot()
        for index, (budget, points) in enumerate(lines.items()):
            colour = SERIES[index % len(SERIES)]
            axes.plot(*zip(*points, strict=True), color=colour, marker=".", label=budget)
            if len(lines) > 1:
                axes.annotate(budget, points[-1], xytext=(4, 0), textcoords="offset points", fontsize=7, color=MUTED)
        axes.set_xlabel("tokens measured (thousands)")
        axes.set_ylabel(f"{search.get('fitness', 'loss')} on the last stage's tokens")
        low, high = min(values), max(values)
        if high > 1.5 * low:
            axes.set_yscale("log")
            log_ticks(axes.yaxis, low, high)
    return figure


def front_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """For each allocation: its file, average bits, MB, and the losses that the search predicted and measured."""
    return [
        [
            str(entry.get("name", "")),
            formatting.average_bits(entry.get("average_bits")),
            formatting.megabytes(entry.get("bytes")),
            formatting.significant(entry["allocation"].get("predicted")),
            formatting.significant(entry["allocation"].get("measured")),
        ]
        for entry in allocations(results)
    ]
