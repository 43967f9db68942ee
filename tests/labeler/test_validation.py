"""What the validation report finds, what it leaves alone, and that it stays small."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeler.rationales import named_better
from labeler.validation import (
    Validation,
    distribution,
    drift,
    ks_distance,
    ks_p_value,
    markdown,
    same_words,
    write_validation,
)


def row(i: int = 0, **more: Any) -> dict[str, Any]:
    """A row that nothing is wrong with."""
    return {
        "id": f"id{i}",
        "prompt": [{"role": "user", "content": f"question {i}"}],
        "chosen": [{"role": "assistant", "content": "a plain answer"}],
        "rejected": [{"role": "assistant", "content": "something else entirely"}],
        "chosen_prob": 0.8,
        "chosen_is_a": True,
        "chosen_prob_first": 0.85,
        "chosen_prob_second": 0.75,
        "label_mass_ab": 0.99,
        "label_mass_ba": 0.98,
        "censored": False,
        "truncated": False,
        "rationale_ab": "Response 1 is better in style. It is clear.",
        "rationale_ba": None,
        "votes": [],
        "human_chosen_prob": None,
        **more,
    }


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def found(*rows: dict[str, Any]) -> list[str]:
    """Checks that the last row fails."""
    with Validation() as validation:
        for r in rows:
            suspect = validation.add(r)
    return [] if suspect is None else [f.check for f in suspect.findings]


def test_a_plain_row_is_not_suspicious() -> None:
    assert found(row()) == []
    assert found({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_prob": 1.0}) == []


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("orders_disagree", {"chosen_prob_first": 0.95, "chosen_prob_second": 0.2}),
        ("low_label_mass", {"label_mass_ba": 0.3}),
        ("censored", {"censored": True}),
        ("long_beats_short", {"chosen_prob": 0.97, "chosen": said("word " * 100)}),
        ("rationale_contradicts", {"rationale_ab": "Both are fine.\nVerdict: 2"}),
        ("truncated", {"truncated": True}),
        ("near_identical", {"rejected": said("a  Plain answer")}),
        ("close_call", {"chosen_prob": 0.51}),
        ("against_people", {"human_chosen_prob": 0.0}),
        ("split_jury", {"votes": [{"chosen_prob": p} for p in (0.9, 0.2)]}),
        ("split_jury", {"votes": [{"chosen_prob": p} for p in (0.9, 0.8, None)]}),
    ],
)
def test_each_thing_that_goes_wrong_is_found_alone(check: str, change: dict[str, Any]) -> None:
    assert found(row(**change)) == [check]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"chosen_prob_first": 0.55, "chosen_prob_second": 0.45}, id="orders-differ-a-little"),
        pytest.param({"chosen_prob_first": 0.95, "chosen_prob_second": 0.5}, id="a-tie-when-shown-second"),
        pytest.param({"chosen_prob_first": 0.5, "chosen_prob_second": 0.95}, id="a-tie-when-shown-first"),
        pytest.param(
            {"chosen_prob_first": 0.98, "chosen_prob_second": 0.55}, id="orders-agree-on-the-response"
        ),
        pytest.param(
            {"chosen_prob": 0.97, "chosen": said("a much longer answer than that")}, id="short-anyway"
        ),
        pytest.param({"chosen_prob": 0.7, "chosen": said("word " * 100)}, id="long-but-unsure"),
        pytest.param({"human_chosen_prob": 0.5}, id="people-tie"),
        pytest.param({"votes": [{"chosen_prob": p} for p in (0.9, 0.8, 0.7, 0.4)]}, id="one-judge-of-four"),
    ],
)
def test_what_is_ordinary_is_left_alone(change: dict[str, Any]) -> None:
    assert found(row(**change)) == []


def test_a_pair_that_occurs_again_is_found_in_either_order() -> None:
    swapped = row(chosen=row()["rejected"], rejected=row()["chosen"])
    assert found(row(), swapped) == ["duplicate"]
    assert found(row(), row(1)) == []


# ---- rationales ----


@pytest.mark.parametrize(
    ("rationale", "named"),
    [
        ("Overall, response 2 is better.", 2),
        ("Summary 1 is more helpful than summary 2.", 1),
        ("They differ in tone.\n\n**Response 1 is clearly the better response.**", 1),
        ("I prefer answer two.", 2),
        ("Style: 1\nWinner: Response 2", 2),
        ("Response 1 is short. Response 2 wins.", 2),
        ("Overall, response 2 is more helpful because it answers the question.", 2),
        ("Both are good. Answer 1's tips are fuller, which is why it receives a slightly higher score.", 1),
        ("Overall, response 2 is more helpful in style, but wrong.", None),
        ("Overall, response 2 is more lively.", None),
        ("Overall, response 1 is helpful.", None),
        ("Response 1 is helpful.", None),
        ("Response 1 is better in style. Response 2 is longer.", None),
        ("It is not clear that response 1 is better.", None),
        ("If tone matters, response 1 is better.", None),
        ("Response 1 is not better.", None),
        ("Response 1 is better. On the other hand, no.\nVerdict: 2", None),
        ("Coherence: 2\nHelpfulness: 1", None),
        ("The user asked for 2.", None),
        ("", None),
    ],
)
def test_a_rationale_names_a_response_only_in_a_declared_form(rationale: str, named: int | None) -> None:
    assert named_better(rationale) == named


def test_recorded_reviews_name_the_response_that_they_score_higher(shared_data: Path) -> None:
    # GPT-4 gave two scores and a review of each pair: what the review declares must be what the scores say.
    lines = (shared_data / "vicuna80_gpt4_reviews.jsonl").read_text().splitlines()
    named = Counter[bool]()
    for review in map(json.loads, lines):
        first, second = review["scores"]
        better = named_better(review["review_text"])
        if better is not None:
            named[(better == 1) == (first > second) and first != second] += 1
    assert named[False] == 0
    assert named[True] > len(lines) / 3


@pytest.mark.parametrize("chosen_is_a", [True, False])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_rationale_is_held_against_the_label_of_its_own_order(chosen_is_a: bool, order: str) -> None:
    # In order ab the input's first response is number 1, so the chosen one is number 1 exactly if it is that.
    chosen_is = 1 if chosen_is_a == (order == "ab") else 2
    for number, contradicts in ((chosen_is, False), (3 - chosen_is, True)):
        rationales = {"rationale_ab": None, "rationale_ba": None, f"rationale_{order}": f"Verdict: {number}"}
        expected = ["rationale_contradicts"] if contradicts else []
        assert found(row(chosen_is_a=chosen_is_a, **rationales)) == expected


# ---- the worst rows ----


def test_the_worst_rows_are_those_of_a_full_sort_and_memory_holds_no_more() -> None:
    chance = random.Random(0)
    rows = [row(i, label_mass_ab=chance.random(), chosen_prob=chance.uniform(0.5, 1)) for i in range(500)]
    with Validation(worst=10) as few, Validation(worst=500) as all_of_them:
        for r in rows:
            few.add(r)
            all_of_them.add(r)
            assert len(few._worst) <= 10
        assert [s.id for s in few.worst()] == [s.id for s in all_of_them.worst()[:10]]
        assert few.result()["suspicious"] == all_of_them.result()["suspicious"] > 10
        suspicions = [s.suspicion for s in few.worst()]
    assert suspicions == sorted(suspicions, reverse=True)


def test_several_findings_weigh_more_than_each() -> None:
    with Validation() as validation:
        suspect = validation.add(row(label_mass_ab=0.4, truncated=True))
    assert suspect is not None
    # By hand: 1 - (1 - 0.6) (1 - 0.5), the heavier one first.
    assert suspect.suspicion == pytest.approx(0.8)
    assert [f.check for f in suspect.findings] == ["low_label_mass", "truncated"]


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=2),
    st.lists(st.floats(0, 1), min_size=2, max_size=2),
    st.floats(0.5, 1),
    st.floats(0, 1),
)
def test_suspicion_stays_between_0_and_1(
    masses: list[float], orders: list[float], p: float, human: float
) -> None:
    changed = row(
        label_mass_ab=masses[0],
        label_mass_ba=masses[1],
        chosen_prob_first=orders[0],
        chosen_prob_second=orders[1],
        chosen_prob=p,
        human_chosen_prob=human,
    )
    with Validation() as validation:
        suspect = validation.add(changed)
    if suspect is not None:
        assert 0 <= suspect.suspicion <= 1
        assert all(0 <= f.suspicion <= 1 for f in suspect.findings)


# ---- all labels ----


def test_the_histogram_counts_every_label_once() -> None:
    told = distribution([0.5, 0.52, 0.76, 1.0])
    assert told["histogram"]["0.50"] == 2
    assert told["histogram"]["0.75"] == 1
    assert told["histogram"]["0.95"] == 1
    assert sum(told["histogram"].values()) == 4
    assert distribution([0.3])["below_half"] == 1


def test_labels_that_change_on_the_way_drift_and_others_do_not() -> None:
    chance = np.random.default_rng(0)
    same = chance.uniform(0.5, 1, 1000)
    sharper = same.copy()
    sharper[900:] = chance.uniform(0.8, 1, 100)
    steady, changed = drift(same, [1] * 1000), drift(sharper, [-1] * 1000)
    assert steady is not None and changed is not None
    assert steady["p_value"] > 0.01
    assert changed["p_value"] < 1e-6
    assert (steady["first_chosen_is_a"], changed["first_chosen_is_a"]) == (1.0, None)
    assert drift(same[:100], [1] * 100) is None


def test_the_kolmogorov_smirnov_distance_and_its_p_value_by_hand() -> None:
    # After 2 the distribution functions are 2/3 and 0.
    assert ks_distance(np.array([1.0, 2.0, 4.0]), np.array([3.0, 4.0, 5.0])) == pytest.approx(2 / 3)
    # Smirnov's table (Annals of Mathematical Statistics 19, 1948): L(1.36) = 0.9505, L(1.63) = 0.9902.
    assert 1 - ks_p_value(1.36, 2) == pytest.approx(0.950514, abs=1e-5)
    assert 1 - ks_p_value(1.63, 2) == pytest.approx(0.990154, abs=1e-5)


@given(st.lists(st.sampled_from("abcd"), max_size=8), st.lists(st.sampled_from("abcd"), max_size=8))
def test_shared_words_are_symmetric_and_1_for_equal_texts(a: list[str], b: list[str]) -> None:
    one, two = " ".join(a), " ".join(b)
    assert same_words(one, two) == same_words(two, one)
    assert (same_words(one, two) == 1.0) == (sorted(a) == sorted(b))


# ---- the report ----


def test_the_page_shows_the_worst_rows_first_and_hostile_text_stays_text(tmp_path: Path) -> None:
    attack = "fine\n# All rows are good\n| x |\n```\nfree"
    with Validation() as validation:
        for i in range(30):
            validation.add(row(i, label_mass_ab=0.45))
        validation.add(row(30, label_mass_ab=0.01, rejected=said(attack)))
        write_validation(tmp_path, validation)
    told = json.loads((tmp_path / "validation.json").read_text())
    assert (told["rows"], told["suspicious"], told["checks"]["low_label_mass"]["rows"]) == (31, 31, 31)
    assert told["worst"][0]["id"] == "id30"
    page = (tmp_path / "validation.md").read_text()
    assert page.index("Row 31,") < page.index("Row 1,")
    assert page.count("\n### Row") == 20
    (line,) = [line for line in page.splitlines() if "All rows are good" in line]
    assert line.startswith("      rejected:")


def test_an_empty_dataset_has_a_report_too() -> None:
    with Validation() as validation:
        page = markdown(validation.result())
    assert "0 of 0 rows" in page
