"""Agreement with single people instead of one label made of theirs, ties included, beside that of people themselves.

The two setups of the MT-bench paper (Zheng et al., arXiv 2306.05685, table 5). With ties, judge and
person agree where both prefer the same response or both call it a tie, and a judge whose two orders contradict each
other has called it a tie: a coin with three sides agrees on 33 %. Without ties, only what both decided counts: 50 %.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from labeler.audit.observations import Observation
from labeler.preferences import is_tie
from rlaif.agreement import estimate_mean, same_position
from rlaif.types import Vote

MOST_NAMED = 10
"""Annotators of larger crowds have no line of their own."""


class _Met(NamedTuple):
    """Two words on one pair, each 1 for A, 0 for B, 1/2 for a tie."""

    prompt: Hashable
    one: float
    other: float


def by_annotator(labelled: Sequence[Observation], resamples: int = 1000) -> list[dict[str, Any]]:
    """Agreement of the judge and of people with single votes: of all, of each subset, and of few annotators each.

    Args:
        labelled: with a label; several rows may be votes on one pair.
        resamples: of the 95 % bootstrap intervals; whole prompts are drawn.

    Returns:
        For each line its `name`, `votes` (how many there are), and for `judge` and `people` the estimates `with_ties`
        and `without_ties` with the numbers of votes, or pairs of votes, that they are over. `people` are two different
        annotators of one pair; for a line of one annotator, they are that one and each of the others.
    """
    lines: list[tuple[str, Sequence[Observation], str | None]] = []
    subsets = sorted({o.subset for o in labelled if o.subset and o.votes})
    if len(subsets) > 1:
        lines += [(name, [o for o in labelled if o.subset == name], None) for name in subsets]
    annotators = sorted({vote.annotator for o in labelled for vote in o.votes})
    if len(annotators) <= MOST_NAMED:
        lines += [(name, labelled, name) for name in annotators]
    lines.append(("all", labelled, None))
    return [
        {
            "name": name,
            "votes": len(met := _with_judge(seen, annotator)),
            "judge": _agreements(met, resamples),
            "people": _agreements(_among_people(seen, annotator), resamples),
        }
        for name, seen, annotator in lines
    ]


def said(observation: Observation) -> float:
    """The judge's word: 1 for A, 0 for B, 1/2 for a tie or where both orders prefer the same position."""
    assert observation.p is not None
    ab, ba = observation.first_ab, observation.first_ba
    contradicted = ab is not None and ba is not None and bool(same_position(ab, ba))
    return 0.5 if contradicted or is_tie(observation.p) else float(observation.p > 0.5)


def _with_judge(seen: Sequence[Observation], annotator: str | None) -> list[_Met]:
    return [
        _Met(o.prompt, said(o), vote.p_a)
        for o in seen
        for vote in o.votes
        if annotator in (None, vote.annotator)
    ]


def _among_people(seen: Sequence[Observation], annotator: str | None) -> list[_Met]:
    votes: dict[tuple[Hashable, str], list[Vote]] = defaultdict(list)
    for o in seen:
        votes[o.prompt, o.pair].extend(o.votes)
    return [
        _Met(prompt, one.p_a, other.p_a)
        for (prompt, _), cast in votes.items()
        for one, other in combinations(cast, 2)
        if one.annotator != other.annotator and annotator in (None, one.annotator, other.annotator)
    ]


def _agreements(met: Sequence[_Met], resamples: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, counted in (
        ("with_ties", met),
        ("without_ties", [m for m in met if 0.5 not in (m.one, m.other)]),
    ):
        agreed = [float(m.one == m.other) for m in counted]
        prompts = [m.prompt for m in counted]
        found[name] = {"over": len(agreed), **estimate_mean(agreed, groups=prompts, resamples=resamples)}
    return found
