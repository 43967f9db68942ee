"""What the arms of a study learned: read from their runs, held against gold utility; tables and figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlaif.errors import DataError
from rlaif.report.figures import INK, Panel, series
from rlaif.report.page import Block, Figure, Figures, Prose, Section, Table
from rlaif.tables import number, percent, percent_interval
from tinyworld.lab.arms import Arm, RewardModel, head_to_head, reward_models_of
from tinyworld.lab.study import over_seeds
from tinyworld.results import gold_curve, metric_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tinyworld.lab.policies import PolicyStudy

Floats = NDArray[np.float64]

START = "start"

LAST = 0.1
"""Share of an arm's steps that "at the end of training" averages over."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One arm at one seed.

    Attributes:
        measured: on unseen posts, as `rlaif eval policy` wrote it.
        seen: (T,) responses sampled up to each step of training.
        curves: (T,) each: mean `gold` and `reward` (normalised) of a step's responses, and their `kl` to the SFT
            policy, in nats per response.
    """

    measured: Mapping[str, Any]
    seen: Floats
    curves: Mapping[str, Floats]

    @property
    def gold(self) -> Mapping[str, Any]:
        """What gold says of it: `score`, and `win_rate` and others over the SFT policy, which has none itself."""
        rating: Mapping[str, Any] = self.measured["ratings"][0]
        return rating


Outcomes = Mapping[str, Sequence[Outcome]]
"""By arm, one for each seed in the same order. `start` is the SFT policy, which has no curves."""


def outcomes(study: PolicyStudy, folders: Mapping[int, Path]) -> Outcomes:
    """Read what finished.

    Raises:
        DataError: the samples or metrics of a step are missing.
    """
    found: dict[str, list[Outcome]] = {name: [] for name in (START, *(arm.name for arm in study.arms))}
    for folder in folders.values():
        start, *others = evaluated(folder, study.name)
        found[START].append(Outcome(start, np.empty(0), {}))
        by_name = {Path(policy["name"]).name: policy for policy in others}
        for arm in study.arms:
            found[arm.name].append(Outcome(by_name[arm.name], *training_curves(folder / arm.name)))
    return found


def evaluated(folder: Path, name: str) -> list[dict[str, Any]]:
    """The policies of an evaluation, the baseline first."""
    metrics = json.loads((folder / "eval" / name / "metrics.json").read_text(encoding="utf-8"))
    policies: list[dict[str, Any]] = metrics["policies"]
    return policies


def training_curves(run: Path) -> tuple[Floats, dict[str, Floats]]:
    """`Outcome.seen` and `Outcome.curves`.

    Raises:
        DataError: the samples or metrics of a step are missing.
    """
    curves = {
        "gold": gold_curve(run),
        "reward": metric_curve(run, "objective/scores"),
        "kl": metric_curve(run, "objective/kl"),
    }
    seen = metric_curve(run, "episode")
    if any(curve.steps != seen.steps for curve in curves.values()):
        raise DataError(f"{run} lacks the samples or metrics of some steps")
    return np.array(seen.values, float), {name: np.array(curve.values) for name, curve in curves.items()}


def window(steps: int) -> int:
    """How many steps "at the end" and "highest" average over."""
    return max(1, round(LAST * steps))


def smoothed(curve: Floats) -> Floats:
    """(T,) mean of each step and those before it within the window; the first ones have fewer."""
    n = window(len(curve))
    return np.array([curve[max(0, i + 1 - n) : i + 1].mean() for i in range(len(curve))])


def mean_curve(of: Sequence[Outcome], name: str) -> Floats:
    """(T,) a curve's mean over seeds."""
    return np.asarray(np.mean([outcome.curves[name] for outcome in of], axis=0), dtype=np.float64)


def policy_tables(arms: Sequence[Arm], found: Outcomes, seeds: Sequence[int]) -> Iterator[Table]:
    """A table of the arms over seeds, and their win rates seed by seed."""
    rows: list[tuple[str, ...]] = []
    for arm in arms:
        of = found[arm.name]
        gold, reward = (smoothed(mean_curve(of, name)) for name in ("gold", "reward"))
        rows.append(
            (
                arm.title,
                percent_interval(over_seeds([outcome.gold["win_rate"] for outcome in of])),
                percent(over_seeds([outcome.gold["length_controlled"] for outcome in of])["value"]),
                number(over_seeds([outcome.gold["score"] for outcome in of])["value"]),
                number(over_seeds([outcome.measured["kl"] for outcome in of])["value"]),
                f"{np.mean([outcome.measured['tokens'] for outcome in of]):.1f}",
                f"{gold.max():.3f}, {gold[-1]:.3f}",
                f"{reward.max():.2f}, {reward[-1]:.2f}",
            )
        )
    of = found[START]
    start = number(over_seeds([outcome.gold["score"] for outcome in of])["value"])
    tokens = f"{np.mean([outcome.measured['tokens'] for outcome in of]):.1f}"
    rows.append(("SFT policy", "-", "-", start, number(0.0), tokens, "-", "-"))
    heads = (
        "", "gold win rate over SFT, %", "length-controlled", "gold utility", "KL", "tokens",
        "gold in training: highest, last", "reward: highest, last",
    )  # fmt: skip
    yield Table("Over seeds", heads, rows)
    if len(seeds) > 1:
        by_seed = [
            (arm.title, *(percent_interval(outcome.gold["win_rate"]) for outcome in found[arm.name]))
            for arm in arms
        ]
        yield Table("Gold win rate over SFT, %", ("", *(f"seed {seed}" for seed in seeds)), by_seed)


