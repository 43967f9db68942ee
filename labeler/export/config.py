"""Settings of `rlaif export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from labeler.config import share
from rlaif.errors import ConfigError

Format = Literal["trl-preference", "trl-unpaired", "trl-reward", "jsonl", "parquet"]
SUFFIXES = (".parquet", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write labelled pairs in the shape that a trainer reads, into a file, to the Hugging Face hub, or both."""

    dataset: str
    """Labelled pairs: the output_dir of `rlaif label pairs|rank`, or a preference file, JSONL, JSON, CSV or Parquet."""
    format: Format = "trl-preference"
    """trl-preference: prompt, chosen, rejected (DPO and others). trl-unpaired: prompt, completion, label (KTO).
    trl-reward: the former with a margin (RewardTrainer). jsonl, parquet: all columns."""
    output_file: str | None = None
    """Where to write: .parquet or .jsonl. With --split, FILE-train and FILE-test."""
    push_to_hub: str | None = None
    """Dataset repository on the hub, e.g. my-name/my-preferences; made if missing. The token comes from `hf auth login`
    or HF_TOKEN, the hub from HF_ENDPOINT."""
    private: bool = False
    """Make a repository that is created private."""
    commit_message: str = "Upload preferences"
    """Of the commit on the hub."""
    min_margin: float = 0.0
    """Keep pairs whose 2 chosen_prob - 1 is at least this, from 0 to 1."""
    ties: Literal["drop", "keep"] = "drop"
    """What to do with pairs whose label is exactly 1/2; neither of their responses is the better one."""
    split: float = 0.0
    """Hold out this share of the prompts, chosen by a hash of the prompt: all pairs of a prompt fall on one side, in
    every export of every dataset."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        share(self, "min_margin")
        if not 0 <= self.split < 1:
            raise ConfigError(
                f"--split {self.split} cannot be: give a share of the prompts below 1, e.g. 0.05"
            )
        if self.output_file is None and self.push_to_hub is None:
            raise ConfigError("`rlaif export` needs --output_file FILE, --push_to_hub REPO, or both")
        if self.output_file is not None and self.suffix not in SUFFIXES:
            raise ConfigError(f"--output_file {self.output_file} must end in .parquet or .jsonl")
        if self.format in ("jsonl", "parquet") and self.suffix != f".{self.format}":
            raise ConfigError(
                f"--output_file {self.output_file} does not end in .{self.format}, which --format says"
            )
        if self.ties == "keep" and self.format == "trl-unpaired":
            raise ConfigError(
                "--ties keep cannot be with trl-unpaired: a tied pair says of neither that it is good"
            )

    @property
    def suffix(self) -> str:
        """How the data files end: `.parquet` or `.jsonl`."""
        if self.output_file is not None:
            return Path(self.output_file).suffix
        return ".jsonl" if self.format == "jsonl" else ".parquet"
