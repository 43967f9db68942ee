"""A judge: an LLM with a rubric. The RLAIF recipe (arXiv 2309.00267, sections 2.1 and 2.2.2), step by step.

Pairs: for each of both orders, (1) a greedy rationale, (2) the rationale with the forced ending in a fresh
request, (3) softmax over the log-probabilities of the two labels; then un-swap and average.
Single responses: the same three steps over the ordered scale; the score is the expectation.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Literal

from labeler.guard import is_content_free, neutralise
from labeler.llm import LLM, RequestFailed
from labeler.rubric import Question, Rubric
from rlaif.errors import ConfigError
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

IDENTICAL = "guard: identical responses"
ONE_EMPTY = "guard: one response says nothing"
BOTH_EMPTY = "guard: both responses say nothing"
EMPTY = "guard: the response says nothing"


def combine_orders(ab: LabelDistribution, ba: LabelDistribution, how: Combine = "mean_prob") -> float:
    """P(A preferred) from both orders, un-swapped.

    `mean_prob` is the paper's average, 1/2 (P_AB("1") + P_BA("2")): a judge that always picks one position
    lands on 1/2. `mean_logit` averages log-odds, in which an additive position bias cancels exactly.

    Args:
        ab: reading with A shown as number 1.
        ba: reading with B shown as number 1.
        how: which average.

    Returns:
        A probability in [0, 1].
    """
    if how == "mean_prob":
        return 0.5 * (ab.probs[0] + ba.probs[1])
    logit = 0.5 * ((ab.logprobs[0] - ab.logprobs[1]) + (ba.logprobs[1] - ba.logprobs[0]))
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-logit))
    return 1.0 - 1.0 / (1.0 + math.exp(logit))


class Judge:
    """Judges pairs and scores responses. Stateless between calls; calls may run concurrently.

    What it asks is a function of the content alone: judging a pair and its swap sends the same two
    requests, so the labels are exact complements.

    Args:
        llm: the model asked.
        rubric: how it is asked; its `cot` says whether a rationale comes first.
        max_rationale_tokens: longest rationale, in tokens; a longer one is cut and the ending forced.
        combine: how the two orders of a pair are averaged.
        seed: seed of sampled decoding; greedy decoding ignores it.
    """

    def __init__(
        self,
        llm: LLM,
        rubric: Rubric,
        *,
        max_rationale_tokens: int = 512,
        combine: Combine = "mean_prob",
        seed: int = 0,
    ) -> None:
        self.llm = llm
        self.rubric = rubric
        self.max_rationale_tokens = max_rationale_tokens
        self.combine: Combine = combine
        self.seed = seed
        self._markers = (*llm.special_tokens, *rubric.markers)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.llm.name

    @property
    def version(self) -> str:
        """Identity of everything that a label depends on besides the text judged; 16 hex digits."""
        return content_id(
            self.llm.version,
            self.rubric.hash,
            self.rubric.cot,
            self.rubric.num_exemplars,
            self.max_rationale_tokens,
            self.combine,
            self.seed,
        )

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
            pair, prompt=self._clean(pair.prompt), a=self._safe(pair.a), b=self._safe(pair.b), human_p_a=None
        )
        ab, ba = await asyncio.gather(self._judge_order(shown, "ab"), self._judge_order(shown, "ba"))
        if ab.labels is None or ba.labels is None:
            return self._preference(pair, None, ab.reason or ba.reason, ab, ba)
        return self._preference(pair, combine_orders(ab.labels, ba.labels, self.combine), None, ab, ba)

    async def judge_score(self, prompt: Conversation, response: str) -> Score:
        """The expected score of one response on the rubric's scale.

        A response that says nothing gets the lowest level without a call; `reason` then starts with `guard:`.

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
        judgment = await self._ask(self.rubric.ask_score(self._clean(prompt), self._safe(response)))
        if judgment.labels is None:
            return Score(prompt, response, None, judgment.reason, judgment, levels)
        return Score(prompt, response, expectation(judgment.labels.probs, levels), None, judgment, levels)

    async def _judge_order(self, pair: Pair, order: Order) -> Judgment:
        return await self._ask(self.rubric.ask_pair(pair, order))

    async def _ask(self, question: Question) -> Judgment:
        """Rationale, forced ending, label probabilities."""
        messages = user_prompt(question.user)
        rationale = None
        prompt_tokens = completion_tokens = cached_tokens = 0
        try:
            if question.rationale_cue is not None:
                generation = await self.llm.generate(
                    messages,
                    question.rationale_cue,
                    max_tokens=self.max_rationale_tokens,
                    temperature=0.0,
                    seed=int(content_id(self.seed, question.user), 16) % 2**31,
                    stop=(question.ending,) if question.ending.strip() else (),
                )
                rationale = _fit_seams(question.rationale_cue, generation.text)
                prompt_tokens += generation.prompt_tokens
                completion_tokens += generation.completion_tokens
                cached_tokens += generation.cached_tokens
            reading = await self.llm.label_logprobs(
                messages, question.label_prefix(rationale), self.rubric.labels
            )
        except RequestFailed as err:
            return Judgment(None, rationale, str(err), prompt_tokens, completion_tokens, cached_tokens)
        return Judgment(
            reading.distribution,
            rationale,
            None,
            prompt_tokens + reading.prompt_tokens,
            completion_tokens + reading.completion_tokens,
            cached_tokens + reading.cached_tokens,
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
        return tuple(Message(m.role, neutralise(m.content, self.llm.special_tokens)) for m in prompt)


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
