"""The pictures that pages share, as panels: curves, estimates with intervals, distributions, reliability."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlaif.report.figures import COLOURS, INK, MARKERS, SIZE, Panel, series
from rlaif.report.page import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 300
"""A longer curve is drawn as means of so many stretches."""
_FEW_POINTS = 40
"""Curves with fewer points show them, since one between two gaps would be invisible."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A line.

    Attributes:
        name: in the legend.
        x: (N,) where.
        y: (N,) values; None leaves a gap.
        low: (N,) lower ends of intervals, where there are any.
        high: (N,) upper ends.
        number: of its colour and line, the same for a run in all pictures; None for its place among the lines.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    number: int | None = None

    def style(self, place: int) -> dict[str, Any]:
        """Colour and line."""
        return series(place if self.number is None else self.number)


def curve(
    rows: Sequence[Mapping[str, Any]],
    metric: str,
    name: str = "",
    *,
    x: str = "step",
    number: int | None = None,
) -> Curve | None:
    """A metric of a run over its steps, with `METRIC_low` and `METRIC_high` as its interval where there are any.

    A step without the metric is left out, as between evaluations; one whose value could not be had leaves a gap.
    None where no step has a value.

    Args:
        rows: of `metrics.jsonl`.
        metric: its name.
        name: in the legend.
        x: the metric across.
        number: of its colour.
    """
    there = [row for row in rows if metric in row and row.get(x) is not None]
    if all(row[metric] is None for row in there):
        return None

    def values(key: str) -> list[float | None]:
        return [row.get(key) for row in there]

    low, high = values(f"{metric}_low"), values(f"{metric}_high")
    if all(v is None for v in low):
        low, high = [], []
    return Curve(name or metric, [row[x] for row in there], values(metric), low, high, number)


