"""What are soft labels worth when the labeler errs? Reward models and policies from none to 40 % of wrong labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlaif.report.figures import Panel, series
from rlaif.report.page import Figure, Figures, Prose, Section, Table
from rlaif.tables import Found, percent, percent_interval
from tinyworld.lab.arms import Arm, Labels, RewardModel
from tinyworld.lab.findings import evaluated, report_policies
from tinyworld.lab.policies import PolicyStudy
from tinyworld.lab.study import mean_over_seeds, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WRONG = (0.0, 0.1, 0.2, 0.3, 0.4)
"""Shares of labels that prefer the other response."""
PAIRS = 800
"""Labelled pairs, of which a tenth is held out: few, so that noise matters."""
LOSSES = {"soft": "soft_cross_entropy", "hard": "bradley_terry"}

Measures = Mapping[str, Sequence[Found]]
"""Of a reward model and its policy, an estimate for each seed: accuracy, log_loss, ece, win_rate, length_controlled."""


def arm(wrong: float, kind: str) -> Arm:
    """The policy of a reward model that learned from soft or hard labels of a labeler that errs."""
    level = f"{100 * wrong:.0f}"
    noisy = ("--wrong", str(wrong), "--limit", str(PAIRS), "--seed", "{seed}")
    labels = Labels(f"noise-{level}", f"noisy-{level}.jsonl", "tinyworld.lab.noisy_labeler", noisy)
    title = f"{level} % wrong, {kind}"
    model = RewardModel(f"rm-{kind}-{level}", title, labels, ("--loss_type", LOSSES[kind]))
    return Arm(f"rloo-{kind}-{level}", title, "ppo", "short", model)


ARMS = {(wrong, kind): arm(wrong, kind) for wrong in WRONG for kind in LOSSES}


@dataclass(frozen=True, slots=True)
class NoiseStudy(PolicyStudy):
    """Reward models and policies by share of wrong labels."""

    def report(self, folders: Mapping[int, Path]) -> list[Section]:
        """Accuracy, calibration and win rates against noise, soft beside hard."""
        found = {key: measures(made, self.name, folders) for key, made in ARMS.items()}
        policies, _ = report_policies(self, folders)
        return [Section("By share of wrong labels", [_table(found), _figures(found), Prose(NOTE)]), policies]


NOTE = (
    f"Reward models learn from {PAIRS} pairs, a tenth of them held out, and are measured on pairs that gold has "
    "labelled: accuracy, log loss and expected calibration error (ECE) of the probability that they give. Policies "
    "take 20 steps of RLOO. Intervals are over seeds; of one seed, over its pairs and posts."
)


def measures(made: Arm, study: str, folders: Mapping[int, Path]) -> Measures:
    """What was measured of an arm and of its reward model."""
    found: dict[str, list[Found]] = {
        name: [] for name in ("accuracy", "log_loss", "ece", "win_rate", "length_controlled")
    }
    for folder in folders.values():
        metrics = json.loads((folder / "eval" / made.server / "metrics.json").read_text(encoding="utf-8"))
        rated = next(
            p["ratings"][0] for p in evaluated(folder, study)[1:] if Path(p["name"]).name == made.name
        )
        found["accuracy"].append(metrics["accuracy"])
        for name, value in (("log_loss", metrics["log_loss"]), ("ece", metrics["calibration"]["ece"])):
            found[name].append({"value": value, "low": None, "high": None})
        for name in ("win_rate", "length_controlled"):
            found[name].append(rated[name])
    return found


def _table(found: Mapping[tuple[float, str], Measures]) -> Table:
    rows = [
        (
            f"{100 * wrong:.0f} %, {kind}",
            percent_interval(over_seeds(of["accuracy"])),
            *(mean_over_seeds([one["value"] for one in of[name]]) for name in ("log_loss", "ece")),
            percent_interval(over_seeds(of["win_rate"])),
            percent(over_seeds(of["length_controlled"])["value"]),
        )
        for (wrong, kind), of in found.items()
    ]
    heads = (
        "wrong labels",
        "RM agrees with gold, %",
        "RM log loss",
        "RM ECE",
        "policy over SFT by gold, %",
        "length-controlled",
    )
    return Table("Soft against hard labels", heads, rows)


def _figures(found: Mapping[tuple[float, str], Measures]) -> Figures:
    def panel(name: str, ylabel: str, scale: float = 1.0) -> Panel:
        def draw(ax: Axes) -> None:
            for i, kind in enumerate(LOSSES):
                lines = scale * np.array(
                    [[one["value"] for one in found[wrong, kind][name]] for wrong in WRONG]
                )
                across = [100 * wrong for wrong in WRONG]
                style: Any = series(i)
                ax.plot(across, lines.mean(axis=1), **style, marker="o", markersize=4, label=f"{kind} labels")
                ax.fill_between(
                    across,
                    lines.min(axis=1),
                    lines.max(axis=1),
                    color=style["color"],
                    alpha=0.15,
                    linewidth=0,
                )
            ax.set(xlabel="wrong labels, %", ylabel=ylabel)
            ax.legend(fontsize=8)

        return draw

    note = "Means over seeds and, shaded, their range."
    return Figures(
        (
            Figure(
                "Reward model's agreement with gold", note, panel("accuracy", "agrees with gold, %", 100.0)
            ),
            Figure("Reward model's calibration error", note, panel("ece", "ECE")),
            Figure("Policy's win rate over SFT", note, panel("win_rate", "gold win rate, %", 100.0)),
        )
    )


STUDY = NoiseStudy(
    "noise",
    "What are soft labels worth when the labeler errs?",
    tuple(ARMS.values()),
    versus=tuple((ARMS[wrong, "soft"], ARMS[wrong, "hard"]) for wrong in (0.2, 0.4)),
)
