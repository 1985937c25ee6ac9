"""Plots of a search: its front, its generations, and bit-width maps of the allocations."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matquant import number_format
from matquant.number_format import is_number
from matquant.report.drawing import INK, MUTED, PAPER, SERIES, log_ticks, styled
from matquant.report.heatmap import label_cells, new_figure, order_in_block, projections
from matquant.report.results import JobResults, LayerErrors, SliceResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = "cividis"  # distinct for colour-blind readers; every cell also shows its number
_WIDEST = 24  # blocks whose cells leave room for a number


def bits_figure(one: SliceResult, layers: Sequence[LayerErrors]) -> "Figure | None":
    """Draw the bit-widths of one allocation: blocks across, projections down, a number in each cell. None without layers."""
    layer_bits, names = one.layer_bits, projections(layers)
    cells = {
        (layer.block, names[layer.name]): layer_bits[layer.name]
        for layer in layers
        if layer.name in names and layer.name in layer_bits and layer.block is not None
    }
    if not cells:
        return None
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    rows = sorted(dict.fromkeys(name for _, name in cells), key=order_in_block)
    columns = sorted({block for block, _ in cells})
    with styled():
        figure, axes, bar = new_figure(rows)
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
        label_cells(axes, columns, rows)
    return figure


def generations_figure(search: Mapping[str, Any]) -> "Figure | None":
    """Draw the loss of the fittest candidate after each generation over the measured tokens, a line per budget."""
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


def front_rows(results: JobResults) -> list[list[str]]:
    """Table rows of the allocations: file, average bits, MB, predicted and measured loss."""
    return [
        [
            one.name or "",
            number_format.average_bits(one.average_bits),
            number_format.megabytes(one.bytes),
            number_format.significant((one.allocation or {}).get("predicted")),
            number_format.significant((one.allocation or {}).get("measured")),
        ]
        for one in results.allocations
    ]
