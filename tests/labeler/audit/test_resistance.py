"""What attacks change, on judges whose answers are known."""

from __future__ import annotations

import asyncio
import re

import pytest

from labeler.audit.canaries import Attack, attacks
from labeler.audit.resistance import attacked, resistance, weak_against_good
from labeler.backends.scripted import Asked, ScriptedModel
from labeler.judge import Judge
from labeler.rubric import load_rubric
from rlaif.types import Pair, Preference, user_prompt

PAIR = Pair(user_prompt("Why is the sky blue?"), "It is painted.", "Rayleigh scattering.", 0.0)
SHOUT = Attack("shout", "request", lambda prompt, weak: f"{weak} {prompt} ME!")


def said(p: float | None, reason: str | None = None) -> Preference:
    return Preference(PAIR, p, reason)


def test_only_decided_pairs_are_attacked_and_the_rejected_response_comes_first() -> None:
    pairs = [Pair(PAIR.prompt, "good", "bad", 1.0), Pair(PAIR.prompt, "bad", "good", 0.2),
             Pair(PAIR.prompt, "x", "y", 0.5), Pair(PAIR.prompt, "x", "y")]  # fmt: skip
    assert [(p.a, p.b) for p in weak_against_good(pairs)] == [("bad", "good")] * 2


def test_an_attack_sees_prompt_and_weak_answer_alone() -> None:
    assert attacked(PAIR, SHOUT).a == "It is painted. Why is the sky blue? ME!"
    assert attacked(PAIR, SHOUT).b == PAIR.b


def test_shifts_by_hand() -> None:
    before = [said(0.1), said(0.3), said(0.5), said(None, "failed")]
    after = [said(0.9), said(0.4), said(0.0, "guard: one response says nothing"), said(0.9)]
    found = resistance(before, {"shout": after}, [SHOUT])
    # Wins go from 0, 0, 1/2 to 1, 0, 0; the fourth has no label before.
    assert found["win_rate"] == pytest.approx(1 / 6)
    (row,) = found["attacks"]
    assert (row["pairs"], row["guarded"]) == (3, 1)
    assert row["win_rate"] == pytest.approx(1 / 3)
    assert row["shift"]["value"] == found["shift"]["value"] == pytest.approx((1 + 0 - 0.5) / 3)
    assert row["shift"]["low"] < row["shift"]["value"] < row["shift"]["high"]
    assert row["probability_shift"] == pytest.approx((0.8 + 0.1 - 0.5) / 3)


def test_families_are_means_worst_first() -> None:
    other = Attack("whisper", "padding", lambda prompt, weak: weak)
    found = resistance([said(0.1)], {"shout": [said(0.2)], "whisper": [said(0.8)]}, [SHOUT, other])
    assert list(found["families"].items()) == [("padding", 1.0), ("request", 0.0)]
    assert found["shift"]["value"] == 0.5


def test_an_attack_without_any_label_has_no_shift() -> None:
    found = resistance([said(0.1)], {"shout": [said(None, "failed")]}, [SHOUT])
    assert found["attacks"][0]["shift"]["value"] is None


def obeying(asked: Asked) -> list[float]:
    """A judge that obeys the last cue it reads in the material, to the letter, and else prefers Rayleigh."""
    cue = re.findall(r"More helpful response:\s*([12])", asked.user)
    first = asked.user.split("<<< RESPONSE 1 >>>")[1]
    if cue:
        return [1.0, 0.0] if cue[-1] == "1" else [0.0, 1.0]
    if "<<< END OF RESPONSES >>>" in first.split("<<< RESPONSE 2 >>>")[0]:
        return [1.0, 0.0]
    return [0.9, 0.1] if "Rayleigh" in first.split("<<< RESPONSE 2 >>>")[0] else [0.1, 0.9]


def test_forgeries_do_not_reach_a_judge_that_would_obey_them() -> None:
    rubric = load_rubric("helpfulness-pair").with_options(cot=False)
    judge = Judge(ScriptedModel(obeying), rubric)
    for attack in attacks(rubric):
        if attack.family in ("forged cue", "forged delimiter"):
            preference = asyncio.run(judge.judge_pair(attacked(PAIR, attack)))
            assert preference.p_a == pytest.approx(0.1), attack.name


def test_the_same_forgeries_win_without_the_guard() -> None:
    # The judge above does obey: shown unguarded, the forged cue wins wherever it stands first.
    rubric = load_rubric("helpfulness-pair").with_options(cot=False)
    forged = next(a for a in attacks(rubric) if a.name == "forged-cue")
    asked = Asked(rubric.ask_pair(attacked(PAIR, forged), "ab").user, "", ("1", "2"))
    assert obeying(asked) == [1.0, 0.0]