def versus_table(pairs: Sequence[tuple[Arm, Arm]], folders: Mapping[int, Path]) -> Table:
    """How often gold prefers one arm to another."""
    rows = []
    for one, other in pairs:
        rated = [evaluated(folder, head_to_head(one, other))[1]["ratings"][0] for folder in folders.values()]
        rows.append(
            (
                f"{one.title} over {other.title}",
                percent_interval(over_seeds([found["win_rate"] for found in rated])),
                percent_interval(over_seeds([found["length_controlled"] for found in rated])),
                ", ".join(percent(found["win_rate"]["value"]) for found in rated),
            )
        )
    return Table("Head to head", ("", "gold win rate, %", "length-controlled, %", "by seed"), rows)


def reward_model_table(models: Sequence[RewardModel], folders: Mapping[int, Path]) -> Table:
    """What the reward models are worth on pairs that gold has labelled; means over seeds."""
    rows = []
    for model in models:
        read = [
            json.loads((folder / "eval" / model.name / "metrics.json").read_text(encoding="utf-8"))
            for folder in folders.values()
        ]
        accuracy = [found["accuracy"]["value"] for found in read]
        rows.append(
            (
                model.name,
                model.title,
                f"{100 * np.mean(accuracy):.1f} ({100 * min(accuracy):.1f} to {100 * max(accuracy):.1f})",
                number(float(np.mean([found["log_loss"] for found in read]))),
                number(float(np.mean([found["calibration"]["ece"] for found in read]))),
            )
        )
    heads = ("reward model", "learned from", "agrees with gold, %", "log loss", "ECE")
    return Table("On pairs that gold has labelled", heads, rows)


def curve_figures(arms: Sequence[Arm], found: Outcomes) -> Figures:
    """Gold and reward against the responses sampled, and gold against KL: mean over seeds, and their range."""
    start = float(np.mean([outcome.gold["score"]["value"] for outcome in found[START]]))

    def panel(y: str, x: str, ylabel: str, xlabel: str) -> Panel:
        def draw(ax: Axes) -> None:
            for i, arm in enumerate(arms):
                of = found[arm.name]
                across = of[0].seen if x == "seen" else smoothed(mean_curve(of, x))
                lines = np.array([smoothed(outcome.curves[y]) for outcome in of])
                ax.plot(across, lines.mean(axis=0), **series(i), label=arm.title, linewidth=1.8)
                if x == "seen" and len(of) > 1:
                    low, high = lines.min(axis=0), lines.max(axis=0)
                    ax.fill_between(across, low, high, color=series(i)["color"], alpha=0.15, linewidth=0)
            if y == "gold":
                ax.axhline(start, color=INK, linestyle=":", label="SFT policy")
            ax.set(xlabel=xlabel, ylabel=ylabel)
            ax.legend(fontsize=8)

        return draw

    seen, kl = "responses sampled", "KL to the SFT policy (nats per response)"
    note = "Means over seeds and, shaded, their range; each point averages the steps before it."
    return Figures(
        (
            Figure("Gold utility in training", note, panel("gold", "seen", "gold utility", seen)),
            Figure("Reward in training", note, panel("reward", "seen", "reward (normalised)", seen)),
            Figure("Gold utility by KL", "Means over seeds.", panel("gold", "kl", "gold utility", kl)),
        )
    )


def report_policies(study: PolicyStudy, folders: Mapping[int, Path]) -> list[Section]:
    """What the arms of a study learned, from which reward models, and who wins head to head.

    Raises:
        DataError: a run's file is missing or unreadable.
    """
    found = outcomes(study, folders)
    policies: list[Block] = [*policy_tables(study.arms, found, list(folders))]
    if study.versus:
        policies.append(versus_table(study.versus, folders))
    if study.curves:
        policies.append(curve_figures(study.arms, found))
    policies.append(Prose(f"{found[START][0].measured['responses']} unseen posts a seed; ties count half."))
    models = reward_model_table(reward_models_of(study.arms), folders)
    return [Section("Policies", policies), Section("Reward models", [models])]
