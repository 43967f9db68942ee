"""What are soft labels worth when the labeler errs?"""

from __future__ import annotations

from tinyworld.lab.arms import Arm
from tinyworld.lab.policies import PolicyStudy

WRONG_LABELS = 0.25

SOFT = Arm("rloo-soft", "soft labels", "ppo", "rloo", "rm-soft")
HARD = Arm("rloo-hard", "hard labels", "ppo", "rloo", "rm-hard")

STUDY = PolicyStudy(
    "noise",
    f"Soft against hard labels of a labeler that errs on {WRONG_LABELS:.0%}",
    (SOFT, HARD),
    versus=((SOFT, HARD),),
)
