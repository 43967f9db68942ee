"""Settings of `rlaif sample`, `rlaif label pairs` and `rlaif label scores`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rlaif.errors import ConfigError
from rlaif.models import ModelRef


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Sample candidates from a policy: several responses per prompt, each with its own seed."""

    model_name_or_path: str
    """The policy: hf:NAME_OR_PATH, openai:NAME@BASE_URL, tinyworld:policy."""
    dataset: str
    """Prompts, JSONL or Parquet."""
    output_dir: str
    """Where candidates.parquet goes; the same command again goes on where it stopped."""
    num_return_sequences: int = 4
    """Responses per prompt."""
    temperature: float = 1.0
    """Sampling temperature; 0 decodes greedily."""
    max_new_tokens: int = 256
    """Longest response, in tokens."""
    limit: int | None = None
    """Use only the first so many prompts."""
    seed: int = 0
    """Every response is a function of this seed, its prompt and its number."""
    max_in_flight: int = 128
    """Requests at a time; rows of a batch for a local model."""
    timeout_s: float = 120.0
    """Seconds before one request to an endpoint counts as failed."""
    max_retries: int = 5
    """Further attempts after a transient failure of an endpoint."""
    max_unlabelled: float = 0.05
    """Exit with code 8 if a larger share of responses could not be had."""

    VOLATILE: ClassVar[frozenset[str]] = frozenset(
        {"limit", "max_in_flight", "timeout_s", "max_retries", "max_unlabelled"}
    )

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        ModelRef.parse(self.model_name_or_path)
        _at_least(1, self, "num_return_sequences", "max_new_tokens", "max_in_flight", "limit")
        _at_least(0, self, "temperature", "max_retries")
        _check_common(self.timeout_s, self.max_unlabelled)


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Compare responses with a judge, in both orders, and write a preference dataset with soft labels."""

    judge: str
    """The judge: openai:NAME@BASE_URL, hf:NAME_OR_PATH, tinyworld:judge."""
    dataset: str
    """Pairs or candidates, JSONL or Parquet; candidates of one prompt are paired."""
    output_dir: str
    """Where preferences.parquet goes; the same command again goes on where it stopped."""
    rubric: str = "helpfulness-pair"
    """How the judge is asked: a preset, tinyworld:pair, or a YAML file."""
    cot: bool = True
    """Ask for a rationale before the label."""
    num_exemplars: int = 0
    """Show the judge the first so many worked examples of the rubric."""
    max_rationale_tokens: int = 512
    """Longest rationale; a longer one is cut and the label asked for."""
    combine: Literal["mean_prob", "mean_logit"] = "mean_prob"
    """How the two orders are averaged: the paper's mean probability, or mean log-odds."""
    pairs_per_prompt: int = 0
    """With candidates: so many pairs per prompt, drawn at random; 0 for all pairs."""
    ties: Literal["drop", "keep"] = "drop"
    """What to do with pairs whose label is exactly 1/2."""
    max_unlabelled: float = 0.05
    """Exit with code 8 if a larger share of pairs stays unlabelled."""
    limit: int | None = None
    """Label only the first so many pairs."""
    seed: int = 0
    """Decides which pairs of candidates are drawn."""
    max_in_flight: int = 64
    """Pairs at a time; each asks about both orders."""
    timeout_s: float = 120.0
    """Seconds before one request to an endpoint counts as failed."""
    max_retries: int = 5
    """Further attempts after a transient failure of an endpoint."""

    VOLATILE: ClassVar[frozenset[str]] = frozenset(
        {"ties", "max_unlabelled", "limit", "max_in_flight", "timeout_s", "max_retries"}
    )

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        ModelRef.parse(self.judge)
        _at_least(1, self, "max_rationale_tokens", "max_in_flight", "limit")
        _at_least(0, self, "num_exemplars", "pairs_per_prompt", "max_retries")
        _check_common(self.timeout_s, self.max_unlabelled)


@dataclass(frozen=True, kw_only=True)
class ScoresConfig:
    """Score responses from 1 to 10 with a judge: the expectation over the score tokens."""

    judge: str
    """The judge: openai:NAME@BASE_URL, hf:NAME_OR_PATH, tinyworld:judge."""
    dataset: str
    """Conversations that end with an answer, or candidates; JSONL or Parquet."""
    output_dir: str
    """Where scores.parquet goes; the same command again goes on where it stopped."""
    rubric: str = "helpfulness-score"
    """How the judge is asked: a preset, tinyworld:score, or a YAML file."""
    cot: bool = False
    """Ask for a rationale before the score; direct RLAIF asks for the score at once."""
    num_exemplars: int = 0
    """Show the judge the first so many worked examples of the rubric."""
    max_rationale_tokens: int = 512
    """Longest rationale; a longer one is cut and the score asked for."""
    max_unlabelled: float = 0.05
    """Exit with code 8 if a larger share of responses stays without a score."""
    limit: int | None = None
    """Score only the first so many responses."""
    seed: int = 0
    """Seed of sampled decoding; rationales are decoded greedily and do not depend on it."""
    max_in_flight: int = 128
    """Responses at a time."""
    timeout_s: float = 120.0
    """Seconds before one request to an endpoint counts as failed."""
    max_retries: int = 5
    """Further attempts after a transient failure of an endpoint."""

    VOLATILE: ClassVar[frozenset[str]] = frozenset(
        {"max_unlabelled", "limit", "max_in_flight", "timeout_s", "max_retries"}
    )

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        ModelRef.parse(self.judge)
        _at_least(1, self, "max_rationale_tokens", "max_in_flight", "limit")
        _at_least(0, self, "num_exemplars", "max_retries")
        _check_common(self.timeout_s, self.max_unlabelled)


def _at_least(least: int, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value} cannot be: give {least} or more")


def _check_common(timeout_s: float, max_unlabelled: float) -> None:
    if not timeout_s > 0:
        raise ConfigError(f"--timeout_s {timeout_s} cannot be: give seconds above 0")
    if not 0 <= max_unlabelled <= 1:
        raise ConfigError(f"--max_unlabelled {max_unlabelled} is a share: give a number from 0 to 1")
