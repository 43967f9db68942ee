"""When does a policy that earns more reward become worse?"""

from __future__ import annotations

from tinyworld.lab.arms import Arm
from tinyworld.lab.policies import PolicyStudy

STUDY = PolicyStudy(
    "overoptimisation",
    "Over-optimisation of a reward model that saw few labels",
    (
        Arm("no-kl", "without KL term", "ppo", "long", "rm-fifth", ("--kl_coef", "0")),
        Arm("with-kl", "with KL term", "ppo", "long", "rm-fifth"),
    ),
    curves=True,
)
