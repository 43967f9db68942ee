"""The demo's report: one self-contained HTML page with the figures drawn into it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tinyworld.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#3b7dd8", "#d9822b", "#2a9d6f")
INK = "#7a7f87"
"""Axes and text: readable on white and on black alike."""


def render_report(results: Results) -> str:
    """The page as HTML text; it refers to nothing outside itself."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    figures = {
        "gold": draw_figure(lambda ax: _gold_curves(ax, results)),
        "reward": draw_figure(lambda ax: _training_curves(ax, results, "reward", "reward (normalised)")),
        "kl": draw_figure(
            lambda ax: _training_curves(ax, results, "kl", "KL to the start (nats per response)")
        ),
        "wins": draw_figure(lambda ax: _win_rates(ax, results)),
        "calibration": draw_figure(lambda ax: _calibration(ax, results)),
        "agreement": draw_figure(lambda ax: _agreement(ax, results)),
    }
    return environment.get_template("report.html.jinja").render(results=results, figures=figures)


def draw_figure(*panels: Callable[[Axes], None]) -> Markup:
    """Draw each panel on fresh axes, side by side; an SVG element, fit for a page or a file of its own."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    # A fixed salt makes the ids inside the SVG, and so the page, the same for the same results.
    settings: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "rlaif", "font.family": "sans-serif", "font.size": 10,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    }  # fmt: skip
    with plt.rc_context(settings):
        n = len(panels)
        figure, axes = plt.subplots(1, n, figsize=(5.4 * n, 3.3), layout="constrained", squeeze=False)
        for draw, ax in zip(panels, axes[0], strict=True):
            draw(ax)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :])


def _gold_curves(ax: Axes, results: Results) -> None:
    for colour, policy in zip(COLOURS, results.policies, strict=False):
        curve = policy.gold_curve
        ax.plot(curve.steps, curve.values, color=colour, label=policy.title, linewidth=1.8)
    ax.axhline(results.start.mean_gold, color=INK, linestyle=":", label="start")
    ax.set(xlabel="step (PPO) or round (DPO)", ylabel="gold utility of training samples", ylim=(-0.5, 1.02))
    ax.legend(fontsize=8)


def _training_curves(ax: Axes, results: Results, name: str, label: str) -> None:
    for colour, policy in zip(COLOURS, results.policies, strict=False):
        curve = policy.curves[name]
        ax.plot(curve.steps, curve.values, color=colour, label=policy.title, linewidth=1.8)
    ax.set(xlabel="optimiser progress (step or round)", ylabel=label)
    ax.legend(fontsize=8)


def _win_rates(ax: Axes, results: Results) -> None:
    titles = [p.title for p in results.policies]
    rates = [p.win_rate for p in results.policies if p.win_rate]
    errors = ([r.value - r.low for r in rates], [r.high - r.value for r in rates])
    colours = COLOURS[: len(titles)]
    ax.barh(titles, [r.value for r in rates], xerr=errors, color=colours, height=0.55, ecolor=INK, capsize=4)
    ax.axvline(0.5, color=INK, linestyle=":")
    ax.set(xlim=(0, 1), xlabel="gold win rate against the start (ties half)")
    ax.invert_yaxis()


def _calibration(ax: Axes, results: Results) -> None:
    ax.plot((0.5, 1), (0.5, 1), color=INK, linestyle=":", label="perfect")
    bins = results.reward_model.bins
    ax.plot(
        [b.predicted for b in bins], [b.observed for b in bins], "o-", color=COLOURS[0], label="reward model"
    )
    ax.set(
        xlim=(0.5, 1),
        ylim=(0.4, 1.02),
        xlabel="confidence in the preferred response",
        ylabel="label's probability",
    )
    ax.legend(fontsize=8)


def _agreement(ax: Axes, results: Results) -> None:
    width = 0.36
    positions = range(len(results.labels))
    bars = {
        "one order": (COLOURS[1], [r.one_order for r in results.labels]),
        "both orders averaged": (COLOURS[0], [r.agreement for r in results.labels]),
    }
    for i, (label, (colour, found)) in enumerate(bars.items()):
        errors = ([e.value - e.low for e in found], [e.high - e.value for e in found])
        at = [x + (i - 0.5) * width for x in positions]
        ax.bar(
            at, [e.value for e in found], width, yerr=errors, color=colour, label=label, ecolor=INK, capsize=3
        )
    ax.axhline(0.5, color=INK, linestyle=":")
    ax.set_xticks(positions, [r.title for r in results.labels])
    ax.set(ylim=(0, 1), ylabel="agreement with gold")
    ax.legend(fontsize=8, loc="upper right")
