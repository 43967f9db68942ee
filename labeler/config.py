"""Settings of the labeler's commands: `rlaif sample`, `rlaif label pairs|scores|rank|revise|status`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlaif.errors import ConfigError
from rlaif.models import ModelRef

if TYPE_CHECKING:
    from labeler.budget import Price
    from labeler.judge import Recipe
    from labeler.llm import LLMOptions


@dataclass(frozen=True, kw_only=True)
class RequestConfig:
    """What every command that asks models has in common."""

    dataset: str
    """Input rows, JSONL, JSON, CSV or Parquet."""
    output_dir: str
    """The run directory; the same command again goes on where it stopped."""
    limit: int | None = None
    """Use only the first so many: prompts, pairs (also those made of candidates) or responses."""
    reuse: str | None = None
    """Another run directory: its replies answer equal requests without being paid for again."""
    max_in_flight: int = 64
    """Requests at a time; rows of a batch for a local model."""
    adaptive: bool = True
    """With an endpoint: begin with fewer requests, grow while it keeps up, shrink when it answers 429."""
    requests_per_minute: int | None = None
    """Cap on requests to an endpoint."""
    tokens_per_minute: int | None = None
    """Cap on tokens to and from an endpoint."""
    timeout_s: float = 120.0
    """Seconds before one request to an endpoint counts as failed."""
    max_retries: int = 5
    """Further attempts after a transient failure of an endpoint."""
    max_unlabelled: float = 0.05
    """Exit with code 8 if a larger share of rows stays without an answer."""
    price_per_million: tuple[float, ...] | None = None
    """USD per million prompt and completion tokens, e.g. 0.15 0.6; a third number is for cached prompt tokens."""
    max_cost: float | None = None
    """Stop, with code 10, before the replies of this run directory cost more USD; needs --price_per_million."""
    batch: bool = False
    """Ask openai: models through OpenAI's Batch API: half the price, within a day; give its prices for --max_cost."""
    batch_size: int = 50_000
    """Most requests of a batch."""
    batch_interval_s: float = 60.0
    """Seconds between two looks at the batches."""
    dry_run: bool = False
    """Send nothing that costs: count the tokens that are still to be paid for, and estimate cost and time."""
    tokenizer: str | None = None
    """Tokenizer of the dry run for an endpoint that has none to offer, a Hugging Face name or path."""
    expected_tokens: int | None = None
    """Tokens that the dry run expects of a generated text; without it, the mean on record, or else 128."""

    VOLATILE: ClassVar[frozenset[str]] = frozenset(
        {"limit", "reuse", "max_in_flight", "adaptive", "requests_per_minute", "tokens_per_minute", "timeout_s",
         "max_retries", "max_unlabelled", "price_per_million", "max_cost", "dry_run", "tokenizer", "expected_tokens",
         "batch", "batch_size", "batch_interval_s"}
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        at_least(
            self,
            1,
            "max_in_flight",
            "limit",
            "requests_per_minute",
            "tokens_per_minute",
            "expected_tokens",
            "batch_size",
        )
        at_least(self, 0, "max_retries", "max_cost", "batch_interval_s")
        if self.batch_size > 50_000:
            raise ConfigError(f"--batch_size {self.batch_size} cannot be: a batch has at most 50000 requests")
        prices = self.price_per_million
        if prices is not None and (
            len(prices) not in (2, 3) or not all(0 <= p < float("inf") for p in prices)
        ):
            raise ConfigError(
                f"--price_per_million {' '.join(f'{p:g}' for p in prices)} cannot be: give USD per million prompt and "
                "completion tokens, and of cached prompt tokens if they differ, e.g. 0.15 0.6 0.075"
            )
        if self.max_cost is not None and prices is None:
            raise ConfigError("--max_cost needs prices: give --price_per_million IN OUT, e.g. 0.15 0.6")
        if not self.timeout_s > 0:
            raise ConfigError(f"--timeout_s {self.timeout_s} cannot be: give seconds above 0")
        share(self, "max_unlabelled")

    def price(self) -> Price | None:
        """What tokens cost, where it was told."""
        from labeler.budget import Price

        return None if self.price_per_million is None else Price(*self.price_per_million)

    def llm_options(self) -> LLMOptions:
        """How the back ends run."""
        from labeler.llm import LLMOptions

        return LLMOptions(
            max_in_flight=self.max_in_flight,
            adaptive=self.adaptive,
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            timeout_s=self.timeout_s,
            max_retries=self.max_retries,
        )


@dataclass(frozen=True, kw_only=True)
class SampleConfig(RequestConfig):
    """Sample candidates from one or more policies: several responses per prompt, each with its own seed."""

    model_name_or_path: tuple[str, ...]
    """The policies: hf:NAME_OR_PATH, vllm:NAME_OR_PATH, openai:NAME@BASE_URL, tinyworld:policy. With several, each
    prompt gets responses of all of them, in turn."""
    num_return_sequences: int = 4
    """Responses per prompt, over all policies together."""
    all_turns: bool = False
    """Answer all user turns of rows with `turns` (MT-bench), one after the other, and write answers.jsonl in FastChat's
    shape instead of candidates."""
    temperature: float = 1.0
    """Sampling temperature; 0 decodes greedily."""
    max_new_tokens: int = 256
    """Longest response, in tokens."""
    seed: int = 0
    """Every response is a function of this seed, its prompt and its number."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        super().__post_init__()
        _models(self, "model_name_or_path")
        at_least(self, 1, "num_return_sequences", "max_new_tokens")
        at_least(self, 0, "temperature")
        if self.num_return_sequences < (policies := len(self.model_name_or_path)):
            raise ConfigError(
                f"--num_return_sequences {self.num_return_sequences} leaves policies unasked: give {policies} or more, "
                f"one for each of {policies}"
            )


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(RequestConfig):
    """Who judges, and how a label comes from the replies."""

    judge: tuple[str, ...]
    """The judge: openai:NAME@BASE_URL, vllm:NAME_OR_PATH, hf:NAME_OR_PATH, tinyworld:judge. Several form a jury."""
    preamble: str | None = None
    """Which of the rubric's preambles opens the question; the first if not given."""
    cot: bool = True
    """Ask for a rationale before the label."""
    num_exemplars: int = 0
    """Show the judge the first so many worked examples of the rubric."""
    max_rationale_tokens: int = 512
    """Longest rationale; a longer one is cut and the label asked for."""
    num_rationales: int = 1
    """Rationales per question, their label distributions averaged (self-consistency; the paper found that it hurts)."""
    rationale_temperature: float = 0.0
    """Temperature of the rationales; 0 is greedy."""
    fallback: Literal["refuse", "samples", "verdict"] = "refuse"
    """For a judge without log-probabilities: sample the label, or ask for one graded verdict."""
    num_samples: int = 8
    """Samples of the label, with --fallback samples."""
    max_verdict_tokens: int = 16
    """Longest sampled label; a model that thinks aloud first needs many."""
    jury: Literal["mean", "median", "logit_mean", "majority"] = "mean"
    """How the votes of several judges become one label."""
    quorum: int | None = None
    """Least number of votes for a label; more than half of the jury if not given."""
    seed: int = 0
    """Decides sampled decoding, drawn pairs and drawn principles."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        super().__post_init__()
        _models(self, "judge")
        at_least(
            self, 1, "max_rationale_tokens", "num_rationales", "num_samples", "max_verdict_tokens", "quorum"
        )
        at_least(self, 0, "num_exemplars", "rationale_temperature")
        if self.num_rationales > 1 and not self.rationale_temperature:
            raise ConfigError(
                f"--num_rationales {self.num_rationales} would ask for the same greedy rationale again and again: "
                "give --rationale_temperature, e.g. 0.7"
            )
        if self.quorum is not None and self.quorum > len(self.judge):
            raise ConfigError(f"--quorum {self.quorum} cannot be: there are {len(self.judge)} judges")

    def recipe(self, **more: Any) -> Recipe:
        """The judge's recipe."""
        from labeler.judge import Recipe

        return Recipe(
            max_rationale_tokens=self.max_rationale_tokens,
            num_rationales=self.num_rationales,
            rationale_temperature=self.rationale_temperature,
            fallback=self.fallback,
            num_samples=self.num_samples,
            max_verdict_tokens=self.max_verdict_tokens,
            seed=self.seed,
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class PairsConfig(JudgeConfig):
    """Compare responses with a judge, in both orders, and write a preference dataset with soft labels.

    The dataset holds pairs, or candidates, which are paired within each prompt.
    """

    rubric: str = "helpfulness-pair"
    """How the judge is asked: a preset, tinyworld:pair, or a YAML file."""
    orders: Literal["both", "one"] = "both"
    """Show each pair in both orders, or in one alone: half the price, and the judge's position bias."""
    combine: Literal["mean_prob", "mean_logit"] = "mean_prob"
    """How the two orders are averaged: the paper's mean probability, or mean log-odds."""
    pairs_per_prompt: int = 0
    """With candidates: so many pairs per prompt, drawn at random; 0 for all pairs."""
    calibration: str | None = None
    """A calibration.json of `rlaif eval judge --calibrate`, applied to every label."""
    clamp: tuple[float, float] | None = None
    """Keep labels between two probabilities, e.g. 0.4 0.6 (Constitutional AI, with chain of thought)."""
    on_inconsistent: Literal["keep", "tie", "drop"] = "keep"
    """What to do with pairs of which both orders prefer the same position. Dropped ones go to dropped.parquet."""
    ties: Literal["drop", "keep"] = "drop"
    """What to do with pairs whose label is exactly 1/2. Dropped ones go to dropped.parquet."""

    VOLATILE: ClassVar[frozenset[str]] = RequestConfig.VOLATILE | {
        "ties", "combine", "calibration", "clamp", "on_inconsistent", "jury", "quorum"
    }  # fmt: skip
    """Labels are made anew from the replies, so how they are combined may change at no cost."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        super().__post_init__()
        at_least(self, 0, "pairs_per_prompt")
        if self.clamp is not None:
            low, high = self.clamp
            if not (0 <= low < high <= 1 and abs(low + high - 1) < 1e-9):
                raise ConfigError(
                    f"--clamp {low:g} {high:g} cannot be: give two probabilities that add up to 1, e.g. 0.4 0.6, "
                    "so that a pair and its swap stay complements"
                )


@dataclass(frozen=True, kw_only=True)
class RankConfig(PairsConfig):
    """Rank several responses per prompt: all their pairs are compared, and Bradley-Terry strengths fitted.

    Writes rankings.parquet beside the preference dataset, and a leaderboard of the models that wrote them.
    """

    resamples: int = 1000
    """Bootstrap resamples of the leaderboard's intervals."""

    VOLATILE: ClassVar[frozenset[str]] = PairsConfig.VOLATILE | {"resamples"}

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        super().__post_init__()
        at_least(self, 2, "resamples")


@dataclass(frozen=True, kw_only=True)
class ScoresConfig(JudgeConfig):
    """Score responses with a judge: the expectation over the score tokens of an ordered scale.

    The dataset holds conversations that end with an answer, or candidates.
    """

    rubric: tuple[str, ...] = ("helpfulness-score",)
    """How the judge is asked: presets, tinyworld:score, or YAML files. Several are aspects; the score is their mean."""
    questions: str | None = None
    """The benchmark's questions that the answers belong to: their turns (MT-bench), reference answers, and the
    categories, types or labels that tables are made by."""
    references: str | None = None
    """Right answers to these questions for the judge to see, in FastChat's shape: reference_answer/gpt-4.jsonl."""
    cot: bool = False
    """Ask for a rationale before the score; direct RLAIF asks for the score at once."""

    VOLATILE: ClassVar[frozenset[str]] = RequestConfig.VOLATILE | {"jury", "quorum"}

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        super().__post_init__()
        if not self.rubric:
            raise ConfigError("--rubric needs a name: a preset such as helpfulness-score, or a YAML file")
        if self.references and not self.questions:
            raise ConfigError("--references answers questions: give their file as --questions")


@dataclass(frozen=True, kw_only=True)
class ReviseConfig(RequestConfig):
    """Criticise and revise responses by the principles of a constitution, and write data for supervised fine-tuning.

    The dataset holds conversations that end with an answer, or candidates.
    """

    model_name_or_path: str
    """Who criticises and revises: openai:NAME@BASE_URL, vllm:NAME_OR_PATH, hf:NAME_OR_PATH."""
    rubric: str = "revision"
    """How it is asked: the preset, or a YAML file of kind revision."""
    preamble: str | None = None
    """Which of the rubric's preambles opens the question; the first if not given."""
    cot: bool = True
    """Write a critique before each revision."""
    num_exemplars: int = 0
    """Show the first so many worked examples of the rubric."""
    num_revisions: int = 1
    """Rounds of critique and revision, each by another principle; Constitutional AI has up to 4."""
    keep: Literal["last", "all"] = "last"
    """Write the revision of the last round, or those of all rounds as rows of their own."""
    temperature: float = 0.0
    """Temperature of critiques and revisions; 0 is greedy."""
    max_rationale_tokens: int = 512
    """Longest critique; a longer one is cut and the revision asked for."""
    max_new_tokens: int = 1024
    """Longest revision; a longer one is not written, since its end is missing."""
    seed: int = 0
    """Decides drawn principles and sampled decoding."""

    VOLATILE: ClassVar[frozenset[str]] = RequestConfig.VOLATILE | {"keep"}

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        super().__post_init__()
        ModelRef.parse(self.model_name_or_path)
        at_least(self, 1, "num_revisions", "max_rationale_tokens", "max_new_tokens")
        at_least(self, 0, "num_exemplars", "temperature")


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Tell how far a labeling run is: while it runs, after it ended, or after it was killed. Changes nothing."""

    output_dir: str
    """The run directory of `rlaif sample` or `rlaif label ...`."""
    json: bool = False
    """Print one JSON object, for scripts."""


def at_least(config: object, least: int, *names: str) -> None:
    """Refuse values below `least`; None passes.

    Raises:
        ConfigError: one is smaller.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value} cannot be: give {least} or more")


def share(config: object, name: str) -> None:
    """Refuse a value outside [0, 1].

    Raises:
        ConfigError: it is outside.
    """
    value = getattr(config, name)
    if not 0 <= value <= 1:
        raise ConfigError(f"--{name} {value} is a share: give a number from 0 to 1")


def _models(config: object, name: str) -> None:
    refs = getattr(config, name)
    if not refs:
        raise ConfigError(f"--{name} needs a model: hf:NAME_OR_PATH, openai:NAME@BASE_URL, tinyworld:judge")
    for ref in refs:
        ModelRef.parse(ref)
