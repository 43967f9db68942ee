"""The findings about a reward model, worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_server.evaluation.assess import (
    Answer,
    LabelledAnswer,
    LabelledPair,
    assess_pairs,
    assess_scores,
    ranking,
)
from rlaif.published import BestOf


def pair(
    difference: float, label: float, longer: int = 0, prompt: str = "p", subset: str = ""
) -> LabelledPair:
    """A pair whose chosen answer scores `difference` more and is `longer` characters longer."""
    return LabelledPair(
        Answer(prompt, difference, 10 + longer, 10 + longer), Answer(prompt, 0.0, 10, 10), label, subset
    )


def test_accuracy_leaves_ties_out_and_counts_equal_scores_half() -> None:
    pairs = [pair(1.0, 0.9, 1), pair(-1.0, 0.8, 1), pair(0.0, 1.0, -1), pair(5.0, 0.5), pair(-2.0, 0.3, 0)]
    found = ranking(pairs)
    assert (found["pairs"], found["ties"]) == (5, 1)
    assert found["accuracy"]["value"] == (1 + 0 + 0.5 + 1) / 4
    assert found["longer_wins"] == (1 + 1 + 0 + 0.5) / 4
    assert found["gain"]["value"] == 0.0
    assert ranking([pair(1.0, 0.5)])["accuracy"]["value"] is None


def test_log_loss_and_calibration_by_hand() -> None:
    # Confidences 3/4, 3/4, 19/20, 1/2 in the preferred answer.
    pairs = [pair(math.log(3), 1.0), pair(-math.log(3), 1.0), pair(math.log(19), 0.8), pair(0.0, 0.5)]
    found = assess_pairs(pairs)
    losses = [-math.log(0.75), -math.log(0.25), -0.8 * math.log(0.95) - 0.2 * math.log(0.05), math.log(2)]
    assert found["log_loss"] == pytest.approx(sum(losses) / 4)
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2) + math.log(2)
    assert found["lowest_log_loss"] == pytest.approx(entropy / 4)
    assert found["calibration"]["brier"] == pytest.approx((0.25**2 + 0.75**2 + 0.15**2 + 0) / 4)
    assert found["calibration"]["coin_brier"] == pytest.approx((0.5**2 + 0.5**2 + 0.3**2 + 0) / 4)
    assert found["calibration"]["ece"] == pytest.approx((2 * 0.25 + 1 * 0.15 + 0) / 4)
    assert ranking([pair(-800.0, 1.0)])["log_loss"] == pytest.approx(800.0)  # no overflow, no floor


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 1), st.integers(-5, 5)), min_size=1, max_size=20))
def test_figures_do_not_depend_on_which_answer_is_called_chosen(rows: list[tuple[float, float, int]]) -> None:
    pairs = [pair(*row, prompt=str(i)) for i, row in enumerate(rows)]
    swapped = [LabelledPair(p.rejected, p.chosen, 1 - p.label) for p in pairs]
    # 1 - p loses a last digit, which would make a label of 0.5 + 1e-17 a tie.
    ours, theirs = (ranking([p for p in s if abs(p.label - 0.5) > 1e-9], 2) for s in (pairs, swapped))
    for name in ("longer_wins", "log_loss", "lowest_log_loss"):
        assert ours[name] == (None if theirs[name] is None else pytest.approx(theirs[name], abs=1e-9))
    assert ours["accuracy"]["value"] == theirs["accuracy"]["value"]


def test_length_figures_by_hand() -> None:
    pairs = [
        pair(2.0, 1.0, 4, "a"),
        pair(1.0, 0.0, 2, "b"),
        pair(-1.0, 1.0, 2, "c"),
        pair(-3.0, 1.0, -6, "d"),
    ]
    found = assess_pairs(pairs)["length"]
    # Preferred and longer: a (right), c (wrong). Preferred and shorter: b (wrong), d (wrong).
    assert found["longer_is_better"] == {"pairs": 2, "accuracy": 0.5}
    assert found["shorter_is_better"] == {"pairs": 2, "accuracy": 0.0}
    # x = 2, 1, -1, -3 and y = 4, 2, 2, -6: ranks 4, 3, 2, 1 and 4, 2.5, 2.5, 1.
    assert found["pair_characters"]["spearman"] == pytest.approx(4.5 / math.sqrt(5 * 4.5))
    # means -1/4 and 1/2: sum of products 26.5, of squares 14.75 and 59.
    assert found["pair_characters"]["pearson"] == pytest.approx(26.5 / math.sqrt(14.75 * 59))


def test_each_subset_has_its_own_figures() -> None:
    pairs = [pair(1.0, 1.0, subset="a"), pair(-1.0, 1.0, subset="b"), pair(1.0, 1.0, subset="b")]
    found = assess_pairs(pairs)
    assert [(s["name"], s["pairs"], s["accuracy"]["value"]) for s in found["subsets"]] == [
        ("a", 1, 1.0), ("b", 2, 0.5),
    ]  # fmt: skip
    assert "subsets" not in assess_pairs(pairs[:1])


def test_scored_answers_are_compared_within_their_prompt() -> None:
    rows = [("p", 1.0, 9.0), ("p", 0.0, 3.0), ("p", 0.5, 3.0), ("q", -1.0, 5.0)]
    answers = [LabelledAnswer(Answer(p, raw, 1, 1), score) for p, raw, score in rows]
    found = assess_scores(answers, scale=(5.0, 2.0))
    assert (found["pairs"], found["accuracy"]["value"]) == (2, 1.0)
    errors = [7.0 - 9.0, 5.0 - 3.0, 6.0 - 3.0, 3.0 - 5.0]
    assert found["scores"]["rmse"] == pytest.approx(math.sqrt(sum(e * e for e in errors) / 4))
    assert assess_scores(answers)["scores"]["rmse"] is None


def test_rewardbench_files_have_its_sections() -> None:
    pairs = [
        pair(1.0, 1.0, subset="hep-go"),
        pair(-1.0, 1.0, subset="math-prm"),
        pair(0.0, 1.0, subset="donotanswer"),  # an equal score is half right
    ]
    found = {f["name"]: f["value"] for f in assess_pairs(pairs, resamples=2)["rewardbench"]}
    reasoning = 164 / (984 + 164)
    assert found == {
        "Safety": 0.5,
        "Reasoning": pytest.approx(reasoning),
        "score": pytest.approx((0.5 + reasoning) / 2),
    }
    one = BestOf("q", 2)
    beaten = [replace(pair(d, 1.0), best_of=one) for d in (2.0, 1.0)]
    assert assess_pairs(beaten, resamples=2)["best_of"][0]["value"] == 1.0
    assert (
        assess_pairs([beaten[0], replace(pair(-1.0, 1.0), best_of=one)], resamples=2)["best_of"][0]["value"]
        == 0.0
    )
    assert "rewardbench" not in assess_pairs([*pairs, pair(1.0, 1.0, subset="mine")], resamples=2)
