"""Heat maps over the layers: blocks across, projections down."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matquant import number_format
from matquant.number_format import is_number
from matquant.report.drawing import MUTED, PAPER, log_ticks, styled
from matquant.report.results import LayerErrors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = "viridis"
_ORDER = ("qkv", "q", "k", "v", "o", "gate_up", "gate", "up", "down")
_MAX_LABEL = 40  # letters that leave room for the cells


def error_bits(layers: Sequence[LayerErrors]) -> list[str]:
    """Bit-widths that layers have errors for, ascending."""
    return sorted({str(bits) for layer in layers for bits in layer.error}, key=lambda b: (len(b), b))


def layer_figure(layers: Sequence[LayerErrors], bits: str) -> "Figure | None":
    """Draw relative layer errors at one bit-width with log colours; None without a positive error."""
    cells = _cells(layers, bits)
    if not cells:
        return None
    from matplotlib.colors import LogNorm

    rows = sorted(dict.fromkeys(name for _, name in cells), key=order_in_block)
    columns = sorted({block for block, _ in cells})
    low, high = min(cells.values()), max(cells.values())
    if high < 1.05 * low:
        low, high = low / 1.5, high * 1.5  # one colour needs a scale too
    with styled():
        figure, axes, bar_axes = new_figure(rows)
        norm = LogNorm(low, high)
        _draw_cells(axes, cells, columns, rows, norm)
        label_cells(axes, columns, rows)
        _draw_colour_bar(figure, bar_axes, norm)
    return figure


def order_in_block(name: str) -> int:
    """Sort key of a projection: its position in a block; unknown ones are last."""
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def new_figure(rows: Sequence[str]) -> "tuple[Figure, Axes, Axes]":
    """Figure with room for the row names, axes for the cells and axes for the colour bar.

    Positions are computed here: constrained layout would take longer than the rest of a report.
    """
    from matplotlib.figure import Figure

    width, height = 8.6, 0.62 + 0.25 * len(rows)  # inches
    left = (14 + 5.2 * max(map(len, rows))) / 72 / width  # 5.2 points a letter
    bottom, top = 0.5 / height, 1 - 0.08 / height
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left, bottom, 0.895 - left, top - bottom))
    return figure, axes, figure.add_axes((0.905, bottom, 0.014, top - bottom))


def _cells(layers: Sequence[LayerErrors], bits: str) -> dict[tuple[int, str], float]:
    """Map (block, projection) to the relative error; experts of one block are averaged by their parameters."""
    sums: dict[tuple[int, str], tuple[float, float]] = {}
    names = projections(layers)
    for layer in layers:
        value = layer.error.get(bits)
        if layer.name not in names or layer.block is None or not is_number(value) or value <= 0:
            continue
        weight = layer.parameters or 1
        key = (layer.block, names[layer.name])
        total, weights = sums.get(key, (0.0, 0.0))
        sums[key] = (total + weight * value, weights + weight)
    return {key: total / weights for key, (total, weights) in sums.items()}


def projections(layers: Sequence[LayerErrors]) -> dict[str, str]:
    """Map layer names to the part that recurs in every block: the last part if it is unique, else all after the block's number.

    ``model.layers.0.self_attn.q_proj`` is ``q``; ``model.layers.0.mlp.experts.7.down_proj`` is ``mlp experts down`` if
    the blocks have another ``down_proj`` as well.
    """
    tails: dict[str, tuple[str, ...]] = {}
    for layer in layers:
        parts = layer.name.split(".")
        if layer.block is not None:
            start = parts.index(str(layer.block)) + 1 if str(layer.block) in parts else 0
            tails[layer.name] = tuple(p.removesuffix("_proj") for p in parts[start:] if not p.isdigit()) or (parts[-1],)
    last = Counter(tail[-1] for tail in set(tails.values()))
    short = {name: tail[-1] if last[tail[-1]] == 1 else " ".join(tail) for name, tail in tails.items()}
    return {name: words if len(words) <= _MAX_LABEL else f"…{words[1 - _MAX_LABEL :]}" for name, words in short.items()}


def _draw_cells(
    axes: "Axes", cells: Mapping[tuple[int, str], float], columns: Sequence[int], rows: Sequence[str], norm: Any
) -> None:
    """Draw one rectangle per cell, each with its value as a tooltip (`to_svg` turns these ids into titles)."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colours = colormaps[_COLOURS]
    for (block, name), value in cells.items():
        corner = (columns.index(block) - 0.5, rows.index(name) - 0.5)
        tip = f"tip:block {block}, {name}: {number_format.significant(value)}"
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=colours(norm(value)), edgecolor=PAPER, linewidth=0.8, gid=tip))


def label_cells(axes: "Axes", columns: Sequence[int], rows: Sequence[str]) -> None:
    axes.grid(visible=False)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    step = max(1, math.ceil(len(columns) / 16))
    axes.set_xticks(range(0, len(columns), step), [str(b) for b in columns[::step]])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("block")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_colour_bar(figure: "Figure", bar_axes: "Axes", norm: Any) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable

    steps = colormaps[_COLOURS].resampled(24)  # 24 steps look smooth, and make a small file
    bar = figure.colorbar(ScalarMappable(norm, steps), cax=bar_axes)
    if bar.solids is not None:
        bar.solids.set_edgecolor("face")  # else hairlines show between the steps
    log_ticks(bar_axes.yaxis, norm.vmin, norm.vmax)
    bar_axes.tick_params(size=0)
    bar_axes.grid(visible=False)
    bar_axes.spines[:].set_visible(False)
    bar.set_label("relative error", color=MUTED)
