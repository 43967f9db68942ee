"""Which method learns most from the same number of responses?"""

from __future__ import annotations

from tinyworld.lab.arms import Arm
from tinyworld.lab.policies import PolicyStudy

RLOO = Arm("rloo", "RLOO", "ppo", "rloo")
METHODS = (
    Arm("ppo", "PPO", "ppo", "ppo"),
    RLOO,
    Arm("grpo", "GRPO", "ppo", "grpo"),
    Arm("online-dpo", "online DPO", "dpo", "online-dpo"),
    Arm("iterative-dpo", "iterative DPO", "dpo", "iterative-dpo"),
    Arm("best-of-n", "best of n", "best_of_n", "best-of-n"),
)

STUDY = PolicyStudy(
    "methods",
    "Methods against the same reward model, on equal numbers of responses",
    METHODS,
    curves=True,
)
