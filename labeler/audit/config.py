"""Settings of `rlaif eval judge`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from labeler.audit.variants import parse_variants
from labeler.config import JudgeConfig, RequestConfig, at_least
from rlaif.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(JudgeConfig):
    """Measure a judge on pairs with human labels: agreement beside kappa, biases, calibration, resistance to attacks.

    Give a judge and a dataset (asks, and keeps every reply), or the labels of an earlier run.
    """

    judge: tuple[str, ...] = ()
    """The judge: openai:NAME@BASE_URL, vllm:NAME_OR_PATH, hf:NAME_OR_PATH, tinyworld:judge. Several form a jury."""
    dataset: str = ""
    """Pairs with human labels, a file, folder or quoted pattern: chosen and rejected, or two responses and a label."""
    labels: str | None = None
    """Labels to measure instead of asking: a directory of `rlaif label pairs`, or a file with chosen_prob. Human
    labels are read from it, or from --dataset where that is given too."""
    baseline: Literal["longer", "shorter", "formatted"] | None = None
    """A rule in the judge's place: the longer, the shorter or the more formatted response wins."""
    rubric: str = "helpfulness-pair"
    """How the judge is asked: a preset, tinyworld:pair, or a YAML file."""
    orders: Literal["both", "one"] = "both"
    """Show each pair in both orders, or in one alone."""
    combine: Literal["mean_prob", "mean_logit"] = "mean_prob"
    """How the two orders are averaged."""
    variants: tuple[str, ...] = ()
    """Compare ways of asking: preamble=base,detailed cot=on,off exemplars=0,1,2 orders=both,one rationales=1,4."""
    calibrate: Literal["temperature", "isotonic"] | None = None
    """Fit a map to the probabilities at which people agree, and write calibration.json for `label pairs`."""
    canaries: int = 0
    """Attack so many of the pairs: every canary is tried on the response that people reject."""
    policy: tuple[str, ...] = ()
    """Models that wrote the responses, where the rows do not say; the judge's relatives are named."""
    resamples: int = 1000
    """Bootstrap resamples of the intervals."""

    VOLATILE: ClassVar[frozenset[str]] = RequestConfig.VOLATILE | {
        "combine", "jury", "quorum", "variants", "calibrate", "canaries", "policy", "resamples"
    }  # fmt: skip
    """Findings are made anew from the replies, and what was not asked yet is added to them."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if sum(map(bool, (self.judge, self.labels, self.baseline))) != 1:
            raise ConfigError("say what to measure: one of --judge, --labels and --baseline")
        if self.judge:
            super().__post_init__()
        else:
            RequestConfig.__post_init__(self)
        if not self.dataset and not self.labels:
            raise ConfigError("--dataset is needed: pairs with human labels, JSONL, JSON, CSV or Parquet")
        if (self.variants or self.calibrate) and self.baseline:
            raise ConfigError("a --baseline has no variants and no probabilities to calibrate")
        if (self.variants or self.canaries) and self.labels:
            raise ConfigError("--variants and --canaries ask a judge: give --judge instead of --labels")
        if self.variants and (self.calibrate or self.canaries):
            raise ConfigError("--variants compares; give --calibrate or --canaries with the one you choose")
        if not self.rationale_temperature and any(
            (v.rationales or 1) > 1 for v in parse_variants(self.variants)
        ):
            raise ConfigError(
                "--variants rationales= above 1 would ask for the same greedy rationale again and again: "
                "give --rationale_temperature, e.g. 0.7"
            )
        at_least(self, 0, "canaries")
        at_least(self, 2, "resamples")
