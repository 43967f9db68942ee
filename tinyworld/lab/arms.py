"""Policies, labels and reward models to be made, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arm:
    """A policy to be trained.

    Attributes:
        name: of its run directory, the same in every study that it is part of.
        title: what the report calls it.
        command: how it is trained: `ppo`, `dpo`, ...
        settings: name of its settings under `configs/study`.
        reward: what rewards it: `judge`, or one of `REWARD_MODELS`.
        options: flags beside its settings.
    """

    name: str
    title: str
    command: str
    settings: str
    reward: str = "rm"
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels of a seed's pairs of candidates, and what makes them.

    Attributes:
        name: of the stage that makes them.
        path: the dataset, in a seed's folder.
        wrong: share of labels that the noisy labeler turns; None for the judge's own labels. See `noisy_labeler`.
    """

    name: str
    path: str
    wrong: float | None = None


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A reward model to be trained.

    Attributes:
        title: what it learned from, for the report.
        labels: those it learns from.
        options: flags beside its settings, `configs/rm.yaml`.
    """

    title: str
    labels: Labels
    options: tuple[str, ...] = ()


JUDGED = Labels("label", "labels")
NOISY = Labels("noise", "noisy.jsonl", 0.25)

REWARD_MODELS = {
    "rm": RewardModel("the judge's soft labels", JUDGED),
    "rm-fifth": RewardModel("a fifth of them", JUDGED, ("--eval_fraction", "0.8")),
    "rm-soft": RewardModel("noisy soft labels", NOISY),
    "rm-hard": RewardModel("the same, hard", NOISY, ("--loss_type", "bradley_terry")),
}


def reward_models_of(arms: Sequence[Arm]) -> dict[str, RewardModel]:
    """The reward models that the arms need, by name."""
    rewards = {arm.reward for arm in arms}
    return {name: model for name, model in REWARD_MODELS.items() if name in rewards}


def head_to_head(one: Arm, other: Arm) -> str:
    """Where the comparison of two arms is, under a seed's `eval`."""
    return f"{one.name}-over-{other.name}"
