"""Curves of a job or a sweep: KL and perplexity over bits, KL over size."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from matquant import number_format
from matquant.report.drawing import MUTED, PAPER, SERIES, log_ticks, styled
from matquant.report.results import JobResults, SliceResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))
_MAX_LABEL = 44


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: (x, y) of the uniform slices and of the allocations, and the value of full precision."""

    name: str
    points: tuple[tuple[float, float], ...]
    allocations: tuple[tuple[float, float], ...] = ()
    full: float | None = None

    @property
    def values(self) -> list[float]:
        """All y values."""
        return [y for _, y in self.points + self.allocations]


def series(
    name: str, slices: Sequence[SliceResult], x: str, measure: str, dataset: str, full: float | None = None
) -> Series:
    """Curve of ``measure`` (``kl`` or ``perplexity``) of slices on ``dataset`` over ``x`` (``bits`` or ``bytes``).

    Slices without that figure are left out; of two slices with the same bits the later one counts.
    """
    uniform: dict[float, float] = {}
    allocations: list[tuple[float, float]] = []
    for one in slices:
        value = one.figure(measure, dataset)
        if value is None or (x == "bytes" and one.bytes is None):
            continue
        position = one.position if x == "bits" else (one.bytes or 0) / 1e6
        if one.is_allocation:
            allocations.append((position, value))
        else:
            uniform[position] = value
    return Series(name, tuple(sorted(uniform.items())), tuple(sorted(allocations)), full)


def job_figures(results: JobResults) -> dict[str, "Figure"]:
    """Draw KL and perplexity over bits, and KL over size; figures without a point are left out."""
    names = results.datasets
    label: Callable[[str], str] = (lambda name: name) if len(names) > 1 else (lambda name: results.method)
    full = results.baseline.perplexity

    def lines(x: str, measure: str) -> list[Series]:
        return [series(label(name), results.slices, x, measure, name, full.get(name)) for name in names]

    figures = {
        "kl_bits": kl_figure(lines("bits", "kl"), "bits"),
        "perplexity_bits": perplexity_figure(lines("bits", "perplexity")),
        "kl_bytes": kl_figure(lines("bytes", "kl"), "bytes"),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def kl_figure(lines: Sequence[Series], x: str) -> "Figure | None":
    """Draw KL(full ‖ slice) over ``bits`` or ``bytes`` on a log scale; None without a positive KL."""
    lines = [_only_positive(line) for line in lines]
    values = [y for line in lines for y in line.values]
    if not values:
        return None
    with styled():
        figure, axes = _new_figure()
        _draw_lines(axes, lines)
        _label_x(axes, x, lines)
        _log_y(axes, values)
        axes.set_ylabel("KL to full precision (nats per token)")
        _legend(figure, axes, lines)
    return figure


def perplexity_figure(lines: Sequence[Series]) -> "Figure | None":
    """Draw perplexity over bits, with a dashed line for full precision; None without a figure."""
    lines = [_only_positive(line) for line in lines]
    values = [y for line in lines for y in line.values]
    if not values:
        return None
    full = {line.full for line in lines if line.full is not None and line.full > 0}
    with styled():
        figure, axes = _new_figure()
        _draw_full(axes, lines, full)
        _draw_lines(axes, lines)
        _label_x(axes, "bits", lines)
        values += full
        if max(values) > 2.5 * min(values):
            _log_y(axes, values)
        axes.set_ylabel("perplexity")
        axes.margins(y=0.1)
        _legend(figure, axes, lines)
    return figure


def ratio_figure(lines: Sequence[Series]) -> "Figure | None":
    """Draw KL at each bit-width relative to the lowest of all curves, which a log axis over decades hides.

    None unless two curves share a bit-width.
    """
    lines = [replace(_only_positive(line), allocations=()) for line in lines]
    best: dict[float, float] = {}
    for line in lines:
        best |= {x: min(y, best.get(x, y)) for x, y in line.points}
    relative = [replace(line, points=tuple((x, y / best[x]) for x, y in line.points)) for line in lines]
    values = [y for line in relative for y in line.values]
    if len(values) <= len(best):
        return None
    with styled():
        figure, axes = _new_figure()
        axes.axhline(1, color=MUTED, linewidth=1.1, zorder=1.5)
        _draw_lines(axes, relative)
        _label_x(axes, "bits", relative)
        if max(values) > 4:
            _log_y(axes, values)
        axes.set_ylabel("KL / lowest KL at these bits")
        _legend(figure, axes, relative)
    return figure


def _draw_full(axes: "Axes", lines: Sequence[Series], full: set[float]) -> None:
    """Draw full precision: one grey line with its value if all curves share it, else a line in each curve's colour."""
    dashes = (0, (4, 3))
    if len(full) != 1:
        for index, line in enumerate(lines):
            if line.full in full:
                axes.axhline(line.full, color=SERIES[index % len(SERIES)], linewidth=1.1, linestyle=dashes, zorder=1.5)
        return
    value = next(iter(full))
    axes.axhline(value, color=MUTED, linewidth=1.1, linestyle=dashes, zorder=1.5)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "xytext": (4, -3)}
    text = f"full precision {number_format.perplexity(value)}"
    axes.annotate(text, (0, value), ha="left", va="top", fontsize=8.5, color=MUTED, **place)


