"""Settings of `rlaif demo`."""

from __future__ import annotations

from dataclasses import dataclass

from rlaif.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Run the whole loop in the embedded world: sample, label, train, serve, align, report."""

    output_dir: str = "runs/demo"
    """Everything goes here; the same command again goes on where it stopped."""
    seed: int = 0
    """Seed of posts, sampling and training."""
    num_prompts: int = 800
    """Posts to label and to train on."""
    num_eval_prompts: int = 300
    """Unseen posts on which the policies are compared."""
    ppo_steps: int = 40
    """PPO steps of each of the two runs (distilled and direct)."""
    dpo_rounds: int = 10
    """Rounds of iterative DPO."""

    def __post_init__(self) -> None:
        """Refuse sizes that leave a stage without data."""
        for name in ("num_prompts", "num_eval_prompts"):
            if getattr(self, name) < 8:
                raise ConfigError(f"--{name} {getattr(self, name)} is too few: give 8 or more")
        for name in ("ppo_steps", "dpo_rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be 1 or more")
