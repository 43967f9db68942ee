"""Which reward: distilled from the judge's labels, the judge itself, people's labels, or those of a poor labeler?

The arms are those of the RLAIF paper (arXiv 2309.00267, sections 4.1 to 4.3 and appendix J). Judge, policy and
reward models are of one size, so that RLAIF here is the paper's with a labeler of the policy's size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rlaif.report.page import Section, Table
from rlaif.tables import percent
from tinyworld.lab.arms import Arm, Labels, RewardModel, head_to_head
from tinyworld.lab.findings import evaluated, report_policies
from tinyworld.lab.methods import RLOO
from tinyworld.lab.policies import PolicyStudy
from tinyworld.lab.study import beside, over_seeds

PEOPLES = RewardModel(
    "rm-human",
    "people's labels: gold",
    Labels("label-human", "labels-human.jsonl", "tinyworld.lab.human_labeler"),
)
POORER = RewardModel(
    "rm-no-cot",
    "the judge's labels without a rationale",
    Labels("label-no-cot", "labels-no-cot", options=("--no-cot",)),
)

DISTILLED = replace(RLOO, title="distilled")
DIRECT = Arm("rloo-direct", "direct", "ppo", "rloo", None)
PEOPLE = Arm("rloo-human", "people's labels", "ppo", "rloo", PEOPLES)
POOR = Arm("rloo-no-cot", "labels without rationale", "ppo", "rloo", POORER)


@dataclass(frozen=True, slots=True)
class RewardStudy(PolicyStudy):
    """Policies of several rewards, beside what the paper published."""

    def report(self, folders: Mapping[int, Path]) -> list[Section]:
        """What the arms learned, and the paper's table."""
        return [*report_policies(self, folders), Section("The paper", [beside_the_paper(self, folders)])]


def beside_the_paper(study: PolicyStudy, folders: Mapping[int, Path]) -> Table:
    """The paper's win rates on summaries, in %, plain and length-corrected, and those found here."""

    def won(evaluation: str, arm: Arm) -> str:
        ratings = [
            next(
                p["ratings"][0] for p in evaluated(folder, evaluation)[1:] if Path(p["name"]).name == arm.name
            )
            for folder in folders.values()
        ]
        return " / ".join(
            percent(over_seeds([rating[kind] for rating in ratings])["value"])
            for kind in ("win_rate", "length_controlled")
        )

    def right(model: str) -> str:
        found = [
            json.loads((folder / "eval" / model / "metrics.json").read_text(encoding="utf-8"))["accuracy"][
                "value"
            ]
            for folder in folders.values()
        ]
        return percent(float(np.mean(found)))

    return beside(
        [
            ("RLAIF over SFT; labeler larger than the policy", "71 / 59", "-"),
            ("RLAIF over SFT; labeler as large as the policy", "68 / 59", won(study.name, DISTILLED)),
            ("RLHF over SFT", "73 / 61", won(study.name, PEOPLE)),
            ("RLAIF over RLHF", "50 / 47", won(head_to_head(DISTILLED, PEOPLE), DISTILLED)),
            ("direct RLAIF over SFT", "74 / 65", won(study.name, DIRECT)),
            (
                "direct over distilled RLAIF; labeler as large as the policy",
                "60 / 56",
                won(head_to_head(DIRECT, DISTILLED), DIRECT),
            ),
            (
                "distilled RLAIF: best prompt over a poorer one",
                "59 / 55",
                won(head_to_head(DISTILLED, POOR), DISTILLED),
            ),
            ("reward model of people's labels agrees with people", "79.3", right("rm-human")),
            ("reward model of the best labels does", "74.2", right("rm")),
            ("reward model of the poorest labels does", "66.4", right("rm-no-cot")),
        ],
        "Win rates, % / the same corrected for length; of reward models the agreement, %.",
    )


STUDY = RewardStudy(
    "rewards",
    "Which reward: distilled, direct, people's, or a poor labeler's?",
    (DISTILLED, DIRECT, PEOPLE, POOR),
    versus=((DIRECT, DISTILLED), (DISTILLED, PEOPLE), (DISTILLED, POOR)),
)
