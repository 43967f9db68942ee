"""Juries: one label of several votes, complements for complements, and a missing vote is withheld."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeler.backends.scripted import Asked, ScriptedModel
from labeler.judge import Judge
from labeler.jury import Jury, Reduce, joint_judgment, reduce_votes
from labeler.llm import RequestFailed
from labeler.rubric import load_rubric
from rlaif.types import Judgment, LabelDistribution, Pair, Preference, user_prompt

PAIR = Pair(user_prompt("q"), "an answer", "some other answer")
RULES: list[Reduce] = ["mean", "median", "logit_mean", "majority"]


def juror(p_a: float | None, name: str = "juror") -> Judge:
    """A judge without position bias that gives A this probability, or fails."""

    def reply(asked: Asked) -> list[float]:
        if p_a is None:
            raise RequestFailed("the endpoint answered 500")
        a_first = asked.user.index(PAIR.a) < asked.user.index(PAIR.b)
        return [p_a, 1 - p_a] if a_first else [1 - p_a, p_a]

    return Judge(ScriptedModel(reply, name=name), load_rubric("helpfulness-pair").with_options(cot=False))


def label(jury: Jury, pair: Pair = PAIR) -> float | None:
    return asyncio.run(jury.judge_pair(pair)).p_a


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("mean", (0.9 + 0.6 + 0.2) / 3),
        ("median", 0.6),
        ("majority", 2 / 3),
        ("logit_mean", 1 / (1 + math.exp(-(math.log(9) + math.log(1.5) + math.log(0.25)) / 3))),
    ],
)
def test_each_rule_by_hand(rule: Reduce, expected: float) -> None:
    assert label(Jury([juror(0.9), juror(0.6), juror(0.2)], rule)) == pytest.approx(expected)


@given(votes=st.lists(st.floats(0, 1), min_size=1, max_size=7), rule=st.sampled_from(RULES))
def test_complements_give_complements(votes: list[float], rule: Reduce) -> None:
    turned = [1 - v for v in votes]
    assert reduce_votes(votes, rule) + reduce_votes(turned, rule) == pytest.approx(1, abs=1e-9)


def test_a_pair_and_its_swap_are_complements() -> None:
    jury = Jury([juror(0.9), juror(0.3)])
    there, back = label(jury), label(jury, PAIR.swapped())
    assert there == pytest.approx(0.6)
    assert there + back == pytest.approx(1.0, abs=1e-12)


def test_what_a_jury_said_is_the_mean_of_its_judges_whatever_their_order() -> None:
    """Mass and margins are of all, and one censored reading shows."""

    def vote(p: float, mass: float, censored: bool) -> Preference:
        said = tuple(
            Judgment(
                LabelDistribution((math.log(mass * q), math.log(mass * (1 - q))), mass, censored), p_first=q
            )
            for q in (p, 1 - p)
        )
        return Preference(PAIR, p, ab=said[0], ba=said[1])

    sure, unsure = vote(0.9, 1.0, False), vote(0.5, 0.2, True)
    for votes in ([sure, unsure], [unsure, sure]):
        joint = joint_judgment(votes, "ab")
        assert joint is not None and joint.labels is not None
        assert joint.p_first == pytest.approx(0.7)
        assert joint.labels.probs == pytest.approx((0.7, 0.3))
        assert (joint.labels.mass, joint.labels.censored) == (pytest.approx(0.6), True)


def test_a_missing_vote_is_withheld_and_not_a_tie() -> None:
    jury = Jury([juror(0.9), juror(None), juror(0.7)])
    preference = asyncio.run(jury.judge_pair(PAIR))
    assert preference.p_a == pytest.approx(0.8)
    assert [v.p_a for v in preference.votes] == [pytest.approx(0.9), None, pytest.approx(0.7)]


def test_below_the_quorum_the_pair_stays_unlabelled() -> None:
    preference = asyncio.run(Jury([juror(0.9), juror(None), juror(None)]).judge_pair(PAIR))
    assert preference.p_a is None
    assert preference.reason == "1 of 2 votes needed; missing: the endpoint answered 500"
    assert label(Jury([juror(0.9), juror(None), juror(None)], quorum=1)) == pytest.approx(0.9)


def test_a_guard_rules_for_the_whole_jury() -> None:
    preference = asyncio.run(Jury([juror(0.1), juror(0.1)]).judge_pair(Pair(user_prompt("q"), "fine", "...")))
    assert (preference.p_a, preference.reason) == (1.0, "guard: one response says nothing")
