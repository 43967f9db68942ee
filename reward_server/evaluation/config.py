"""The flags of `rlaif eval rm`. Imports neither torch nor grpc."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from rlaif.errors import ConfigError


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a reward model on labelled pairs or scored responses: accuracy, log loss, calibration, length bias."""

    model: str
    """Whatever `rlaif serve --model` takes: a folder of `rlaif train rm`, any sequence classifier with one output, or a
    .yaml file with parts and a rule, such as an ensemble."""
    dataset: Path
    """Labelled pairs (a folder of `rlaif label pairs`, JSONL, JSON, CSV or Parquet), or responses with scores."""
    output_dir: Path
    """Where metrics.json and report.md go."""
    subset_column: str | None = None
    """Column of a row's subset; each gets a line. By default `subset`, `category` or `group`, if there is one."""
    limit: int | None = None
    """Measure the first n rows alone."""
    resamples: int = 1000
    """Bootstrap resamples of the intervals."""
    device: str = "auto"
    """Where the model runs: cpu, cuda, cuda:1 ...; auto takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format; auto keeps the checkpoint's on a GPU and takes float32 on a CPU."""
    max_length: int | None = None
    """Longest conversation in tokens; longer ones lose the oldest tokens of their prompt. By default the model's."""
    max_batch_tokens: int = 8192
    """Most tokens of a batch, padding included."""

    VOLATILE: ClassVar[frozenset[str]] = frozenset(
        {"subset_column", "limit", "resamples", "device", "dtype", "max_batch_tokens"}
    )
    """Findings are made anew by every run."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name, least in (("resamples", 2), ("max_batch_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        for name, least in (("limit", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name} must be at least {least}, not {value}")
