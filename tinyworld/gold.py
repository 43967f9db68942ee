"""The gold utility of a summary, as code. It plays the human: evaluation reads it, training never does.

    utility = max(-1/2, (covered - distorted - invented - broken - waste / 2) / facts of the post)

`covered` counts facts of the post stated rightly, `distorted` those stated wrongly, `invented` sentences
about people the post does not mention, `broken` stretches that are no sentence; `waste` is the length
term: sentences about somebody already treated, and filler words. Only the first sentence about a person counts, so
saying every variant of a fact earns nothing. Range [-1/2, 1]: 1 is a faithful and complete summary, 0 is
what silence earns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rlaif.types import Conversation
from tinyworld.grammar import Fact, parse, parse_post

Verdict = Literal["covered", "distorted", "invented", "broken", "repeated", "filler"]

POINTS: dict[Verdict, int] = {
    "covered": 2,
    "distorted": -2,
    "invented": -2,
    "broken": -2,
    "repeated": -1,
    "filler": -1,
}
"""Half facts earned by each finding."""

UTILITY_RANGE = (-0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to say about a summary, in reading order.

    Attributes:
        verdict: what it is.
        word: the name (or the filler word) it is about; "" for a broken stretch.
        said: the fact as the summary has it, if it is a sentence.
        true: the fact as the post has it, if the post mentions that name.
    """

    verdict: Verdict
    word: str
    said: Fact | None = None
    true: Fact | None = None


def review(post: str, summary: str) -> Iterator[Finding]:
    """Compare a summary with its post, sentence by sentence.

    Raises:
        ValueError: `post` is not a post of this world. Any summary is accepted.
    """
    facts = parse_post(post)
    seen: set[str] = set()
    for sentence in parse(summary):
        for word in sentence.padding:
            yield Finding("filler", word)
        said = sentence.fact
        if said is None:
            yield Finding("broken", "")
            continue
        true = facts.get(said.name)
        if said.name in seen:
            yield Finding("repeated", said.name, said, true)
        elif true is None:
            yield Finding("invented", said.name, said)
        else:
            yield Finding("covered" if said == true else "distorted", said.name, said, true)
        seen.add(said.name)


def gold_utility(post: str, summary: str) -> float:
    """How good a summary is, in [-1/2, 1]; any text is accepted as a summary.

    Raises:
        ValueError: `post` is not a post of this world.
    """
    points = sum(POINTS[f.verdict] for f in review(post, summary))
    return max(UTILITY_RANGE[0], points / (2 * len(parse_post(post))))


def rewards(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
    """The utility of each response, for `rlaif eval policy --reward_function tinyworld.gold:rewards`.

    Raises:
        ValueError: a prompt does not end with a post of this world.
    """
    return [
        gold_utility(prompt[-1].content, response)
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def gold_prefers(post: str, a: str, b: str) -> float:
    """1.0 if summary `a` has the higher utility, 0.0 if `b` has, 0.5 for a tie.

    Raises:
        ValueError: `post` is not a post of this world.
    """
    u_a, u_b = gold_utility(post, a), gold_utility(post, b)
    return 0.5 if math.isclose(u_a, u_b) else float(u_a > u_b)


def gold_score(utility: float) -> int:
    """The utility on the scale of 1 to 10, in equal steps, halves rounded up: -1/2 is 1, 0 is 4, 1 is 10."""
    low, high = UTILITY_RANGE
    return 1 + math.floor(9 * (utility - low) / (high - low) + 0.5)
