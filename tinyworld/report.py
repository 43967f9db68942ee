"""The demo's report: one self-contained HTML page with the figures drawn into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from rlaif.report.figures import COLOURS, INK, Panel, series
from rlaif.report.page import (
    Code,
    Figure,
    Figures,
    Page,
    Prose,
    Raw,
    Section,
    Table,
    Tile,
    environment,
    render,
)
from rlaif.tables import number, percent
from tinyworld.results import Estimate, PolicyResult, Results, Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def render_report(results: Results) -> str:
    """The page as HTML text; it refers to nothing outside itself."""
    labels = results.labels[0]
    return render(
        Page(
            title="From AI labels to aligned policies",
            origin=f"The embedded world, seed {results.seed} · {results.machine} · {results.date} · stages took "
            f"{results.seconds:.0f} s in all, two side by side",
            lead=(
                "A judge model compared summaries; a reward model learned its soft labels; PPO and iterative DPO "
                "optimised a policy against the gRPC reward server. Gold utility, the world's own measure of a summary "
                "(from −0.5 to 1), was hidden from every stage and is used only here; the judge knows of it what its "
                "pretraining taught it.",
            ),
            tiles=[
                *(_win_tile(policy) for policy in results.policies),
                Tile(
                    f"{percent(labels.agreement.value)} %",
                    "labeler agreement",
                    f"with gold, Cohen's κ {labels.kappa.value:.2f}",
                ),
            ],
            sections=[
                _policies(results),
                _labels(results),
                Section("Before and after, side by side", [Raw(_samples(results.samples))]),
                Section("One judgment, as the judge wrote it", [Code(results.judgment)]),
                _commands(results),
            ],
        )
    )


def _win_tile(policy: PolicyResult) -> Tile:
    assert policy.win_rate is not None
    return Tile(
        f"{percent(policy.win_rate.value)} %",
        policy.title,
        f"gold win rate over the start, 95 % interval {_percents(policy.win_rate)}",
    )


def _policies(results: Results) -> Section:
    rows = [
        (
            p.title,
            number(p.mean_gold),
            f"{number(p.gold.low)} to {number(p.gold.high)}",
            "–" if p.win_rate is None else percent(p.win_rate.value),
            "–" if p.win_rate is None else _percents(p.win_rate),
            "–" if p.win_rate is None else percent(p.ties),
            f"{p.mean_words:.1f}",
        )
        for p in (results.start, *results.policies)
    ]
    heads = ("policy", "gold utility", "95 % interval", "win rate, %", "95 % interval", "ties, %", "words")
    return Section(
        "The policies got better",
        [
            Figures(
                [
                    Figure(
                        "Gold win rates over the start",
                        f"One summary per unseen post from each policy and from the start ({results.num_eval_prompts} "
                        "posts); bootstrap intervals over posts.",
                        lambda ax: _win_rates(ax, results),
                    ),
                    Figure(
                        "Gold utility while training",
                        "Of the samples that were trained on. Training never saw it.",
                        lambda ax: _gold_curves(ax, results),
                    ),
                    Figure(
                        "Reward while training",
                        "What training did see: the reward of the server, normalised.",
                        _training_curves(results, "reward", "reward (normalised)"),
                    ),
                    Figure(
                        "KL while training",
                        "How far each policy moved from where it started.",
                        _training_curves(results, "kl", "KL to the start (nats per response)"),
                    ),
                ]
            ),
            Table("Policies on unseen posts", heads, rows),
        ],
    )


def _labels(results: Results) -> Section:
    rm = results.reward_model
    rows = [
        (
            r.title,
            str(r.pairs),
            percent(r.agreement.value),
            f"{r.kappa.value:.2f}",
            percent(r.one_order.value),
            percent(r.same_position),
            percent(r.same_position_averaged),
            f"{r.label_mass:.4f}",
        )
        for r in results.labels
    ]
    heads = (
        "labels", "pairs", "agreement, %", "Cohen's κ", "one order, %", "same position, one order, %",
        "after averaging, %", "label mass",
    )  # fmt: skip
    return Section(
        "The labels can be trusted",
        [
            Figures(
                [
                    Figure(
                        "Agreement of the labels with gold",
                        "Share of pairs on which the judge prefers what gold prefers. Reasoning before the verdict is "
                        "what makes this judge work.",
                        lambda ax: _agreement(ax, results),
                    ),
                    Figure(
                        "Calibration of the reward model",
                        f"On held-out pairs: accuracy {percent(rm.accuracy)} %, log loss {number(rm.log_loss)}, "
                        f"expected calibration error {number(rm.ece)}.",
                        lambda ax: _calibration(ax, results),
                    ),
                ]
            ),
            Table("Labels held against gold", heads, rows),
            Prose(
                "Same position: the judge prefers the response at one position whichever it is. Averaging both orders "
                "cancels it by construction: the label of a pair and of its swap are complements."
            ),
        ],
    )


def _samples(samples: list[Sample]) -> Markup:
    template = environment(Path(__file__).parent).get_template("samples.html.jinja")
    return Markup(template.render(samples=samples))


def _commands(results: Results) -> Section:
    rows = [(s.name, s.command, f"{s.seconds:.0f}") for s in results.stages]
    return Section("The commands", [Table("Stages", ("stage", "command", "seconds"), rows)])


def _percents(found: Estimate) -> str:
    return f"{percent(found.low)} to {percent(found.high)}"


# ---- figures ----


def _gold_curves(ax: Axes, results: Results) -> None:
    for i, policy in enumerate(results.policies):
        curve = policy.gold_curve
        ax.plot(curve.steps, curve.values, **series(i), label=policy.title, linewidth=1.8)
    ax.axhline(results.start.mean_gold, color=INK, linestyle=":", label="start")
    ax.set(xlabel="step (PPO) or round (DPO)", ylabel="gold utility of samples", ylim=(-0.5, 1.02))
    ax.legend(fontsize=8)


def _training_curves(results: Results, name: str, label: str) -> Panel:
    def draw(ax: Axes) -> None:
        for i, policy in enumerate(results.policies):
            curve = policy.curves[name]
            ax.plot(curve.steps, curve.values, **series(i), label=policy.title, linewidth=1.8)
        ax.set(xlabel="step (PPO) or round (DPO)", ylabel=label)
        ax.legend(fontsize=8)

    return draw


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
        "one order": (COLOURS[1], "//", [r.one_order for r in results.labels]),
        "both orders averaged": (COLOURS[0], "", [r.agreement for r in results.labels]),
    }
    for i, (label, (colour, hatch, found)) in enumerate(bars.items()):
        errors = ([e.value - e.low for e in found], [e.high - e.value for e in found])
        at = [x + (i - 0.5) * width for x in positions]
        values = [e.value for e in found]
        ax.bar(at, values, width, yerr=errors, color=colour, hatch=hatch, label=label, ecolor=INK, capsize=3)
    ax.axhline(0.5, color=INK, linestyle=":")
    ax.set_xticks(positions, [r.title for r in results.labels])
    ax.set(ylim=(0, 1), ylabel="agreement with gold")
    ax.legend(fontsize=8, loc="upper right")
