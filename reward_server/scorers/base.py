"""The one interface between the batcher and whatever scores. Knows neither torch nor protobuf."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rlaif.types import Conversation, Pair

Kind = Literal["reward_model", "judge", "composite"]
Truncation = Literal["reject", "left"]
Problem = Literal[
    "invalid", "too_long", "no_score", "not_finite", "model_failed", "unavailable", "expired", "unsupported"
]
"""Why one item has no outcome: the caller's text, its length, a judge that gave no reading, a NaN or infinity,
an exception in the model, a model behind an endpoint that is gone, a deadline that passed before the item's turn,
a task that this scorer does not do."""


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """Score the last turn of a conversation; if `alone`, by nothing but itself, to the last bit."""

    conversation: Conversation
    truncation: Truncation = "reject"
    with_rationale: bool = False
    alone: bool = False


@dataclass(frozen=True, slots=True)
class CompareTask:
    """Say which response of a pair is preferred; `alone` as in `ScoreTask`."""

    pair: Pair
    truncation: Truncation = "reject"
    alone: bool = False


@dataclass(frozen=True, slots=True)
class SequenceTask:
    """Score a sequence as it is: text that bears its special tokens already, or token ids. No template is applied.

    Attributes:
        sequence: text, or token ids.
        add_special_tokens: whether the tokenizer adds its own (BOS ...) to a text.
        keep_tokens: longer sequences are cut to so many tokens, -1 for as many as the model reads; None refuses
            what is longer than the model reads.
        keep: which end of a sequence that is cut stays; None leaves it to the tokenizer.
    """

    sequence: str | tuple[int, ...]
    add_special_tokens: bool = False
    keep_tokens: int | None = None
    keep: Literal["first", "last"] | None = None


@dataclass(frozen=True, slots=True)
class DecisionTask:
    """Answer a question about an input by one of some options; the outcome's distribution is over the options.

    Attributes:
        text: what is asked about.
        question: what is asked.
        options: 2 to 26 answers, on a scale the lowest first; option i has the level i.
    """

    text: str
    question: str
    options: tuple[str, ...]


Task = ScoreTask | CompareTask | SequenceTask | DecisionTask


@dataclass(frozen=True, slots=True)
class Prepared:
    """A task that is ready for the model.

    Attributes:
        task: what was asked.
        sequences: token ids to read: one sequence for a score, two for a comparison; empty if the back end
            tokenises by itself.
        tokens: cost of the item in tokens (an estimate where the back end tokenises).
        width: length of its longest sequence in tokens, which decides the padding of a batch.
        truncated: whether the prompt was shortened.
        fingerprint: first 8 bytes of the SHA-256 over the ids, each as 4 bytes little endian; empty without ids.
    """

    task: Task
    sequences: tuple[tuple[int, ...], ...]
    tokens: int
    width: int
    truncated: bool = False
    fingerprint: bytes = b""

    @property
    def rows(self) -> int:
        """Rows that the item takes in a padded batch."""
        return max(1, len(self.sequences))

    @property
    def alone(self) -> bool:
        """Whether the outcome must not depend on what else is or was computed, to the last bit."""
        return isinstance(self.task, ScoreTask | CompareTask) and self.task.alone


def padded(batch: Sequence[Prepared]) -> int:
    """Tokens of a batch in which every row is as wide as the widest."""
    return sum(item.rows for item in batch) * max(item.width for item in batch)


@dataclass(frozen=True, slots=True)
class LevelReading:
    """A judge's distribution over its levels, lowest first; `mass` is the probability of all labels together."""

    probability: tuple[float, ...]
    level: tuple[float, ...]
    mass: float


@dataclass(frozen=True, slots=True)
class Scored:
    """The score of one conversation, before normalisation. `cached` of its tokens were not computed."""

    raw: float
    tokens: int
    truncated: bool = False
    cached: int = 0
    fingerprint: bytes = b""
    distribution: LevelReading | None = None
    rationale: str | None = None


@dataclass(frozen=True, slots=True)
class Compared:
    """P(A preferred); for a judge also the two orders it is the mean of (A shown first, A shown second)."""

    p_a: float
    tokens: int
    truncated: bool = False
    cached: int = 0
    p_a_first: float | None = None
    p_a_second: float | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an item has no score. The message is for the caller and never quotes a conversation."""

    problem: Problem
    message: str


Outcome = Scored | Compared | Failure


def finite(outcome: Outcome) -> Outcome:
    """The outcome, or a failure in its place if its number is NaN or infinite."""
    if isinstance(outcome, Failure):
        return outcome
    value = outcome.raw if isinstance(outcome, Scored) else outcome.p_a
    return outcome if math.isfinite(value) else Failure("not_finite", f"the model's score is {value}")


def preference(difference: float) -> float:
    """P(A preferred) where A scores so much more than B: the sigmoid (Bradley-Terry), NaN of NaN."""
    if difference >= 0:
        return 1 / (1 + math.exp(-difference))
    odds = math.exp(difference)
    return odds / (1 + odds)


class OutOfMemory(RuntimeError):
    """The device has no room for this batch; a smaller one may fit."""


class TaskError(ValueError):
    """A task that this scorer refuses while preparing it; becomes the item's `Failure`."""

    def __init__(self, problem: Problem, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(problem, message)


@dataclass(frozen=True, slots=True)
class Normalization:
    """reward = (raw - center) / scale; `source` says in words where the two come from."""

    center: float = 0.0
    scale: float = 1.0
    source: str = "none: raw scores"


class Scorer(Protocol):
    """Something that scores batches.

    Attributes:
        kind: a learned reward model, a judge, or several scorers reduced to one number.
        name: the model as the server was told.
        version: hash over everything a score depends on.
        normalization: how raw scores become rewards.
        max_tokens_per_item: longest conversation in tokens; 0 if the back end decides.
        parallel_batches: batches that may be computed at the same time.
        max_batch_items: most items in one batch; 0 for no limit.
        shares_prefixes: whether tokens that several items of a batch begin with are computed once.
    """

    kind: Kind
    name: str
    version: str
    normalization: Normalization
    max_tokens_per_item: int
    parallel_batches: int
    max_batch_items: int
    shares_prefixes: bool

    def prepare(self, task: Task) -> Prepared:
        """Tokenise. Called in one thread that is not the event loop's.

        Raises:
            TaskError: the task cannot be done; the others of its request can.
        """
        ...

    def cost(self, batch: Sequence[Prepared]) -> int:
        """Tokens that the device computes for a batch: with padding, and what is shared counted once."""
        ...

    async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
        """Outcomes in the order of `batch`. Must not block the event loop.

        An exception fails the batch; the batcher then halves it to find the item to blame. `OutOfMemory` makes it
        halve the batch too, and keep to the size that fits. `EndpointError` says that whatever computes is gone for
        good, and ends the server.
        """
        ...

    async def warm_up(self) -> None:
        """Do once, before the first request, what the first request would otherwise wait for."""
        ...

    async def close(self) -> None:
        """Release threads and connections."""
        ...
