"""Style of all drawings, and their export as inline SVG or PNG; without pyplot, so that no global state is left.

In an inline SVG each colour of `PALETTE` is a CSS variable, so a page can show the same drawing on light and on dark,
and the text is text in the page's own font. The same drawing gives the same bytes.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe & Ito's colours, told apart by colour-blind readers; yellow is left out, as it vanishes on white.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b7280")
INK, MUTED, RULE, PAPER = "#1d2127", "#5c6570", "#e3e6ea", "#ffffff"
PALETTE = {"ink": INK, "muted": MUTED, "rule": RULE, "paper": PAPER} | {f"c{i}": c for i, c in enumerate(SERIES)}

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "matquant",
    "text.parse_math": False,  # a "$" in a name is a dollar
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def to_svg(figure: "Figure", name: str, alt: str) -> str:
    """Export a figure as one ``<svg>`` element for an HTML page that defines ``--ink``, ``--c0`` and so on.

    ``name`` keeps its ids apart from other figures' on the page, ``alt`` is read to those who cannot see it.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with styled():
        figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns|xmlns:xlink|version|width|height)="[^"]*"', "", svg, count=5)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'<g id="tip:([^"]*)">', r"<g><title>\1</title>", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'style="[^"]*"', lambda match: _with_variables(match.group()), svg)
    # The style sheet that went would hold for the whole page; its content, on the root, is inherited.
    root = f'<svg role="img" aria-label="{escape(alt)}" stroke-linejoin="round" stroke-linecap="butt"'
    return svg.replace("<svg", root, 1).strip()


def to_png(figure: "Figure", dpi: int = 160) -> bytes:
    """Export a figure as PNG on white."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=dpi, facecolor=PAPER, metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def styled() -> Iterator[None]:
    """Apply matplotlib's defaults and `_STYLE` inside the context, independent of any matplotlibrc."""
    import matplotlib
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's browser has the font
        yield


def log_ticks(axis: "Axis", low: float, high: float) -> None:
    """Set ticks of a log axis with plain numbers, for any range."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    decades = math.log10(high / low)
    # (span in decades, ticks within each decade): about four to eight ticks in all
    steps: list[tuple[float, Sequence[float]]] = [
        (2.5, (1,)),
        (1.7, (1, 3)),
        (0.8, (1, 2, 5)),
        (0.4, (1, 1.5, 2, 3, 4, 5, 7)),
        (0.0, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)),
    ]
    subs = next(ticks for span, ticks in steps if decades >= span)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _with_variables(style: str) -> str:
    for name, colour in PALETTE.items():
        style = style.replace(colour, f"var(--{name})")
    return style
