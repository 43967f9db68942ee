"""The flags of `rlaif eval policy`. Imports neither torch, grpc nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from policy_trainer.config import require
from rlaif.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvaluatePolicyConfig:
    """Compare policies with a baseline: win rates, length-controlled too, and reward against KL.

    A policy is a model, or recorded responses: a .jsonl or .parquet file, or a folder of `rlaif sample`.
    """

    dataset: Path
    """Prompts to answer: JSONL, JSON, CSV or Parquet."""
    output_dir: Path
    """Where metrics.json, report.md and the frontier's plot go, and where responses and judgments are kept."""
    model_name_or_path: tuple[str, ...] = ()
    """Policies: a path, hf:NAME_OR_PATH, tinyworld:policy, or recorded responses."""
    runs: tuple[Path, ...] = ()
    """Run directories of `rlaif train`; each of their checkpoints is a policy (train with --save_total_limit None)."""
    baseline: str | None = None
    """The policy that the others are compared with, named as they are. By default the reference of the first run."""
    judge_server: str | None = None
    """HOST:PORT of a reward server that compares (`rlaif serve --judge ... --pair_rubric ...`): in both orders."""
    reward_server: str | None = None
    """HOST:PORT of a reward server that scores: the higher score wins."""
    reward_function: str | None = None
    """MODULE:FUNCTION that scores, function(prompts, responses) -> list of float or None; tinyworld.gold:rewards."""
    ref_model: str | None = None
    """What the KL of models is measured against. By default the reference of the run that made a model, if any."""
    on_inconsistent: Literal["keep", "tie"] = "keep"
    """Pairs of which both orders prefer the same position: keep the mean of the two, or call them ties."""
    limit: int | None = None
    """Take the first n prompts alone."""
    temperature: float = 1.0
    """Sampling temperature. KL is measured at the same temperature."""
    max_new_tokens: int = 128
    """Longest response in tokens, EOS included."""
    max_prompt_length: int = 512
    """Longest prompt in tokens; longer ones lose their oldest tokens."""
    seed: int = 0
    """Decides the samples."""
    chat_template: str | None = None
    """Chat template: `plain`, `transcript` or a Jinja file. By default the tokenizer's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights."""
    generation_batch_size: int = 128
    """Most sequences decoded at once."""
    micro_batch_tokens: int = 8192
    """Padded tokens in one forward pass of the reference."""
    max_missing: float = 0.1
    """Exit with an error if a larger share of a policy's comparisons is missing; the report is written all the same."""
    resamples: int = 1000
    """Bootstrap resamples of the intervals."""
    batch_size: int = 64
    """Questions to a server that are journalled together."""
    max_in_flight: int = 4
    """Requests to a server at a time."""
    timeout_s: float = 120.0
    """Deadline of one request, in seconds."""
    give_up_after_s: float = 300.0
    """How long an unavailable server is waited for, in seconds."""

    VOLATILE: ClassVar[frozenset[str]] = frozenset(
        {
            "model_name_or_path", "runs", "baseline", "judge_server", "reward_server", "reward_function", "ref_model",
            "on_inconsistent", "micro_batch_tokens", "max_missing", "resamples", "batch_size", "max_in_flight",
            "timeout_s", "give_up_after_s",
        }
    )  # fmt: skip
    """Findings are made anew from what is kept; policies and judges may be added."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: a value is out of range, or there is nothing to compare or nobody to judge.
        """
        if not self.model_name_or_path and not self.runs:
            raise ConfigError(
                "say which policies: --model_name_or_path, or --runs for all checkpoints of a run"
            )
        if self.baseline is None and not self.runs:
            raise ConfigError("say what to compare with: --baseline, a model or recorded responses")
        if not any((self.judge_server, self.reward_server, self.reward_function)):
            raise ConfigError("say who judges: --judge_server, --reward_server or --reward_function")
        require(self.temperature > 0, "temperature", self.temperature, "positive")
        require(self.max_prompt_length > 1, "max_prompt_length", self.max_prompt_length, "at least 2")
        require(0 <= self.max_missing < 1, "max_missing", self.max_missing, "in [0, 1)")
        require(self.resamples > 1, "resamples", self.resamples, "at least 2")
        require(self.limit is None or self.limit > 0, "limit", self.limit, "at least 1")
        for name in (
            "max_new_tokens",
            "generation_batch_size",
            "micro_batch_tokens",
            "batch_size",
            "max_in_flight",
        ):
            require(getattr(self, name) > 0, name, getattr(self, name), "at least 1")
        require(self.timeout_s > 0, "timeout_s", self.timeout_s, "positive")
        require(self.give_up_after_s >= 0, "give_up_after_s", self.give_up_after_s, "at least 0")