def curves(lines: Sequence[Curve], xlabel: str, ylabel: str, *, reference: float | None = None) -> Panel:
    """Lines on one pair of axes, intervals as bands; `reference` is a dotted line across."""

    def draw(ax: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for number, line in enumerate(lines):
            style = line.style(number)
            x, y = stretches(line.x), stretches(line.y)
            marker: dict[str, Any] = {"marker": "o", "markersize": 3} if len(x) <= _FEW_POINTS else {}
            ax.plot(x, y, **style, **marker, label=short_name(line.name), linewidth=1.7)
            if line.low:
                band = (stretches(line.low), stretches(line.high))
                ax.fill_between(x, *band, color=style["color"], alpha=0.18, linewidth=0)
        if reference is not None:
            ax.axhline(reference, color=INK, linestyle=":", linewidth=1)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        if all(float(v).is_integer() for line in lines for v in line.x):
            ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if len(lines) > 1:
            legend(ax, len(lines))

    return draw


def legend(ax: Axes, entries: int) -> None:
    """The legend, where the lines leave most room; above the axes if it is long."""
    if entries <= 4:
        ax.legend(fontsize=8)
    else:
        ax.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def smoothed(values: Sequence[float], share: float = 0.1) -> list[float]:
    """(N,) means of each value and those before it, over a window of this share of all."""
    window = max(1, round(share * len(values)))
    return [
        math.fsum(values[max(0, k + 1 - window) : k + 1]) / min(k + 1, window) for k in range(len(values))
    ]


def stretches(values: Sequence[float | None]) -> list[float]:
    """Values to draw: NaN for what is missing, and means of equal stretches where there are too many."""
    numbers = [math.nan if v is None else float(v) for v in values]
    n = len(numbers)
    if n <= MOST_POINTS:
        return numbers
    edges = [i * n // MOST_POINTS for i in range(MOST_POINTS + 1)]
    return [_mean(numbers[a:b]) for a, b in itertools.pairwise(edges)]


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return math.fsum(known) / len(known) if known else math.nan


def path(lines: Sequence[Curve], xlabel: str, ylabel: str) -> Panel:
    """Points in the order of time, joined, from a hollow first one to a filled last one; intervals are upright bars.

    A line of one point is that point, filled.
    """

    def draw(ax: Axes) -> None:
        for number, line in enumerate(lines):
            style = line.style(number)
            marker = MARKERS[(number if line.number is None else line.number) % len(MARKERS)]
            if line.low:
                ax.vlines(line.x, line.low, line.high, color=style["color"], linewidth=1.2)  # type: ignore[arg-type]
            x, y = stretches(line.x), stretches(line.y)
            ax.plot(x, y, **style, linewidth=1.2)
            known = [(a, b) for a, b in zip(x, y, strict=True) if not math.isnan(a) and not math.isnan(b)]
            for end, fill in ((known[:1], "none"), (known[-1:], style["color"])):
                if fill == "none" and len(known) == 1:
                    continue
                at = [a for a, _ in end], [b for _, b in end]
                label = short_name(line.name) if fill != "none" else None
                ax.plot(
                    *at, marker=marker, color=style["color"], markerfacecolor=fill, markersize=6,
                    linestyle="none", label=label,
                )  # fmt: skip
        ax.set(xlabel=xlabel, ylabel=ylabel)
        if len(lines) > 1:
            legend(ax, len(lines))

    return draw


@dataclass(frozen=True, slots=True)
class Group:
    """Estimates of one kind for several rows: a value each, with `low` and `high`, or None."""

    name: str
    found: Sequence[Mapping[str, Any] | None]


def estimates(
    rows: Sequence[str], groups: Sequence[Group], xlabel: str, *, reference: float | None = None
) -> Panel:
    """Points with their intervals, a row for each name; an estimate that could not be had is not there."""

    def draw(ax: Axes) -> None:
        for number, group in enumerate(groups):
            colour = COLOURS[number % len(COLOURS)]
            label = short_name(group.name)
            for row, found in enumerate(group.found):
                if found is None or found.get("value") is None:
                    continue
                at = row + 0.28 * (number - (len(groups) - 1) / 2)
                if found.get("low") is not None:
                    ax.plot([found["low"], found["high"]], [at, at], color=colour, linewidth=2)
                ax.plot(
                    [found["value"]],
                    [at],
                    marker=MARKERS[number % len(MARKERS)],
                    color=colour,
                    markersize=6,
                    linestyle="none",
                    label=label,
                )
                label = "_nolegend_"
        if reference is not None:
            ax.axvline(reference, color=INK, linestyle=":", linewidth=1)
        ax.set_yticks(range(len(rows)), [short_name(row) for row in rows])
        ax.set(xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))
        if len(groups) > 1:
            ax.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)

    return draw


def rows_size(rows: int) -> tuple[float, float]:
    """Inches of a figure with so many rows."""
    return SIZE[0], max(2.2, 1.1 + 0.32 * rows)


def short_name(name: str, most: int = 26) -> str:
    """A name that leaves room for the figure: its end, which tells paths apart."""
    plain = " ".join(shown(name).split())
    plain = plain if len(plain) <= most else f"…{plain[1 - most :]}"
    return f" {plain}" if plain.startswith("_") else plain  # matplotlib leaves such names out of legends


def histogram(
    edges: Sequence[float], counts: Sequence[Group | Sequence[int]], xlabel: str, ylabel: str = "rows"
) -> Panel:
    """Counts between edges; several distributions are outlines over each other.

    Args:
        edges: (N + 1,) of the bins.
        counts: (N,) counts of one distribution; or groups whose `found` hold a `value` for each bin.
        xlabel: what is counted.
        ylabel: what the counts are of.
    """

    def draw(ax: Axes) -> None:
        for number, one in enumerate(counts):
            style = series(number)
            if isinstance(one, Group):
                values = [0.0 if f is None else float(f["value"]) for f in one.found]
                ax.stairs(
                    values,
                    edges,
                    color=style["color"],
                    linestyle=style["linestyle"],
                    label=short_name(one.name),
                    linewidth=1.7,
                )
            else:
                ax.stairs(one, edges, fill=True, color=style["color"], alpha=0.85)
        ax.set(xlabel=xlabel, ylabel=ylabel)
        if len(counts) > 1:
            ax.legend(fontsize=8)

    return draw


