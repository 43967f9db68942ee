"""Policies, labels and reward models to be made, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels of a seed's pairs of candidates, and what makes them.

    Attributes:
        name: of the stage that makes them.
        path: the dataset, in a seed's folder.
        labeler: a program that labels the judge's pairs anew, such as `tinyworld.lab.noisy_labeler`; None for the
            judge itself.
        options: flags of the labeler; `{seed}` stands for the seed.
    """

    name: str
    path: str
    labeler: str | None = None
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A reward model to be trained.

    Attributes:
        name: of its run directory, the same in every study that needs it.
        title: what it learned from, for the report.
        labels: those it learns from.
        options: flags beside its settings, `configs/rm.yaml`.
    """

    name: str
    title: str
    labels: Labels
    options: tuple[str, ...] = ()


JUDGED = Labels("label", "labels")
RM = RewardModel("rm", "the judge's soft labels", JUDGED)


@dataclass(frozen=True, slots=True)
class Arm:
    """A policy to be trained.

    Attributes:
        name: of its run directory, the same in every study that it is part of.
        title: what the report calls it.
        command: how it is trained: `ppo`, `dpo`, ...
        settings: name of its settings under `configs/study`.
        reward: the reward model that it learns from; None for the judge itself.
        options: flags beside its settings.
    """

    name: str
    title: str
    command: str
    settings: str
    reward: RewardModel | None = RM
    options: tuple[str, ...] = ()

    @property
    def server(self) -> str:
        """Name of the reward server that it needs."""
        return "judge" if self.reward is None else self.reward.name


def reward_models_of(arms: Sequence[Arm]) -> list[RewardModel]:
    """The reward models that the arms need, each once."""
    return list(dict.fromkeys(arm.reward for arm in arms if arm.reward is not None))


def head_to_head(one: Arm, other: Arm) -> str:
    """Where the comparison of two arms is, under a seed's `eval`."""
    return f"{one.name}-over-{other.name}"
