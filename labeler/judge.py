"""A judge: an LLM with a rubric. The RLAIF recipe (arXiv 2309.00267, sections 2.1 and 2.2.2), step by step.

Pairs: for each of both orders, (1) a greedy rationale, (2) the rationale with the forced ending in a fresh
request, (3) softmax over the log-probabilities of the labels; then un-swap and average.
Single responses: the same three steps over the ordered scale; the score is the expectation.

A model that gives no log-probabilities is refused, unless a fallback is declared: the label sampled several
times, or one graded verdict in words. Every judgment says which it was.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from labeler.backends.labels import logsumexp
from labeler.guard import is_content_free, neutralise
from labeler.llm import LLM, Generation, RequestFailed
from labeler.rubric import Question, Rubric
from labeler.verdicts import VERDICT_ASK, read_first_label, read_label, read_verdict, smoothed
from rlaif.errors import ConfigError, EndpointError
from rlaif.types import (
    Conversation,
    Judgment,
    LabelDistribution,
    Message,
    Order,
    Pair,
    Preference,
    Score,
    content_id,
    expectation,
    user_prompt,
)

Combine = Literal["mean_prob", "mean_logit"]
Orders = Literal["both", "one"]
Fallback = Literal["refuse", "samples", "verdict"]

IDENTICAL = "guard: identical responses"
ONE_EMPTY = "guard: one response says nothing"
BOTH_EMPTY = "guard: both responses say nothing"
EMPTY = "guard: the response says nothing"


_NEVER = -1e3
"""Log-probability of a label that a verdict rules out; files hold finite numbers."""


class PairJudge(Protocol):
    """What labels pairs: a judge, or a jury of them."""

    async def judge_pair(self, pair: Pair) -> Preference:
        """The soft label of a pair."""
        ...


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a judge comes to its label, besides the rubric.

    Attributes:
        max_rationale_tokens: longest rationale, in tokens; a longer one is cut and the ending forced.
        combine: how the two orders of a pair are averaged.
        orders: ask about both orders, or about one alone, which the texts decide (cheaper, and biased).
        num_rationales: so many rationales per question, their label distributions averaged (self-consistency).
        rationale_temperature: temperature of the rationales; 0 is greedy.
        fallback: what to do where no log-probabilities are to be had.
        num_samples: samples of the label, with the fallback `samples`.
        max_verdict_tokens: longest sampled label; a model that thinks aloud first needs many.
        seed: seed of sampled decoding and of the draw of principles.
    """

    max_rationale_tokens: int = 512
    combine: Combine = "mean_prob"
    orders: Orders = "both"
    num_rationales: int = 1
    rationale_temperature: float = 0.0
    fallback: Fallback = "refuse"
    num_samples: int = 8
    max_verdict_tokens: int = 16
    seed: int = 0


def share_of_first(labels: LabelDistribution, values: Sequence[float]) -> float:
    """P(number 1 preferred): the expectation of `values`, one per label in [0, 1]."""
    return min(1.0, expectation(labels.probs, values))


def log_odds_of_first(labels: LabelDistribution, values: Sequence[float]) -> float:
    """Log-odds that number 1 is preferred, exact where one side's probability rounds to 0."""
    pairs = list(zip(labels.logprobs, values, strict=True))
    first = logsumexp([lp + math.log(v) for lp, v in pairs if v > 0])
    second = logsumexp([lp + math.log(1 - v) for lp, v in pairs if v < 1])
    return first - second


def combine_orders(
    ab: LabelDistribution,
    ba: LabelDistribution,
    how: Combine = "mean_prob",
    values: Sequence[float] = (1.0, 0.0),
) -> float:
    """P(A preferred) from both orders, un-swapped.

    `mean_prob` is the paper's average, 1/2 (P_AB("1") + P_BA("2")): a judge that always picks one position
    lands on 1/2. `mean_logit` averages log-odds, in which an additive position bias cancels exactly.

    Args:
        ab: reading with A shown as number 1.
        ba: reading with B shown as number 1.
        how: which average.
        values: P(number 1 preferred) that each label stands for.

    Returns:
        A probability in [0, 1].
    """
    if how == "mean_prob":
        return 0.5 * (share_of_first(ab, values) + (1.0 - share_of_first(ba, values)))
    logit = 0.5 * (log_odds_of_first(ab, values) - log_odds_of_first(ba, values))
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    return 1.0 - 1.0 / (1.0 + math.exp(logit))