def counted(
    values: Sequence[float], bins: int = 20, low: float | None = None, high: float | None = None
) -> tuple[list[float], list[int]]:
    """Edges and counts of a histogram of known values."""
    import numpy as np

    least, most = min(values) if low is None else low, max(values) if high is None else high
    counts, edges = np.histogram(values, bins=bins, range=(least, most if most > least else least + 1))
    return edges.tolist(), counts.tolist()


def distributions(
    named: Mapping[str, Sequence[float]], xlabel: str, ylabel: str = "share", bins: int = 20
) -> Panel:
    """Shares of several samples on bins in common, as outlines."""
    every = [v for values in named.values() for v in values]
    low, high = min(every), max(every)
    groups = []
    edges: list[float] = []
    for name, values in named.items():
        edges, counts = counted(values, bins, low, high)
        groups.append(Group(name, [{"value": c / len(values)} for c in counts]))
    return histogram(edges, groups, xlabel, ylabel)


def reliability(named: Mapping[str, Sequence[Mapping[str, Any]]], xlabel: str, ylabel: str) -> Panel:
    """Confidence beside agreement, as `rlaif.measures.reliability` has them; the size of a point is its count."""

    def draw(ax: Axes) -> None:
        ax.plot((0.5, 1), (0.5, 1), color=INK, linestyle=":", linewidth=1, label="perfect")
        least = 0.45
        for number, (name, bins) in enumerate(named.items()):
            style = series(number)
            x, y = [b["confidence"] for b in bins], [b["agreement"] for b in bins]
            most = max((b["count"] for b in bins), default=1)
            ax.plot(x, y, **style, linewidth=1.5, label=name)
            ax.scatter(x, y, [12 + 90 * b["count"] / most for b in bins], color=style["color"])
            least = min([least, *y])
        ax.set(xlim=(0.49, 1.01), ylim=(least - 0.03, 1.03), xlabel=xlabel, ylabel=ylabel)
        ax.legend(fontsize=8, loc="upper left")

    return draw


def density(x: Sequence[float], y: Sequence[float], xlabel: str, ylabel: str, bins: int = 20) -> Panel:
    """How often two probabilities occur together: a square's side grows with the logarithm of its count."""

    def draw(ax: Axes) -> None:
        import numpy as np

        counts, _, _ = np.histogram2d(x, y, bins=bins, range=((0, 1), (0, 1)))
        where = np.argwhere(counts > 0)
        side = np.log1p(counts[counts > 0]) / np.log1p(counts.max())
        centres = (where + 0.5) / bins
        ax.axhline(0.5, color=INK, linewidth=0.6)
        ax.axvline(0.5, color=INK, linewidth=0.6)
        ax.plot((0, 1), (0, 1), color=INK, linestyle=":", linewidth=1)
        ax.scatter(
            centres[:, 0], centres[:, 1], (9.5 * side) ** 2, marker="s", color=COLOURS[0], linewidths=0
        )
        ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=xlabel, ylabel=ylabel)

    return draw


def bars(named: Mapping[str, float], xlabel: str, *, unit: str = "") -> Panel:
    """A bar for each name, with its value beside it."""

    def draw(ax: Axes) -> None:
        names, values = [short_name(n) for n in named], list(named.values())
        drawn = ax.barh(names, values, color=COLOURS[0], height=0.6)
        ax.bar_label(drawn, [f"{v:.3g}{unit}" for v in values], padding=3, fontsize=8)
        ax.set(xlabel=xlabel, xlim=(0, 1.15 * max([*values, 1e-9])))
        ax.invert_yaxis()

    return draw
