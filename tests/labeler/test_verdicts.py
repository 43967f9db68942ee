"""Reading answers out of text: only declared ones, only from the menu."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeler.verdicts import (
    VERDICT_ASK,
    VERDICT_LABELS,
    VERDICT_PROBS,
    read_first_label,
    read_label,
    read_score_pair,
    read_verdict,
    smoothed,
)

ONE_TWO, LETTERS = ("1", "2"), ("A", "B", "C")
SCALE = tuple(str(i) for i in range(1, 11))

MISRECORDED = {"vicuna80-bard-70", "vicuna80-llama-13b-70"}
"""Recorded as 10 and 2, while the texts say `Assistant 1: 10` and `Assistant 2: 4`."""


@pytest.mark.parametrize(
    ("text", "labels", "index"),
    [
        ("1", ONE_TWO, 0), (" 2\n", ONE_TWO, 1), ("**2**.", ONE_TWO, 1), ("[[B]]", LETTERS, 1), ("(1)", ONE_TWO, 0),
        ("Verdict: 1", ONE_TWO, 0), ("**Verdict:** 2", ONE_TWO, 1), ("More helpful response: 2.", ONE_TWO, 1),
        ("Response 2", ONE_TWO, 1), ("Verdict: response 1", ONE_TWO, 0), ("Verdict: 1 (by a little)", ONE_TWO, 0),
        ("Response 1 is fine.\nResponse 2 is better.\n\nVerdict: 2", ONE_TWO, 1),
        ("2\n\nExplanation: response 1 misses the point.", ONE_TWO, 1),
        ("Verdict: 1\nOn second thought:\nVerdict: 2", ONE_TWO, 1), ("```\n2\n```", ONE_TWO, 1), ("2\n---", ONE_TWO, 1),
        ("Verdict：２", ONE_TWO, 1), ("<answer>A</answer>\nB", LETTERS, 1),
        ("Score: 8/10", SCALE, 7), ("10", SCALE, 9), ("Score: 10", SCALE, 9),
    ],
)  # fmt: skip
def test_a_declared_label_is_read(text: str, labels: Sequence[str], index: int) -> None:
    assert read_label(text, labels) == index


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("", ONE_TWO), ("Verdict:", ONE_TWO), ("Response 1 is better than 2", ONE_TWO), ("The answer is 1", ONE_TWO),
        ("I count 2 errors in response 1.", ONE_TWO), ("Verdict: 3", ONE_TWO), ("Verdict: 12", ONE_TWO),
        ("1\nVerdict: neither", ONE_TWO), ("1. First, the facts", ONE_TWO), ("Verdict: 1 or 2", ONE_TWO),
        ("downgrade: i think so", ("C", "P", "I")), ("downgrade: i", ("C", "P", "I")), ("[[D]]", LETTERS),
        ("Verdict: a", LETTERS), ("Score: 8/5", SCALE), ("Score: 11", SCALE), ("-1", ONE_TWO), ("1=2", ONE_TWO),
        ("Both are good, and as I said: 1", ONE_TWO),
    ],
)  # fmt: skip
def test_prose_and_answers_off_the_menu_are_none(text: str, labels: Sequence[str]) -> None:
    assert read_label(text, labels) is None


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("<think>\nVerdict: 1\nBut wait, response 2", None),
        ("<think>\nVerdict: 1\n</think>\nVerdict: 2", 1),
        ("Verdict: 1\nor not?\n</think>\n\n2", 1),
        ("<think>Verdict: 1</think>", None),
        ("<think>1</think>\n<think>\n2", None),
    ],
    ids=["unfinished", "finished", "opened-by-the-template", "nothing-after", "again"],
)
def test_what_a_model_thinks_is_not_its_answer(text: str, index: int | None) -> None:
    assert read_label(text, ONE_TWO) == index


def test_a_graded_verdict_is_not_read_from_unfinished_thinking() -> None:
    assert read_verdict("<think>\nVerdict: 1>2\nBut wait, response 2 covers more") is None


@pytest.mark.parametrize(
    ("text", "labels", "index"),
    [
        ("2", ONE_TWO, 1), (" 1\n\nExplanation: response", ONE_TWO, 0), ("Compare.\n1\nno wait, the", ONE_TWO, None),
        ("Score: 1", SCALE, None), ("Score: 1\nIt", SCALE, 0), ("Score: 10", SCALE, 9),
        ("Response 1 is", ONE_TWO, None), ("<think>\n1\n", ONE_TWO, None), ("", ONE_TWO, None),
    ],
)  # fmt: skip
def test_the_label_of_a_text_that_was_cut_is_on_its_first_line(
    text: str, labels: Sequence[str], index: int | None
) -> None:
    assert read_first_label(text, labels) == index


WORDS = (
    "a", "response", "1", "2", "of", "10", "better", "is", "score", "scores,", "9", "8.5", "than", "first:",
    "(4)", "7/10", "points.",
)  # fmt: skip
PROSE = st.lists(st.sampled_from(WORDS), min_size=3, max_size=12).map(" ".join)


@given(before=st.lists(PROSE), index=st.sampled_from([0, 1]))
def test_prose_before_a_verdict_line_changes_nothing(before: list[str], index: int) -> None:
    assert read_label("\n".join([*before, f"Verdict: {ONE_TWO[index]}"]), ONE_TWO) == index


@given(st.text(alphabet="12 .,:()ab\n", max_size=40))
def test_a_label_is_only_read_where_it_stands_alone_at_the_end_of_a_line(text: str) -> None:
    index = read_label(text, ONE_TWO)
    if index is not None:
        assert any(
            re.search(rf"(^|[^12ab])\s*{ONE_TWO[index]}\W*(\([^()]*\)\W*)?$", line)
            for line in text.split("\n")
        )


def test_graded_verdicts_mean_what_the_question_says() -> None:
    offered = re.findall(r"Verdict: (\S+)", VERDICT_ASK)
    assert tuple(offered) == VERDICT_LABELS
    assert [read_verdict(f"Because.\nVerdict: {label}") for label in VERDICT_LABELS] == list(VERDICT_PROBS)
    assert read_verdict("[[2 > 1]]") == 0.25
    assert read_verdict("Verdict: 1>>2 (response 1 is far better)") == 0.95
    assert read_verdict("so 1>2, I would say, since 3 > 2") is None
    assert read_verdict("Verdict: 1<2") is None


def test_graded_verdicts_of_both_orders_are_complements() -> None:
    mirrored = [label.translate(str.maketrans("12", "21")) for label in VERDICT_LABELS]
    assert mirrored == ["2>>1", "2>1", "2=1", "1>2", "1>>2"]
    for p, q in zip(VERDICT_PROBS, reversed(VERDICT_PROBS), strict=True):
        assert p + q == pytest.approx(1)


def reviews(folder: Path) -> list[dict[str, object]]:
    lines = (folder / "vicuna80_gpt4_reviews.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_all_320_recorded_reviews_parse_to_what_they_say(shared_data: Path) -> None:
    rows = reviews(shared_data)
    assert len(rows) == 320
    for row in rows:
        found = read_score_pair(str(row["review_text"]))
        if row["id"] in MISRECORDED:
            assert row["scores"] == [10, 2]
            assert "Assistant 1: 10\nAssistant 2: 4\n" in str(row["review_text"])
            assert found == (10, 4)
        else:
            assert found is not None and list(found) == row["scores"], row["id"]


@given(before=st.lists(PROSE, max_size=4), after=st.lists(PROSE, max_size=4), data=st.data())
def test_numbers_in_prose_do_not_change_the_scores_of_a_review(
    before: list[str], after: list[str], data: st.DataObject
) -> None:
    one, two = data.draw(st.integers(1, 10)), data.draw(st.sampled_from([1, 2.5, 8, 10]))
    form = data.draw(
        st.sampled_from(
            ["{} {}", "{}, {}", "({}, {})", "Output: ({}, {})", "Assistant 1: {}\nAssistant 2: {}",
             "Scores:\n\nAssistant 1: {}/10\n\nAssistant 2: {} (two slips)", "In short, the scores are ({}, {})."]
        )
    )  # fmt: skip
    text = "\n".join([*before, form.format(one, two), *after])
    assert read_score_pair(text) == (one, two)
    assert read_score_pair("\n".join(before + after)) is None


@pytest.mark.parametrize(
    "text",
    ["", "9", "9 8 7", "9 8 points", "11 9", "-1 5", "9 8\n\nScores: (8, 9)", "f(2) = 10 5", "Assistant 1: 10",
     "1: 10\n2: 5", "Assistant 2: 4\nAssistant 1: 9", "Assistant 1: 9\nGive Assistant 2: 4",
     "Assistant 1:\n26\nAssistant 2:\n40", "the points are (2, 3) and (4, 5)", "10/5"],
)  # fmt: skip
def test_what_declares_no_two_scores_is_none(text: str) -> None:
    assert read_score_pair(text) is None


def test_smoothing_is_laplaces_rule() -> None:
    assert smoothed((3, 1)) == pytest.approx((4 / 6, 2 / 6))
    assert smoothed((0, 0, 0)) == pytest.approx((1 / 3,) * 3)
    assert smoothed((1, 3), alpha=0) == (0.25, 0.75)
