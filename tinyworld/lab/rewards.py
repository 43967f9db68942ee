"""Is a reward model needed? The judge's own scores as the reward, against the model distilled from its labels."""

from __future__ import annotations

from tinyworld.lab.arms import Arm
from tinyworld.lab.methods import RLOO
from tinyworld.lab.policies import PolicyStudy

DIRECT = Arm("rloo-direct", "RLOO, direct", "ppo", "rloo", "judge")

STUDY = PolicyStudy(
    "rewards",
    "Direct reward, the judge's own scores, against distilled, the reward model",
    (DIRECT, RLOO),
    versus=((DIRECT, RLOO),),
)