def average(readings: Sequence[LabelDistribution]) -> LabelDistribution:
    """The mean of several distributions over the same labels (self-consistency, paper section 3.3).

    Renormalised probabilities are averaged, so a rationale that ends in a low label mass weighs no less.

    Args:
        readings: at least one.
    """
    if len(readings) == 1:
        return readings[0]
    n = len(readings)
    mass = math.fsum(r.mass for r in readings) / n
    probs = [math.fsum(column) / n for column in zip(*(r.probs for r in readings), strict=True)]
    logprobs = tuple(math.log(p * mass) if p * mass > 0 else _NEVER for p in probs)
    return LabelDistribution(logprobs, mass, any(r.censored for r in readings))


class Judge:
    """Judges pairs and scores responses. Calls may run concurrently.

    What it asks is a function of the content alone: judging a pair and its swap sends the same two
    requests, so the labels are exact complements.

    Args:
        llm: the model asked.
        rubric: how it is asked; its `cot` says whether a rationale comes first.
        recipe: how the label is had from the replies.
    """

    def __init__(self, llm: LLM, rubric: Rubric, recipe: Recipe = Recipe()) -> None:
        self.llm = llm
        self.rubric = rubric
        self.recipe = recipe
        self._verdict_rubric = _asking_for_verdict(rubric)
        self._markers = (*llm.special_tokens, *rubric.markers)
        self._found: str | None = None

    @property
    def name(self) -> str:
        """The model's name."""
        return self.llm.name

    @property
    def version(self) -> str:
        """Identity of everything that a label depends on besides the text judged; 16 hex digits."""
        return content_id(
            self.llm.version,
            self.rubric.version,
            repr(self.recipe),
        )

    async def prepare(self) -> None:
        """Find out what the model can give, before anything is paid for.

        Raises:
            EndpointError: there are no log-probabilities, and no fallback is declared.
            ModelError: the model is unknown.
        """
        await self._source()

    async def judge_pair(self, pair: Pair) -> Preference:
        """The soft label of a pair from both orders.

        Identical responses are a tie, and a response that says nothing loses, both without a call; `reason`
        then starts with `guard:`. If either order fails, `p_a` is None and `reason` says why.

        Raises:
            ConfigError: the rubric is for scores.
            ModelError: the model is of no use for this rubric.
            EndpointError: the endpoint is gone.
        """
        if self.rubric.kind != "pair":
            raise ConfigError(f"rubric {self.rubric.name} is for scores; comparing pairs needs a pair rubric")
        if pair.b < pair.a:
            return (await self.judge_pair(pair.swapped())).swapped()
        if (ruled := _rule_pair(pair)) is not None:
            p_a, reason = ruled
            return self._preference(pair, p_a, reason, None, None)
        shown = replace(
            pair,
            prompt=self._clean(pair.prompt),
            a=self._safe(pair.a),
            b=self._safe(pair.b),
            human_p_a=None,
            human_votes=(),
        )
        if self.recipe.orders == "one":
            ab = await self._judge_order(shown, "ab")
            return self._preference(pair, ab.p_first, ab.reason, ab, None)
        ab, ba = await asyncio.gather(self._judge_order(shown, "ab"), self._judge_order(shown, "ba"))
        if ab.labels is None or ba.labels is None:
            return self._preference(pair, None, ab.reason or ba.reason, ab, ba)
        p_a = combine_orders(ab.labels, ba.labels, self.recipe.combine, self._values(ab.labels))
        return self._preference(pair, p_a, None, ab, ba)

    async def judge_score(self, prompt: Conversation, response: str, reference: str = "") -> Score:
        """The expected score of one response on the rubric's scale.

        A response that says nothing gets the lowest level without a call; `reason` then starts with `guard:`.

        Args:
            prompt: what was asked for.
            response: what is judged.
            reference: a right answer, shown by rubrics with that slot; empty for none.

        Raises:
            ConfigError: the rubric is for pairs.
            ModelError: the model is of no use for this rubric.
            EndpointError: the endpoint is gone.
        """
        if self.rubric.kind != "score":
            raise ConfigError(f"rubric {self.rubric.name} is for pairs; scoring needs a score rubric")
        levels = self.rubric.levels
        if is_content_free(response):
            return Score(prompt, response, levels[0], EMPTY, None, levels)
        rubric = await self._rubric()
        shown = self._clean(prompt), self._safe(response)
        question = rubric.ask_score(*shown, reference=self._safe(reference), seed=self.recipe.seed)
        judgment = await self._ask(question)
        if judgment.labels is None:
            return Score(prompt, response, None, judgment.reason, judgment, levels)
        return Score(prompt, response, expectation(judgment.labels.probs, levels), None, judgment, levels)

    async def _judge_order(self, pair: Pair, order: Order) -> Judgment:
        rubric = await self._rubric()
        judgment = await self._ask(rubric.ask_pair(pair, order, seed=self.recipe.seed))
        if judgment.labels is None:
            return judgment
        return replace(judgment, p_first=share_of_first(judgment.labels, self._values(judgment.labels)))

    def _values(self, labels: LabelDistribution) -> Sequence[float]:
        """P(number 1 preferred) of each label; a graded verdict is over 1 and 2, whatever grades the rubric has."""
        return self.rubric.values if len(labels.logprobs) == len(self.rubric.values) else (1.0, 0.0)

    async def _source(self) -> str:
        """Where labels come from with this model: `logprobs` or the declared fallback."""
        if self._found is None:
            self._found = await self._find_source()
        return self._found

    async def _find_source(self) -> str:
        if (await self.llm.probe()).logprobs != "none":
            return "logprobs"
        if self.recipe.fallback == "refuse":
            raise EndpointError(
                f"{self.name} gives no log-probabilities, which soft labels are read from; use a model or server "
                "that does, such as vLLM, or declare --fallback samples (the label asked for several times) or "
                "--fallback verdict (one graded verdict)"
            )
        return self.recipe.fallback

    async def _rubric(self) -> Rubric:
        return self._verdict_rubric if await self._source() == "verdict" else self.rubric

    async def _ask(self, question: Question) -> Judgment:
        """All rationales of a question; those that fail are left out of the average."""
        count = self.recipe.num_rationales if question.rationale_cue is not None else 1
        if count == 1:  # the usual case costs no task of its own
            return replace(await self._ask_once(question, 0), principle=question.principle)
        said = await asyncio.gather(*(self._ask_once(question, number) for number in range(count)))
        tokens = {
            name: sum(getattr(j, name) for j in said)
            for name in ("prompt_tokens", "completion_tokens", "cached_tokens")
        }
        whole = {**tokens, "principle": question.principle, "truncated": any(j.truncated for j in said)}
        readings = [j.labels for j in said if j.labels is not None]
        if not readings:
            return replace(said[0], **whole)
        first = next(j for j in said if j.labels is not None)
        return replace(first, labels=average(readings), **whole)

    async def _ask_once(self, question: Question, number: int) -> Judgment:
        """Rationale, forced ending, label probabilities."""
        messages = user_prompt(question.user)
        source = await self._source()
        rationale = written = None
        seed = 0  # reading probabilities draws nothing
        if source != "logprobs" or question.rationale_cue is not None:
            seed = int(content_id(self.recipe.seed, number, question.user), 16) % 2**31
        paid: list[Generation] = []
        try:
            if source == "verdict":
                written = await self.llm.generate(
                    messages, max_tokens=self.recipe.max_rationale_tokens, temperature=0.0, seed=seed
                )
                paid.append(written)
                return _judgment(self._verdict(written), written.text, paid, source)
            if question.rationale_cue is not None:
                written = await self.llm.generate(
                    messages,
                    question.rationale_cue,
                    max_tokens=self.recipe.max_rationale_tokens,
                    temperature=self.recipe.rationale_temperature,
                    seed=seed,
                    stop=(question.ending,) if question.ending.strip() else (),
                )
                paid.append(written)
                rationale = _fit_seams(question.rationale_cue, written.text)
            prefix = question.label_prefix(rationale)
            if source == "samples":
                labels = await self._sample_label(messages, prefix, seed, paid)
                return _judgment(labels, rationale, paid, source)
            reading = await self.llm.label_logprobs(messages, prefix, self.rubric.labels, after=written)
        except RequestFailed as err:
            return replace(_judgment(None, rationale, paid, source), reason=str(err))
        cost = Generation("", "", reading.prompt_tokens, reading.completion_tokens, reading.cached_tokens)
        return _judgment(reading.distribution, rationale, [*paid, cost], source)

    async def _sample_label(
        self, messages: Conversation, prefix: str, seed: int, paid: list[Generation]
    ) -> LabelDistribution:
        """The label sampled several times at temperature 1, with Laplace's rule of succession."""
        drawn = await asyncio.gather(
            *(
                self.llm.generate(
                    messages,
                    prefix,
                    max_tokens=self.recipe.max_verdict_tokens,
                    temperature=1.0,
                    seed=(seed + number) % 2**31,
                )
                for number in range(self.recipe.num_samples)
            )
        )
        paid.extend(drawn)
        labels = self.rubric.labels
        found = [
            read_first_label(d.text, labels) if d.finish_reason == "length" else read_label(d.text, labels)
            for d in drawn
        ]
        counts = [found.count(i) for i in range(len(labels))]
        if not any(counts):
            raise RequestFailed(f"none of {len(drawn)} samples is one of the labels")
        mass = sum(counts) / len(drawn)
        return LabelDistribution(tuple(math.log(p * mass) for p in smoothed(counts)), mass)

    def _verdict(self, written: Generation) -> LabelDistribution:
        """A graded verdict as a distribution over 1 and 2, or a stated score as one level."""
        text = written.text
        if written.finish_reason == "length":  # what comes last counts, and it may not have come
            raise RequestFailed("the reply was cut before its verdict: allow more --max_rationale_tokens")
        if self.rubric.kind == "pair":
            p = read_verdict(text)
            if p is None:
                raise RequestFailed("the reply has no verdict")
            return LabelDistribution((math.log(p), math.log(1 - p)), 1.0)
        level = read_label(text, self.rubric.labels)
        if level is None:
            raise RequestFailed("the reply has no score")
        return LabelDistribution(
            tuple(0.0 if i == level else _NEVER for i in range(len(self.rubric.labels))), 1.0
        )

    def _preference(
        self, pair: Pair, p_a: float | None, reason: str | None, ab: Judgment | None, ba: Judgment | None
    ) -> Preference:
        return Preference(
            pair, p_a, reason, ab, ba, judge=self.name, rubric=self.rubric.name, rubric_hash=self.rubric.hash
        )

    def _safe(self, text: str) -> str:
        return neutralise(text, self._markers)

    def _clean(self, prompt: Conversation) -> Conversation:
        return tuple(Message(m.role, self._safe(m.content)) for m in prompt)