def _new_figure() -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 3.3), layout="constrained")
    return figure, figure.add_subplot()


def _draw_lines(axes: "Axes", lines: Sequence[Series]) -> None:
    for index, line in enumerate(lines):
        colour, marker = SERIES[index % len(SERIES)], _MARKERS[index % len(_MARKERS)]
        dashes = _DASHES[index // len(SERIES) % len(_DASHES)]
        edge: dict[str, Any] = {"markeredgecolor": PAPER, "markeredgewidth": 0.8, "color": colour}
        axes.plot(*_columns(line.points), linestyle=dashes, marker=marker, label=_label(line.name), zorder=3, **edge)
        axes.plot(*_columns(line.allocations), linestyle="none", marker="*", markersize=11, zorder=4, **edge)
    axes.grid(axis="x", visible=False)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _label_x(axes: "Axes", x: str, lines: Sequence[Series]) -> None:
    if x == "bytes":
        axes.set_xlabel("quantized layers read by a runtime (MB)")
        axes.set_xlim(left=0)
        return
    axes.set_xlabel("bits per weight")
    positions = [p for line in lines for p, _ in line.points + line.allocations]
    ticks = range(math.floor(min(positions)), math.ceil(max(positions)) + 1)
    axes.set_xticks(list(ticks))
    axes.set_xlim(ticks[0] - 0.4, ticks[-1] + 0.4)


def _log_y(axes: "Axes", values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    axes.set_yscale("log")
    if high < 1.1 * low:
        low, high = low / 1.5, high * 1.5
        axes.set_ylim(low, high)
    log_ticks(axes.yaxis, low, high)


def _legend(figure: "Figure", axes: "Axes", lines: Sequence[Series]) -> None:
    """Draw the legend below the axes; the figure grows with it, so that the plot keeps its height."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    if any(line.allocations for line in lines):
        handles.append(Line2D([], [], linestyle="none", marker="*", markersize=9, color=MUTED))
        labels.append("allocation")
    if len(labels) < 2:
        return
    longest = max(map(len, labels))
    columns = min(1 if longest > 26 else 2 if longest > 14 else 3, len(labels))
    figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.5)


def _label(name: str) -> str:
    """Cut a name to the width of the legend; a leading underscore would hide it from matplotlib's legend."""
    name = name if len(name) <= _MAX_LABEL else name[: _MAX_LABEL - 1] + "…"
    return f" {name}" if name.startswith("_") else name


def _only_positive(line: Series) -> Series:
    """Drop points that a log axis cannot show: KL of a slice that equals the model is zero up to rounding."""
    points = tuple(p for p in line.points if p[1] > 0)
    return replace(line, points=points, allocations=tuple(p for p in line.allocations if p[1] > 0))
