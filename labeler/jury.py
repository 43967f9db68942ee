"""A jury: several judges, and a declared rule that makes one label of their votes.

Judges of different families share fewer biases (arXiv 2404.18796). A vote that could not be had is withheld: it
is not counted as a tie, and below the quorum the pair stays unlabelled.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Literal

from labeler.judge import Judge
from rlaif.types import Conversation, Judgment, LabelDistribution, Pair, Preference, Score, content_id

Reduce = Literal["mean", "median", "logit_mean", "majority"]

_CLIP = 1e-6
"""Votes are at least so far from certain when log-odds are averaged: one certain judge must not outvote all."""


def reduce_votes(votes: Sequence[float], how: Reduce) -> float:
    """One probability of several.

    `mean` and `median` of the probabilities, `logit_mean` of their log-odds (votes clipped to 1e-6), `majority` the
    share of judges that prefer A, a tie counting half.

    Args:
        votes: P(A preferred) by each judge, in [0, 1]; at least one.
        how: which rule. All of them give complements for complements.
    """
    if how == "mean":
        return math.fsum(votes) / len(votes)
    if how == "median":
        return float(median(votes))
    if how == "majority":
        return math.fsum(0.5 if v == 0.5 else float(v > 0.5) for v in votes) / len(votes)
    clipped = [min(max(v, _CLIP), 1.0 - _CLIP) for v in votes]
    logit = math.fsum(math.log(v) - math.log1p(-v) for v in clipped) / len(votes)
    return 1.0 / (1.0 + math.exp(-logit))


class Jury:
    """Several judges behind the interface of one.

    Args:
        judges: at least two, with rubrics of one kind.
        reduce: the rule; scores know `mean` and `median` alone, and take the mean otherwise.
        quorum: least number of votes that make a label.
    """

    def __init__(self, judges: Sequence[Judge], reduce: Reduce = "mean", quorum: int | None = None) -> None:
        self.judges = tuple(judges)
        self.reduce: Reduce = reduce
        self.quorum = len(judges) // 2 + 1 if quorum is None else quorum

    @property
    def name(self) -> str:
        """The judges' names."""
        return " + ".join(judge.name for judge in self.judges)

    @property
    def version(self) -> str:
        """Identity of everything that a label depends on besides the text judged."""
        return content_id([judge.version for judge in self.judges], self.reduce, self.quorum)

    async def prepare(self) -> None:
        """See `Judge.prepare`."""
        await asyncio.gather(*(judge.prepare() for judge in self.judges))

    async def judge_pair(self, pair: Pair) -> Preference:
        """The reduced label; `votes` holds every judge's own. See `Judge.judge_pair`."""
        if pair.b < pair.a:
            return (await self.judge_pair(pair.swapped())).swapped()
        votes = tuple(await asyncio.gather(*(judge.judge_pair(pair) for judge in self.judges)))
        given = [vote.p_a for vote in votes if vote.p_a is not None]
        first = votes[0]
        joint = replace(
            first,
            judge=self.name,
            ab=joint_judgment(votes, "ab"),
            ba=joint_judgment(votes, "ba"),
            votes=votes,
        )
        if first.reason is not None and all(
            vote.reason == first.reason and vote.ab is None for vote in votes
        ):
            return joint  # a guard ruled, for every judge alike
        if len(given) < self.quorum:
            return replace(joint, p_a=None, reason=self._short(votes))
        return replace(joint, p_a=reduce_votes(given, self.reduce), reason=None)

    async def judge_score(self, prompt: Conversation, response: str, reference: str = "") -> Score:
        """The reduced score; `votes` holds every judge's own. See `Judge.judge_score`."""
        asked = (judge.judge_score(prompt, response, reference) for judge in self.judges)
        votes = tuple(await asyncio.gather(*asked))
        given = [vote.expected for vote in votes if vote.expected is not None]
        joint = replace(votes[0], votes=votes)
        if len(given) < self.quorum:
            return replace(joint, expected=None, reason=self._short(votes))
        level = float(median(given)) if self.reduce == "median" else math.fsum(given) / len(given)
        return replace(joint, expected=level)

    def _short(self, votes: Sequence[Preference | Score]) -> str:
        reasons = [vote.reason for vote in votes if vote.reason is not None]
        return f"{len(votes) - len(reasons)} of {self.quorum} votes needed; missing: {reasons[0]}"


def joint_judgment(votes: Sequence[Preference], order: Literal["ab", "ba"]) -> Judgment | None:
    """What the jury said in one order: its mean P(number 1 preferred) and labels, the first rationale, all tokens."""
    given = (vote.ab if order == "ab" else vote.ba for vote in votes)
    said = [judgment for judgment in given if judgment is not None]
    heard = [judgment for judgment in said if judgment.p_first is not None]
    if not heard:
        return said[0] if said else None
    return replace(
        heard[0],
        labels=_mean_labels([j.labels for j in heard if j.labels is not None]),
        p_first=math.fsum(j.p_first or 0.0 for j in heard) / len(heard),
        prompt_tokens=sum(j.prompt_tokens for j in said),
        completion_tokens=sum(j.completion_tokens for j in said),
        cached_tokens=sum(j.cached_tokens for j in said),
        truncated=any(j.truncated for j in said),
    )


def _mean_labels(given: Sequence[LabelDistribution]) -> LabelDistribution | None:
    """The mean distribution over the labels, its mean mass, and whether any judge's was censored.

    A verdict read from words has fewer labels than a grade; the mean is over those with most.
    """
    if not given:
        return None
    most = max(len(labels.logprobs) for labels in given)
    full = [labels.probs for labels in given if len(labels.logprobs) == most]
    mass = math.fsum(labels.mass for labels in given) / len(given)
    probs = [mass * math.fsum(column) / len(full) for column in zip(*full, strict=True)]
    return LabelDistribution(
        logprobs=tuple(math.log(max(p, sys.float_info.min)) for p in probs),
        mass=mass,
        censored=any(labels.censored for labels in given),
    )
