"""The nouns of the project as frozen dataclasses: what flows between files, judges, servers and trainers.

A value that could not be had is `None` beside a `reason`, never 0 and never a tie.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

Role = Literal["system", "user", "assistant"]
Order = Literal["ab", "ba"]
"""Which response the judge saw first: `ab` shows response A as number 1."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


Conversation = tuple[Message, ...]
"""Messages in order. A *prompt* ends with a user turn; a *scored* conversation ends with an assistant turn."""


def user_prompt(text: str) -> Conversation:
    """A prompt of one user turn."""
    return (Message("user", text),)


def with_response(prompt: Conversation, response: str) -> Conversation:
    """The conversation in which the assistant answered `prompt` with `response`."""
    return (*prompt, Message("assistant", response))


def to_dicts(conversation: Conversation) -> list[dict[str, str]]:
    """Messages as the `{role, content}` dictionaries that chat templates and files use."""
    return [{"role": m.role, "content": m.content} for m in conversation]


def content_id(*parts: object) -> str:
    """A 16-hex-digit id that depends on content alone: equal parts give equal ids on every machine."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    if isinstance(value, Message):
        return [value.role, value.content]
    raise TypeError(f"content_id cannot hash a {type(value).__name__}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response and where it came from."""

    response: str
    model: str = ""
    finish_reason: str = ""
    seed: int | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """All candidates for one prompt; a row of a candidates file."""

    prompt: Conversation
    candidates: tuple[Candidate, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)


class Vote(NamedTuple):
    """What one annotator said of a pair: P(A preferred), 1/2 for a tie."""

    annotator: str
    p_a: float


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt and two responses to compare.

    `human_p_a` is a human (or gold) label, P(A preferred) in [0, 1], or None where nobody labelled the pair, or those
    who did have no majority. `human_votes` are the single annotators' own, where a set names them. Neither reaches a
    judge.
    """

    prompt: Conversation
    a: str
    b: str
    human_p_a: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    human_votes: tuple[Vote, ...] = ()

    @property
    def id(self) -> str:
        """Content id. A pair and its swap have different ids, since they are different rows."""
        return content_id(self.prompt, self.a, self.b)

    def swapped(self) -> Pair:
        """The same comparison with A and B exchanged; human labels are complemented."""
        p = None if self.human_p_a is None else 1.0 - self.human_p_a
        votes = tuple(vote._replace(p_a=1.0 - vote.p_a) for vote in self.human_votes)
        return replace(self, a=self.b, b=self.a, human_p_a=p, human_votes=votes)

    def shown(self, order: Order) -> tuple[str, str]:
        """The responses as the judge sees them in this order: (number 1, number 2)."""
        return (self.a, self.b) if order == "ab" else (self.b, self.a)


LOW_LABEL_MASS = 0.5
"""Probability of all labels together below which they say little: most of the judge's probability lies elsewhere."""


@dataclass(frozen=True, slots=True)
class LabelDistribution:
    """What a judge said over a closed set of labels, read from next-token probabilities.

    Attributes:
        logprobs: natural-log probability of each label in full-vocabulary terms, aliases summed; in label order.
            A label outside an endpoint's top-k carries an upper bound and sets `censored`.
        mass: probability of all labels together, in [0, 1]. Low mass means the judge wanted to say something else.
        censored: whether any label's log-probability is a bound rather than a reading.
    """

    logprobs: tuple[float, ...]
    mass: float
    censored: bool = False

    @property
    def probs(self) -> tuple[float, ...]:
        """The distribution renormalised over the labels alone; sums to 1."""
        top = max(self.logprobs)
        weights = [math.exp(lp - top) for lp in self.logprobs]
        total = math.fsum(weights)
        return tuple(w / total for w in weights)


@dataclass(frozen=True, slots=True)
class Judgment:
    """What one judge said of one pair in one order, or of one response; `reason` says why `labels` is None.

    Attributes:
        labels: probabilities of the rubric's labels.
        rationale: what the judge wrote before its label; the first one where several were sampled.
        source: how the labels were had: `logprobs`, `samples` of the label, or a graded `verdict` in words.
        p_first: for a pair, P(number 1 preferred) under `labels`; None without labels and for scores.
        principle: the principle of a constitution that was put to the judge.
        truncated: a rationale was cut at its greatest length, so the judge had not finished when the label was read.
    """

    labels: LabelDistribution | None
    rationale: str | None = None
    reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    source: str = "logprobs"
    p_first: float | None = None
    principle: str | None = None
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Preference:
    """The soft label of a pair: P(A preferred), from both orders, or None with a reason.

    `votes` are the labels of the judges of a jury, in the jury's order, missing ones included; empty for a
    single judge.
    """

    pair: Pair
    p_a: float | None
    reason: str | None = None
    ab: Judgment | None = None
    ba: Judgment | None = None
    judge: str = ""
    rubric: str = ""
    rubric_hash: str = ""
    votes: tuple[Preference, ...] = ()

    def swapped(self) -> Preference:
        """The label of the swapped pair: the complement, with the two orders exchanged."""
        return replace(
            self,
            pair=self.pair.swapped(),
            p_a=None if self.p_a is None else 1.0 - self.p_a,
            ab=self.ba,
            ba=self.ab,
            votes=tuple(vote.swapped() for vote in self.votes),
        )

    @property
    def same_position(self) -> bool | None:
        """Whether both orders preferred the same *position* (a sign of position bias); None if either is missing.

        A tie prefers neither.
        """
        if self.ab is None or self.ba is None or self.ab.p_first is None or self.ba.p_first is None:
            return None
        return (self.ab.p_first - 0.5) * (self.ba.p_first - 0.5) > 0


@dataclass(frozen=True, slots=True)
class Score:
    """A direct score of one response: the expectation over the scale's levels, or None with a reason.

    `votes` are the scores of the judges of a jury, missing ones included.
    """

    prompt: Conversation
    response: str
    expected: float | None
    reason: str | None = None
    judgment: Judgment | None = None
    levels: tuple[float, ...] = tuple(float(i) for i in range(1, 11))
    votes: tuple[Score, ...] = ()


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """A row of a preference dataset, as training reads it: `chosen_prob` = P(chosen preferred) in [0, 1]."""

    prompt: Conversation
    chosen: str
    rejected: str
    chosen_prob: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A row of a score dataset: a response and its score, on the scale of whoever gave it."""

    prompt: Conversation
    response: str
    score: float
    extra: Mapping[str, Any] = field(default_factory=dict)


def expectation(probs: Sequence[float], levels: Sequence[float]) -> float:
    """Mean of `levels` under `probs`: direct score of RLAIF (arXiv 2309.00267, section 2.2.2)."""
    return math.fsum(p * level for p, level in zip(probs, levels, strict=True))
