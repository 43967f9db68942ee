"""Are soft labels worth it? All labels of a labeler that errs on a quarter of them, soft against hard."""

from __future__ import annotations

from tinyworld.lab.arms import Arm, Labels, RewardModel
from tinyworld.lab.policies import PolicyStudy

NOISY = Labels("noise", "noisy.jsonl", "tinyworld.lab.noisy_labeler", ("--wrong", "0.25", "--seed", "{seed}"))
SOFT = Arm("rloo-soft", "soft labels", "ppo", "rloo", RewardModel("rm-soft", "noisy soft labels", NOISY))
HARD = Arm(
    "rloo-hard",
    "hard labels",
    "ppo",
    "rloo",
    RewardModel("rm-hard", "the same, hard", NOISY, ("--loss_type", "bradley_terry")),
)

STUDY = PolicyStudy(
    "soft",
    "Soft against hard labels of a labeler that errs on a quarter",
    (SOFT, HARD),
    versus=((SOFT, HARD),),
)
