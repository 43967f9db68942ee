"""Drawing: matplotlib figures as SVG elements that fit a light page, a dark one and a phone."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = Callable[["Axes"], None]
"""Draws on the axes it is given."""

INK = "#7a7f87"
"""Axes and text of an SVG file: readable on white and on black alike. In a page it is the colour of the text."""
COLOURS = ("#2f74d0", "#bf6d10", "#1d8a60", "#b04a9c", "#8a6d3b", "#c0392b", "#5a62c8", "#4f7f8c")
"""Of series, in order: at least 3 : 1 against white. In a page they are the custom properties `--series-0` and so on,
which are lighter where the page is dark."""
LINES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
"""Of series: lines differ in more than their colour."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""Of series that are drawn as points."""
SIZE = (4.5, 3.0)
"""Inches of one panel: text stays readable where a phone shows it, and three stand side by side on a desk."""


def series(number: int) -> dict[str, Any]:
    """Colour and line of a series, for `Axes.plot`; the first one is number 0."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number % len(LINES)]}


def draw_figure(*panels: Panel, size: tuple[float, float] = SIZE) -> Markup:
    """Draw each panel on fresh axes, side by side; an SVG element, fit for a page or a file of its own.

    Args:
        panels: of the figure.
        size: of each, in inches.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    # A fixed salt makes the ids inside the SVG, and so the page, the same for the same results.
    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "rlaif", "font.family": "sans-serif", "font.size": 10,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "text.parse_math": False,
    }  # fmt: skip
    with plt.rc_context(settings), warnings.catch_warnings():
        # Text is drawn by the reader's fonts: what the font lacks that measures it here is no loss.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        n = len(panels)
        figure, axes = plt.subplots(1, n, figsize=(size[0] * n, size[1]), layout="constrained", squeeze=False)
        for draw, ax in zip(panels, axes[0], strict=True):
            draw(ax)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :])


_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_ID = re.compile(r' id="([^"]+)"')
_USE = re.compile(r"""(url\(#|href="#)([^)"]+)""")


def inline(svg: str, *, key: str, title: str) -> Markup:
    """An SVG of `draw_figure` as an element of a page: named for those who do not see it, in the page's colours.

    Args:
        svg: of `draw_figure`.
        key: tells the figure's ids from those of other figures on the page.
        title: what the figure shows.
    """
    used = {name for _, name in _USE.findall(svg)}
    svg = _METADATA.sub("", svg)
    svg = _ID.sub(lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", svg)
    svg = _USE.sub(lambda m: f"{m[1]}{key}-{m[2]}", svg)
    svg = svg.replace(INK, "currentColor")
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--series-{number})")
    start = svg.index(">") + 1
    head = f'{svg[: start - 1]} role="img" aria-labelledby="{key}-title">'
    return Markup(f'{head}<title id="{key}-title">{escape(title)}</title>{svg[start:]}')