def _asking_for_verdict(rubric: Rubric) -> Rubric:
    """The rubric with its closing replaced by the demand for a graded verdict; a score is asked for as it is."""
    if rubric.kind != "pair":
        return replace(rubric, cot=False)
    return replace(rubric, cot=False, file=rubric.file.model_copy(update={"ask": VERDICT_ASK}))


def _judgment(
    labels: LabelDistribution | None, rationale: str | None, paid: Sequence[Generation], source: str
) -> Judgment:
    """A judgment; where there is a rationale, it came with the first of the replies paid for."""
    return Judgment(
        labels,
        rationale,
        None,
        sum(g.prompt_tokens for g in paid),
        sum(g.completion_tokens for g in paid),
        sum(g.cached_tokens for g in paid),
        source,
        truncated=rationale is not None and paid[0].finish_reason == "length",
    )


def _rule_pair(pair: Pair) -> tuple[float, str] | None:
    """P(A) and the rule, where no judge is needed."""
    if pair.a == pair.b:
        return 0.5, IDENTICAL
    empty_a, empty_b = is_content_free(pair.a), is_content_free(pair.b)
    if empty_a and empty_b:
        return 0.5, BOTH_EMPTY
    if empty_a or empty_b:
        return float(empty_b), ONE_EMPTY
    return None


def _fit_seams(cue: str, rationale: str) -> str:
    """The rationale with white space that neither doubles after the cue nor precedes the joiner."""
    return (rationale.lstrip() if cue[-1:].isspace() else rationale).rstrip()
