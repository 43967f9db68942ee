"""Settings of `rlaif lab`. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from rlaif.errors import ConfigError

StudyName = Literal["labelers", "rewards", "noise", "soft", "overoptimisation", "methods"]


@dataclass(frozen=True, kw_only=True)
class LabConfig:
    """Studies in the embedded world, where gold utility is known: what labels and rewards are worth.

    Each runs commands that you would type, over several seeds, and writes tables and plots: Markdown and HTML.
    """

    study: tuple[StudyName, ...]
    """Which: labelers (size of the judge, and how it is asked), rewards (distilled, direct, people's), noise (soft and
    hard labels by share of wrong ones), soft (the same at one share, all labels), overoptimisation (reward and gold
    against KL), methods (PPO, RLOO, GRPO, DPO, best of n on equal budgets)."""
    output_dir: Path = Path("runs/lab")
    """Everything goes here; the same command again goes on where it stopped, and takes up seeds and studies."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each decides posts, samples, labels' candidates, reward models and training."""
    docs: Path | None = None
    """Folder whose STUDY.md gets the findings, between its marks, and whose images/ gets the plots."""
    num_prompts: int = 800
    """Posts to label and to train on."""
    num_eval_prompts: int = 300
    """Unseen posts on which policies are compared."""
    num_pairs: int = 400
    """Pairs that gold has labelled, to measure judges and reward models on."""
    max_steps: int | None = None
    """Steps of every training run of a policy, instead of those of its settings."""
    processes: int = 2
    """Commands that run side by side, each on one core."""

    VOLATILE: ClassVar[frozenset[str]] = frozenset({"study", "output_dir", "seeds", "docs", "processes"})
    """What may differ when a folder is gone on with."""

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to do or a stage without data.

        Raises:
            ConfigError: a value is out of range, or something is named twice.
        """
        for name in ("study", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(
                    f"--{name} wants one or more, each once, not {' '.join(map(str, values))!r}"
                )
        for name in ("num_prompts", "num_eval_prompts", "num_pairs"):
            if getattr(self, name) < 8:
                raise ConfigError(f"--{name} {getattr(self, name)} is too few: give 8 or more")
        if self.max_steps is not None and self.max_steps < 1:
            raise ConfigError(f"--max_steps {self.max_steps} must be 1 or more")
        if self.processes < 1:
            raise ConfigError(f"--processes {self.processes} must be 1 or more")
