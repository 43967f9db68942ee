"""The studies as data: which policies are trained, how, and what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WRONG_LABELS = 0.25
"""Share of labels that the noisy labeler turns; see `noise`."""

NOISY = "noisy.jsonl"
"""Its labels, in a seed's folder."""

ALL = "all"
"""Where the evaluation of every arm beside the SFT policy is, under a seed's `eval`."""


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
class Study:
    """Arms to compare.

    Attributes:
        name: for the command line and for pictures.
        title: a heading.
        arms: what is compared.
        curves: whether the report draws how they learned.
        versus: whether the others are also compared with the last one, response by response.
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    curves: bool = False
    versus: bool = False


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A reward model to be trained.

    Attributes:
        title: what it learned from, for the report.
        labels: its dataset, in a seed's folder.
        options: flags beside its settings, `configs/rm.yaml`.
    """

    title: str
    labels: str
    options: tuple[str, ...] = ()


REWARD_MODELS = {
    "rm": RewardModel("the judge's soft labels", "labels"),
    "rm-fifth": RewardModel("a fifth of them", "labels", ("--eval_fraction", "0.8")),
    "rm-soft": RewardModel("noisy soft labels", NOISY),
    "rm-hard": RewardModel("the same, hard", NOISY, ("--loss_type", "bradley_terry")),
}

RLOO = Arm("rloo", "RLOO", "ppo", "rloo")
METHODS = (
    Arm("ppo", "PPO", "ppo", "ppo"),
    RLOO,
    Arm("grpo", "GRPO", "ppo", "grpo"),
    Arm("online-dpo", "online DPO", "dpo", "online-dpo"),
    Arm("iterative-dpo", "iterative DPO", "dpo", "iterative-dpo"),
    Arm("best-of-n", "best of n", "best_of_n", "best-of-n"),
)
STUDIES = (
    Study(
        "methods",
        "Methods, against the same reward model, with equal numbers of responses",
        METHODS,
        curves=True,
    ),
    Study(
        "direct",
        "Direct reward, the judge's own scores, against distilled, the reward model",
        (Arm("rloo-direct", "RLOO, direct", "ppo", "rloo", "judge"), RLOO),
        versus=True,
    ),
    Study(
        "soft",
        f"Soft against hard labels of a labeler that errs on {WRONG_LABELS:.0%}",
        (
            Arm("rloo-soft", "soft labels", "ppo", "rloo", "rm-soft"),
            Arm("rloo-hard", "hard labels", "ppo", "rloo", "rm-hard"),
        ),
        versus=True,
    ),
    Study(
        "overoptimisation",
        "Over-optimisation of a reward model that saw few labels",
        (
            Arm("no-kl", "without KL term", "ppo", "long", "rm-fifth", ("--kl_coef", "0")),
            Arm("with-kl", "with KL term", "ppo", "long", "rm-fifth"),
        ),
        curves=True,
    ),
)


def arms_of(studies: Sequence[Study]) -> list[Arm]:
    """The arms of the studies, each once."""
    return list(dict.fromkeys(arm for study in studies for arm in study.arms))


def reward_models_of(arms: Sequence[Arm]) -> dict[str, RewardModel]:
    """The reward models that the arms need, by name."""
    rewards = {arm.reward for arm in arms}
    return {name: model for name, model in REWARD_MODELS.items() if name in rewards}
